"""Graph to Graph with smaller weights (`quantize`), then to files (`pack`). Schemes are files in `schemes/`."""

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Weights that may share a scale: what MatMulNBits and GatherBlockQuantized have kernels for."""
