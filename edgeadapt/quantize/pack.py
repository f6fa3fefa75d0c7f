"""Lower the markers, last of all: a plain graph and a slots graph per role, over one data file.

The plain graph is the bare base. The slots graph has, at each site that an adapter of the bundle uses, the cheapest
branch for what is used there (low-rank add, gain, offset), its tensors as optional inputs whose defaults are the
identity. Equal bytes are stored once, whatever their name or shape.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from edgeadapt.adapters.adapter import ResolvedAdapter, TargetModule
from edgeadapt.errors import ExportError
from edgeadapt.export.graph import ADAPTER_SITE, MARKER_DOMAIN, PARAMETER_SITE, Graph

WEIGHTS = "weights.bin"
EXTERNAL_FROM_BYTES = 1024
ALIGNMENT = 64


@dataclass(frozen=True)
class PackedSlot:
    """One adapter site as lowered; the fields of `bundle.manifest.Slot`."""

    site: str
    graphs: tuple[str, ...]
    type: str
    in_features: int
    out_features: int
    inputs: Mapping[str, str]


@dataclass(frozen=True)
class PackedParameter:
    """One replaceable parameter as lowered; the fields of `bundle.manifest.ParameterSlot`."""

    parameter: str
    graphs: tuple[str, ...]
    input: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class PackedGraphFiles:
    """One role's files, relative to the bundle, and its data inputs and outputs."""

    plain: str
    slots: str | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Packed:
    """What was written, for the manifest."""

    graphs: Mapping[str, PackedGraphFiles]
    slots: tuple[PackedSlot, ...]
    parameters: tuple[PackedParameter, ...]


def pack(
    graph: Graph,
    folder: Path,
    adapters: Sequence[ResolvedAdapter],
    modules: Mapping[str, TargetModule],
    *,
    flexible: Iterable[str] = (),
) -> Packed:
    """Write `graph` under `folder`/graph for the given adapters and return the slot table.

    Args:
        graph: with markers in place; consumed (its models are lowered in place).
        folder: the bundle's (staged) folder.
        adapters: those of the bundle; none for a merged bundle, which then gets no slots graph.
        modules: the base's modules.
        flexible: replaced parameters whose axis 0 may differ between adapters (class counts).

    Raises:
        ExportError: if a site or parameter of an adapter is in no graph.
    """
    wanted = _wanted(adapters)
    replaced = {name for adapter in adapters for name in adapter.replaced}
    flexible = set(flexible)
    target = folder / "graph"
    target.mkdir(parents=True, exist_ok=True)
    files: dict[str, PackedGraphFiles] = {}
    sites: dict[str, list[str]] = {}
    parameters: dict[str, list[str]] = {}
    with (target / WEIGHTS).open("wb") as stream:
        store = _Store(stream)
        for role, model in graph.models.items():
            inputs = tuple(str(value.name) for value in model.graph.inputs)
            outputs = tuple(str(value.name) for value in model.graph.outputs)
            slots_model = model.clone() if adapters else None
            _lower(model, {}, set(), set(), modules)
            _save(model, target / f"{role}.plain.onnx", store)
            slots_name = None
            if slots_model is not None:
                found_sites, found_parameters = _lower(slots_model, wanted, replaced, flexible, modules)
                if found_sites or found_parameters:
                    slots_name = f"graph/{role}.slots.onnx"
                    _save(slots_model, target / f"{role}.slots.onnx", store)
                for site in found_sites:
                    sites.setdefault(site, []).append(role)
                for parameter in found_parameters:
                    parameters.setdefault(parameter, []).append(role)
            files[role] = PackedGraphFiles(f"graph/{role}.plain.onnx", slots_name, inputs, outputs)
    _all_found(set(wanted) - set(sites), replaced - set(parameters))
    return Packed(
        graphs=files,
        slots=tuple(_slot(site, roles, wanted[site], modules[site]) for site, roles in sorted(sites.items())),
        parameters=tuple(
            PackedParameter(name, tuple(roles), name, _parameter_shape(name, adapters, name in flexible))
            for name, roles in sorted(parameters.items())
        ),
    )


def _wanted(adapters: Sequence[ResolvedAdapter]) -> dict[str, frozenset[str]]:
    """Return the terms that any adapter uses, per site: subsets of {"a", "b", "gain", "offset"}."""
    terms: dict[str, set[str]] = {}
    for adapter in adapters:
        for site, update in adapter.sites.items():
            used = {term for term in ("a", "b", "gain", "offset") if getattr(update, term) is not None}
            terms.setdefault(site, set()).update(used)
    return {site: frozenset(used) for site, used in terms.items() if used}


def _all_found(sites: set[str], parameters: set[str]) -> None:
    missing = sorted(sites | parameters)
    if missing:
        raise ExportError(
            f"the exported graph does not use {', '.join(missing[:5])}{' and more' if len(missing) > 5 else ''}, "
            "which an adapter changes",
            hint="choose the --task whose model uses these modules (a pooler is unused in token classification)",
        )


