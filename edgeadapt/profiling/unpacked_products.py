"""ONNX graphs whose products with stored codes (MatMulNBits) become float32 products that ONNX Runtime unpacks once.

Where ONNX Runtime has no kernel for MatMulNBits, as in WebAssembly, it unpacks the codes anew in every run. Here the
same codes, scales and zero points feed a DequantizeLinear, whose inputs are all constants: a session with the option
`session.disable_quant_qdq` computes it while it is opened. The files stay as small, and the numbers are the same;
memory then holds float32. See docs/decisions/0023-web-products.md.

The files are cut at the level of protobuf's wire format, because a device has no onnx; the numbers of fields are those
of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgeadapt.errors import BundleError
from edgeadapt.profiling import wire
from edgeadapt.profiling.graph_file import Node, read_node

Fields = list[tuple[int, int | bytes]]

SESSION_OPTION = {"session": {"disable_quant_qdq": "1"}}
"""Without it ONNX Runtime keeps a DequantizeLinear for kernels that compute in codes, and runs it every time."""

_OPERATOR = "MatMulNBits"
_OPSET = 21
"""ai.onnx's first with scales per block and with numbers of 4 bits."""
_MODEL_GRAPH, _MODEL_OPSETS = 7, 8
_NODE, _INITIALIZER = 1, 5
_DIMS, _TYPE, _NAME, _RAW, _EXTERNAL = 1, 2, 8, 9, 13
_FLOAT, _UINT8, _INT64, _UINT4 = 1, 2, 7, 21
_TYPES = {8: _UINT8, 4: _UINT4}
_MIDDLES = {8: b"\x80", 4: b"\x88"}
"""A byte of zero points where a product has none: 128, or 8 and 8."""


@dataclass(frozen=True)
class Unpacked:
    """A rewritten model. products, left: how many were unpacked and how many not; float_bytes: of unpacked weights."""

    model: bytes
    products: int
    left: int
    float_bytes: int


@dataclass(frozen=True)
class _Tensor:
    """A stored tensor of ONNX's type `code`; `rest`: its message without shape, type and name."""

    code: int
    rest: Fields

    @property
    def as_bytes(self) -> bool:
        """Whether its values are bytes as they lie in memory, in the file or beside it."""
        return any(number in (_RAW, _EXTERNAL) for number, _ in self.rest)

    def seen_as(self, name: str, shape: tuple[int, ...], code: int) -> bytes:
        """Return the message of a tensor with the same bytes."""
        return wire.message(*((_DIMS, axis) for axis in shape), (_TYPE, code), (_NAME, name), *self.rest)


