"""Measuring in a browser: a page, a job and ONNX Runtime's web build, served to one visitor who sends figures back."""