def _slot(site: str, roles: list[str], terms: frozenset[str], module: TargetModule) -> PackedSlot:
    names = {"a": "lora_A", "b": "lora_B", "gain": "gain", "offset": "offset"}
    inputs = {term: f"{site}.{name}" for term, name in names.items() if term in terms}
    return PackedSlot(site, tuple(roles), module.type, module.in_features, module.out_features, inputs)


def _parameter_shape(name: str, adapters: Sequence[ResolvedAdapter], flexible: bool) -> tuple[int | str, ...]:
    shape = next(adapter.replaced[name].shape for adapter in adapters if name in adapter.replaced)
    return ("num_labels", *shape[1:]) if flexible else tuple(shape)


def _lower(
    model: ir.Model,
    wanted: Mapping[str, frozenset[str]],
    replaced: set[str],
    flexible: set[str],
    modules: Mapping[str, TargetModule],
) -> tuple[list[str], list[str]]:
    """Replace every marker of `model` in place; return the sites and parameters that became inputs."""
    graph = model.graph
    lowering = _Lowering(graph)
    for node in list(graph):
        if node.domain != MARKER_DOMAIN:
            continue
        if node.op_type == PARAMETER_SITE:
            name = node.attributes["parameter"].as_string()
            result = lowering.parameter(node, name, name in flexible) if name in replaced else _given(node, 0)
        elif node.op_type == ADAPTER_SITE:
            site = node.attributes["site"].as_string()
            terms = wanted.get(site, frozenset())
            varies = f"{site}.weight" in flexible & replaced
            result = lowering.site(node, site, terms, modules, varies=varies) if terms else _given(node, 1)
        else:
            raise ExportError(f"unknown marker {node.op_type}", hint="this is a bug; please report it")
        _replace(graph, node, result)
    model.opset_imports.pop(MARKER_DOMAIN, None)
    _drop_unused_initializers(graph)
    if lowering.sites or lowering.parameters:
        _forget_shapes(graph, flexible & set(lowering.parameters))
    return list(lowering.sites), list(lowering.parameters)


def _given(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None  # a marker has all its inputs
    return value


def _replace(graph: ir.Graph, node: ir.Node, result: ir.Value) -> None:
    output = node.outputs[0]
    if output.is_graph_output():
        # A graph output keeps its name: let the producer write it, or an Identity where the value is an input.
        name = output.name
        output.name = None
        if result.producer() is None or result.is_graph_output():
            identity = ir.node("Identity", [result])
            graph.insert_before(node, identity)
            result = identity.outputs[0]
        result.name = name
        result.shape, result.type = output.shape, output.type
    ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)


class _Lowering:
    """Adds the inputs and nodes of one slots graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.sites: dict[str, dict[str, ir.Value]] = {}
        self.parameters: dict[str, ir.Value] = {}

    def parameter(self, node: ir.Node, name: str, flexible: bool) -> ir.Value:
        """Return the optional input that stands for parameter `name`, its default the base's value."""
        if name not in self.parameters:
            source = node.inputs[0]
            assert source is not None
            assert source.const_value is not None
            value = np.asarray(source.const_value.numpy())
            shape: list[int | str] = list(value.shape)
            if flexible:
                shape[0] = f"{name}.num_labels"
            if source.name == name:
                source.name = f"{name}.base"
            self.parameters[name] = self._input(name, value, shape)
        return self.parameters[name]

    def site(
        self, node: ir.Node, site: str, terms: frozenset[str], modules: Mapping[str, TargetModule], *, varies: bool
    ) -> ir.Value:
        """Return y' = (y + (x A) B) * gain + offset for the terms in use.

        Where the number of outputs `varies` (a head that another adapter replaces), the defaults have one output, which
        stands for any number.
        """
        module = modules[site]
        inputs = self.sites.setdefault(site, {})
        x, y = _given(node, 0), _given(node, 1)
        nodes: list[ir.Node] = []
        if "a" in terms:
            a, b = self._low_rank_inputs(site, module, inputs, varies=varies)
            nodes += _low_rank(x, a, b, module, modules_conv(node, module))
            y = _append(nodes, "Add", [y, nodes[-1].outputs[0]])
        for term, op, default in (("gain", "Mul", np.ones), ("offset", "Add", np.zeros)):
            if term in terms:
                if term not in inputs:
                    size, axis = (1, f"{site}.out") if varies else (module.out_features, module.out_features)
                    inputs[term] = self._input(f"{site}.{term}", default(size, np.float32), [axis])
                vector = inputs[term]
                y = _append(nodes, op, [y, _per_channel(nodes, vector, module)])
        self.graph.insert_before(node, nodes)
        return y

    def _low_rank_inputs(
        self, site: str, module: TargetModule, inputs: dict[str, ir.Value], *, varies: bool
    ) -> tuple[ir.Value, ir.Value]:
        if "a" not in inputs:
            sizes = {"rank": 0, "out": 1 if varies else module.out_features}
            axes = {"rank": f"{site}.rank", "out": f"{site}.out" if varies else module.out_features}
            for term, name, shape in zip("ab", ("lora_A", "lora_B"), _low_rank_shapes(module), strict=True):
                default = np.zeros([sizes[d] if isinstance(d, str) else d for d in shape], np.float32)
                inputs[term] = self._input(
                    f"{site}.{name}", default, [axes[d] if isinstance(d, str) else d for d in shape]
                )
        return inputs["a"], inputs["b"]

    def _input(self, name: str, default: np.ndarray[Any, Any], shape: Sequence[int | str]) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        value.const_value = ir.tensor(np.ascontiguousarray(default, np.float32), name=name)
        self.graph.inputs.append(value)
        self.graph.register_initializer(value)
        return value


