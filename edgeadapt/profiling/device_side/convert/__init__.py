"""A bundle's graphs for runtimes that read no ONNX: programs that run in the runtime's own Python.

They import torch, onnx, numpy and the runtime's converter, and nothing of edgeadapt: `python -m convert.RUNTIME`, with
the folder above as PYTHONPATH. `graph` reads ONNX, `network` makes a torch module of it that torch.export can trace
(the operators are in `operators`, `convolutions`, `contrib` and `attention`), `request` says what is wanted, and a file
per runtime writes that runtime's model.
"""
