"""Three small ONNX graphs that show how fast a machine is, written without the onnx package."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeadapt.profiling.wire import message

WIDTH = 1024
"""Inner and outer width of the products."""
BLOCK = 32
CHAIN_WIDTH = 576
INPUT = "x"
_CODES = {"float32": 1, "uint8": 2}


def float32_product() -> bytes:
    """Return a graph of one MatMul with a stored float32[WIDTH, WIDTH]."""
    weight = np.random.default_rng(0).standard_normal((WIDTH, WIDTH), np.float32)
    return _model([_node("MatMul", [INPUT, "w"], "y")], {"w": weight}, WIDTH)


def int8_product() -> bytes:
    """Return a graph of one MatMulNBits, 8 bits in blocks of 32, activations in int8: as int8 bundles have it."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (WIDTH, WIDTH // BLOCK, BLOCK), np.uint8)
    scales = np.full((WIDTH * WIDTH // BLOCK,), 0.01, np.float32)
    sizes = {"K": WIDTH, "N": WIDTH, "bits": 8, "block_size": BLOCK, "accuracy_level": 4}
    node = _node("MatMulNBits", [INPUT, "codes", "scales"], "y", "com.microsoft", sizes)
    return _model([node], {"codes": codes, "scales": scales}, WIDTH)


def chain(length: int) -> bytes:
    """Return a graph of `length` operators one after the other on few numbers: their overhead is all they cost."""
    names = [INPUT, *(f"v{place}" for place in range(1, length)), "y"]
    nodes = [
        # in turn, so that neighbours are not folded into one
        _node("Mul" if place % 2 else "Add", [names[place], "c"], names[place + 1])
        for place in range(length)
    ]
    return _model(nodes, {"c": np.full(CHAIN_WIDTH, 0.5, np.float32)}, CHAIN_WIDTH)


def _node(
    op_type: str, inputs: list[str], output: str, domain: str = "", attributes: dict[str, int] | None = None
) -> bytes:
    whole = [(5, message((1, name), (3, value), (20, 2))) for name, value in (attributes or {}).items()]
    reads = [(1, name) for name in inputs]
    return message(*reads, (2, output), (3, output), (4, op_type), *whole, (7, domain))


def _model(nodes: list[bytes], stored: dict[str, NDArray[np.generic]], width: int) -> bytes:
    tensors = [
        message(*((1, size) for size in array.shape), (2, _CODES[array.dtype.name]), (8, name), (9, array.tobytes()))
        for name, array in stored.items()
    ]
    graph = message(
        *((1, node) for node in nodes),
        (2, "probe"),
        *((5, tensor) for tensor in tensors),
        (11, _value(INPUT, width)),
        (12, _value("y", width)),
    )
    opsets = [(8, message((1, ""), (2, 17))), (8, message((1, "com.microsoft"), (2, 1)))]
    return message((1, 8), (7, graph), *opsets)


def _value(name: str, width: int) -> bytes:
    """Return the declaration of float32[rows, width]."""
    shape = message((1, message((2, "rows"))), (1, message((1, width))))
    return message((1, name), (2, message((1, message((1, 1), (2, shape))))))