def _low_rank_shapes(module: TargetModule) -> tuple[list[int | str], list[int | str]]:
    """Return the shapes of A and B with "rank" and "out" for those sizes."""
    if module.type == "conv2d":
        return ["rank", module.in_features, *module.weight_shape[2:]], ["out", "rank", 1, 1]
    return [module.in_features, "rank"], ["rank", "out"]


def _append(nodes: list[ir.Node], op: str, inputs: list[ir.Value | None], **attributes: Any) -> ir.Value:
    node = ir.node(op, inputs, attributes=attributes)
    nodes.append(node)
    return node.outputs[0]


def modules_conv(node: ir.Node, module: TargetModule) -> ir.Node | None:
    """Return the Conv node whose output the marker `node` passes, or None if `module` is no convolution."""
    if module.type != "conv2d":
        return None
    value = node.inputs[1]
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type != "Conv":
        producer = producer.inputs[0].producer() if producer.inputs and producer.inputs[0] is not None else None
    if producer is None:
        raise ExportError(f"no Conv found for {module.path}", hint="this is a bug; please report it")
    return producer


def _low_rank(
    x: ir.Value | None, a: ir.Value, b: ir.Value, module: TargetModule, conv: ir.Node | None
) -> list[ir.Node]:
    nodes: list[ir.Node] = []
    if module.type == "embedding":
        narrow = _append(nodes, "Gather", [a, x], axis=0)
        _append(nodes, "MatMul", [narrow, b])
    elif conv is not None:
        # peft: A takes the base's stride and padding, never its dilation or groups; a grouped B comes here as dense.
        same = [attribute for name, attribute in conv.attributes.items() if name in ("pads", "strides")]
        narrow_node = ir.Node("", "Conv", [conv.inputs[0], a], attributes=same)
        nodes.append(narrow_node)
        _append(nodes, "Conv", [narrow_node.outputs[0], b])
    else:
        narrow = _append(nodes, "MatMul", [x, a])
        _append(nodes, "MatMul", [narrow, b])
    return nodes


def _per_channel(nodes: list[ir.Node], vector: ir.Value, module: TargetModule) -> ir.Value:
    """Return `vector` shaped for the channel axis: last for most modules, axis 1 for images."""
    if module.type != "conv2d" and module.class_name != "BatchNorm2d":
        return vector
    shape = ir.node("Constant", [], attributes={"value": ir.tensor(np.array([-1, 1, 1], np.int64))})
    nodes.append(shape)
    return _append(nodes, "Reshape", [vector, shape.outputs[0]])


def _drop_unused_initializers(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_input():
            del graph.initializers[name]


def _forget_shapes(graph: ir.Graph, flexible: set[str]) -> None:
    """Drop inferred shapes: a head of another class count changes them. Outputs keep their rank, class axes vary."""
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    if not flexible:
        return
    for value in graph.outputs:
        if value.name == "logits" and value.shape is not None:
            value.shape = ir.Shape([*list(value.shape)[:-1], "num_labels"])


class _Store:
    """One data file that holds equal bytes once."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.offsets: dict[tuple[bytes, int], int] = {}

    def put(self, data: bytes | memoryview) -> tuple[int, int]:
        """Write `data` if new; return its offset and length in bytes."""
        key = (hashlib.sha256(data).digest(), len(data))
        if key not in self.offsets:
            offset = self.stream.tell()
            padding = -offset % ALIGNMENT
            self.stream.write(b"\0" * padding)
            self.offsets[key] = offset + padding
            self.stream.write(data)
        return self.offsets[key], len(data)


def _save(model: ir.Model, path: Path, store: _Store) -> None:
    """Write `model` to `path` with its large initializers in the store's file."""
    proto_values: list[tuple[ir.Value, ir.TensorProtocol]] = []
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            raise ExportError(f"initializer {value.name} has no value", hint="this is a bug; please report it")
        if tensor.nbytes < EXTERNAL_FROM_BYTES:
            continue
        offset, length = store.put(tensor.tobytes())
        external = ir.ExternalTensor(
            WEIGHTS,
            offset,
            length,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=value.name or "",
            base_dir=path.parent,
        )
        proto_values.append((value, tensor))
        value.const_value = external
    model.graph.name = path.name.split(".")[0]
    model.producer_name, model.producer_version = "edgeadapt", None
    ir.save(model, path)
    for value, tensor in proto_values:
        value.const_value = tensor