@dataclass
class _Graph:
    """What a graph becomes: messages of its nodes, of the tensors that are added, and its unpacked weights' sizes."""

    stored: Mapping[str, _Tensor]
    nodes: list[bytes] = field(default_factory=list)
    added: dict[str, bytes] = field(default_factory=dict)
    unpacked: dict[str, int] = field(default_factory=dict)
    products: int = 0

    def unpack(self, node: Node) -> None:
        """Write one product: its weight, unless another product reads it too, the product, and its bias."""
        x, codes, scales, zeros, _, bias = (*node.inputs, *[""] * 6)[:6]
        weight = f"{codes}/{scales}/unpacked"
        if weight not in self.unpacked:
            self._unpack_weight(node, weight, codes, scales, zeros)
        self.products += 1
        (y,) = node.outputs
        product = f"{y}/product" if bias else y
        self.nodes.append(_node("FusedMatMul", node.name, (x, weight), product, domain="com.microsoft", transB=1))
        if bias:
            self.nodes.append(_node("Add", f"{node.name}/bias", (product, bias), y))

    def _unpack_weight(self, node: Node, weight: str, codes: str, scales: str, zeros: str) -> None:
        bits, rows, columns, size = _sizes(node)
        blocks = -(-columns // size)
        code, table, padded = _TYPES[bits], (rows, blocks), blocks * size
        middle = _Tensor(code, [(_RAW, _MIDDLES[bits] * -(-rows * blocks * bits // 8))])
        names = (f"{weight}/codes", f"{weight}/scales", f"{weight}/zeros" if zeros else f"middle/{bits}/{table}")
        self.added[names[0]] = self.stored[codes].seen_as(names[0], (rows, padded), code)
        self.added[names[1]] = self.stored[scales].seen_as(names[1], table, _FLOAT)
        self.added[names[2]] = (self.stored[zeros] if zeros else middle).seen_as(names[2], table, code)
        whole = weight if padded == columns else f"{weight}/padded"
        self.nodes.append(_node("DequantizeLinear", whole, names, whole, axis=1, block_size=size))
        if padded != columns:
            numbers = tuple(self._number(value) for value in (0, columns, 1))  # from, to, axis
            self.nodes.append(_node("Slice", weight, (whole, *numbers), weight))
        self.unpacked[weight] = 4 * rows * columns

    def _number(self, value: int) -> str:
        """Return the name of a stored int64[1]."""
        name = f"number/{value}"
        raw: Fields = [(_RAW, value.to_bytes(8, "little"))]
        self.added[name] = _Tensor(_INT64, raw).seen_as(name, (1,), _INT64)
        return name

    def fits(self, node: Node) -> bool:
        """Return whether codes, scales and zero points of a product are what DequantizeLinear reads as they lie."""
        bits, _, columns, size = _sizes(node)
        if any(node.inputs[4:5]) or bits not in _TYPES or size == 0:
            return False
        if any(node.inputs[3:4]) and bits == 4 and -(-columns // size) % 2:
            return False  # each row's zero points end with half a byte of padding
        kinds = zip(node.inputs[1:4], (_UINT8, _FLOAT, _UINT8), strict=False)
        return all(self._holds(name, kind) for name, kind in kinds if name)

    def _holds(self, name: str, code: int) -> bool:
        tensor = self.stored.get(name)
        return tensor is not None and tensor.as_bytes and tensor.code == code


def unpack_products(model: bytes, where: str) -> Unpacked:
    """Return a model that computes the same with products in float32.

    Products stay whose weights are not stored, or lie in another form than DequantizeLinear reads: permuted columns,
    zero points that are no whole numbers, those of 4 bits for an odd number of blocks; and all of an early opset.

    Args:
        model: the bytes of an ONNX file.
        where: its name, for messages.

    Raises:
        BundleError: if it is no ONNX model.
    """
    fields = _fields_of(model, where)
    graphs = [value for number, value in fields if number == _MODEL_GRAPH and isinstance(value, bytes)]
    if len(graphs) != 1:
        raise BundleError(f"{where} is not an ONNX graph", hint="check the bundle with `edgeadapt verify`")
    can = any(_is_late(value, where) for number, value in fields if number == _MODEL_OPSETS)
    graph, done, left = _rewritten(graphs[0], where, can=can)
    changed = wire.message(*((number, graph if number == _MODEL_GRAPH else value) for number, value in fields))
    return Unpacked(changed, done.products, left, sum(done.unpacked.values()))


def _rewritten(graph: bytes, where: str, *, can: bool) -> tuple[bytes, _Graph, int]:
    """Return a graph without the products that can be unpacked, what was done, and how many products stayed."""
    fields = _fields_of(graph, where)
    tensors = (_tensor(value, where) for number, value in fields if number == _INITIALIZER)
    done, left = _Graph(dict(tensors)), 0
    kept: list[bytes] = []
    replaced: set[str] = set()
    for number, value in fields:
        if number != _NODE or isinstance(value, int):
            continue
        node = read_node(memoryview(value), where) if _operator(value, where) == _OPERATOR else None
        if node is not None and can and done.fits(node):
            done.unpack(node)
            replaced.update(node.inputs[1:4])
        else:
            done.nodes.append(value)
            kept.append(value)
            left += node is not None
    nodes: Fields = [(_NODE, data) for data in done.nodes]
    added: Fields = [(_INITIALIZER, data) for data in done.added.values()]
    # a name that only happens to lie in a node's bytes keeps a tensor too, which does no harm
    unread = {name for name in replaced if not any(name.encode() in data for data in kept)}
    rest = [part for part in fields if part[0] != _NODE and not _is_one_of(part, unread, where)]
    return wire.message(*nodes, *added, *rest), done, left


def _is_one_of(part: tuple[int, int | bytes], names: set[str], where: str) -> bool:
    """Return whether a graph's field is a stored tensor of one of these names."""
    number, value = part
    return number == _INITIALIZER and _tensor(value, where)[0] in names


def _sizes(node: Node) -> tuple[int, int, int, int]:
    """Return bits, rows (N), columns (K) and block size of a product."""
    given = node.attributes
    return given.get("bits", 4), given.get("N", 0), given.get("K", 0), given.get("block_size", 0)


def _node(operator: str, name: str, inputs: tuple[str, ...], output: str, domain: str = "", **numbers: int) -> bytes:
    attributes = [(5, wire.message((1, key), (3, value), (20, 2))) for key, value in numbers.items()]
    return wire.message(
        *((1, each) for each in inputs), (2, output), (3, name), (4, operator), *attributes, (7, domain)
    )


def _operator(node: bytes, where: str) -> str:
    return next((wire.text(value, where) for number, value in wire.fields(memoryview(node), where) if number == 4), "")


def _tensor(data: int | bytes, where: str) -> tuple[str, _Tensor]:
    name, code, rest = "", 0, []
    for number, value in _fields_of(data, where):
        if number == _NAME:
            name = wire.text(value if isinstance(value, int) else memoryview(value), where)
        elif number == _TYPE and isinstance(value, int):
            code = value
        elif number != _DIMS:
            rest.append((number, value))
    return name, _Tensor(code, rest)


def _is_late(opset: int | bytes, where: str) -> bool:
    """Return whether an OperatorSetIdProto is ai.onnx's, of a version that knows blocks."""
    fields = dict(_fields_of(opset, where))
    version = fields.get(2, 0)
    return fields.get(1, b"") in (b"", b"ai.onnx") and isinstance(version, int) and version >= _OPSET


def _fields_of(data: int | bytes, where: str) -> Fields:
    message = memoryview(b"\xff" if isinstance(data, int) else data)  # a number is no message
    return [
        (number, value if isinstance(value, int) else bytes(value)) for number, value in wire.fields(message, where)
    ]
