"""The base as ONNX graphs whose adapter sites are still markers."""
