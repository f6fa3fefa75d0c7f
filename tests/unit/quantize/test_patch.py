"""An adapter rounded on the base's grid: the codes that rounding its merged weights gives, or the reason why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgeadapt.export.graph import Graph
from edgeadapt.quantize.blocks import Blocks, round_to_nearest
from edgeadapt.quantize.descent import descend
from edgeadapt.quantize.gptq import invert, round_on_grid, round_with_feedback
from edgeadapt.quantize.pack import pack
from edgeadapt.quantize.patch import FileChange, NewValue, Variant, changes
from edgeadapt.quantize.quantize import quantize

Array = np.ndarray[Any, Any]
SHAPES = {"one": (96, 64), "two": (64, 96), "three": (40, 64), "head": (24, 40)}


def weight(name: str, seed: int = 0) -> Array:
    random = np.random.default_rng([seed, sum(name.encode())])
    return (random.standard_normal(SHAPES[name]) / 8).astype(np.float32)


@pytest.fixture
def graph(builder) -> Graph:
    """Three linear layers: [in, out] with a bias, [out, in] by Gemm, and after a norm; and a head that is replaced."""
    x = builder.input("x", ["batch", 64])
    product = builder.node("MatMul", [x, builder.constant("val_1", np.ascontiguousarray(weight("one").T))])
    bias = builder.constant("module.one.bias", np.linspace(-1, 1, 96, dtype=np.float32))
    y = builder.site("one", x, builder.node("Add", [product, bias]))
    y = builder.site("two", y, builder.node("Gemm", [y, builder.constant("val_2", weight("two"))], transB=1))
    scale = builder.constant("module.norm.weight", np.ones(64, np.float32))
    y = builder.site("norm", y, builder.node("Mul", [y, scale]))
    fused = builder.node("FusedMatMul", [y, builder.constant("val_3", weight("three"))], "com.microsoft", transB=1)
    y = builder.site("three", y, fused)
    given = builder.parameter("head.weight", builder.constant("val_4", weight("head")))
    kept = builder.node("MatMul", [y, builder.node("Transpose", [given], perm=[1, 0])])
    builder.output("y", builder.site("head", y, kept))
    return builder.done()


def new(name: str, *, size: float = 0.02) -> NewValue:
    """Return a linear layer's weight with a small change."""
    old = weight(name)
    return NewValue(lambda: old, lambda: (old + size * weight(name, 1)).astype(np.float32))


def values(graph: Graph) -> dict[str, Array]:
    return {name: value.const_value.numpy() for name, value in graph.models["model"].graph.initializers.items()}


def rounded(name: str, scheme: str, moment: Array | None, changed: NewValue) -> tuple[Blocks, Blocks]:
    """Return the base's blocks and the changed ones on the same grid."""
    if scheme == "int8":
        base = round_to_nearest(weight(name), 8, 32, symmetric=True)
    elif moment is None:
        base = round_to_nearest(weight(name), 4, 32, symmetric=False, search=True)
    else:
        base = round_with_feedback(weight(name), invert(moment), 4, 32)
    if moment is not None:
        return base, descend(changed.after(), base, moment)
    return base, round_on_grid(changed.after(), base)


@pytest.mark.parametrize(("scheme", "calibrated"), [("int8", False), ("int4", False), ("int4", True)])
def test_the_codes_are_those_of_the_merged_weight_on_the_base_s_grid(graph, scheme, calibrated):
    names = ("one", "two", "three")
    moments = {}
    if calibrated:
        for name in names:
            inputs = np.random.default_rng(3).standard_normal((500, SHAPES[name][1])).astype(np.float32)
            moments[name] = (inputs.T @ inputs / 500).astype(np.float32)
    parameters = {f"{name}.weight": new(name) for name in names}
    variant = Variant("a", parameters)
    base, _ = quantize(graph, scheme, moments=moments, variants=[variant])
    assert variant.problem is None
    before, after = values(base), values(variant.graph(base))
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {f"{name}.{scheme}.codes" for name in names}
    for name in names:
        old, expected = rounded(name, scheme, moments.get(name), parameters[f"{name}.weight"])
        np.testing.assert_array_equal(before[f"{name}.{scheme}.codes"], old.packed_codes())
        np.testing.assert_array_equal(after[f"{name}.{scheme}.codes"], expected.packed_codes())


def test_biases_norms_and_replaced_parameters_change_too(graph):
    parameters = {
        "one.weight": NewValue(lambda: weight("one").T, lambda: new("one").after().T, transposed=True),  # a Conv1D
        "one.bias": NewValue(lambda: np.linspace(-1, 1, 96, dtype=np.float32), lambda: np.ones(96, np.float32)),
        "norm.weight": NewValue(lambda: np.ones(64, np.float32), lambda: np.full(64, 2, np.float32)),
        "head.weight": NewValue(None, lambda: weight("head", 2)),
    }
    variant = Variant("a", parameters)
    base, _ = quantize(graph, "int8", variants=[variant])
    assert variant.problem is None
    before, after = values(base), values(variant.graph(base))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"one.int8.codes", "module.one.bias", "module.norm.weight", "val_4"}
    np.testing.assert_array_equal(after["one.int8.codes"], rounded("one", "int8", None, new("one"))[1].packed_codes())
    np.testing.assert_array_equal(after["val_4"], weight("head", 2))
    np.testing.assert_array_equal(after["module.norm.weight"], np.full(64, 2))


def test_convolutions_and_weights_that_stay_float(builder):
    random = np.random.default_rng(0)
    kernel = random.standard_normal((16, 8, 3, 3)).astype(np.float32)
    matrix = random.standard_normal((16, 4)).astype(np.float32)  # [in, out], too small to be quantized
    x = builder.input("x", ["batch", 8, 5, 5])
    y = builder.site("conv", x, builder.node("Conv", [x, builder.constant("val_1", kernel)]))
    pooled = builder.node("Flatten", [builder.node("GlobalAveragePool", [y])])
    builder.output("y", builder.site("fc", pooled, builder.node("MatMul", [pooled, builder.constant("val_2", matrix)])))
    step = 0.05 * random.standard_normal(kernel.shape).astype(np.float32)
    parameters = {
        "conv.weight": NewValue(lambda: kernel, lambda: kernel + step),
        "fc.weight": NewValue(lambda: matrix.T, lambda: matrix.T + 1),
    }
    variant = Variant("a", parameters)
    base, _ = quantize(builder.done(), "int8", variants=[variant])
    assert variant.problem is None
    after = values(variant.graph(base))
    np.testing.assert_array_equal(after["val_2"], matrix + 1)
    scales = values(base)["conv.int8.scales"]
    expected = np.clip(np.rint((kernel + step) / scales), -127, 127).astype(np.int8)
    np.testing.assert_array_equal(after["conv.int8.codes"], expected)
    assert not np.array_equal(expected, values(base)["conv.int8.codes"])


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({"one.weight": new("two")}, "the weight of one is another one in the graph than in the model"),
        (
            {"one.weight": NewValue(None, lambda: weight("two"))},
            "one.weight has the shape [64, 96], the base's has [96, 64]",
        ),
        (
            {"head.weight": NewValue(None, lambda: np.ones((3, 40), np.float32))},
            "head.weight has the shape [3, 40], the base's has [24, 40]",
        ),
        (
            {"two.bias": NewValue(None, lambda: np.ones(64, np.float32))},
            "two.bias is not in the model graph as a value of its own",
        ),
        (
            {"four.bias": NewValue(None, lambda: np.ones(64, np.float32))},
            "four.bias is in no graph as a value of its own",
        ),
        (
            {"norm.weight": NewValue(lambda: np.zeros(64, np.float32), lambda: np.ones(64, np.float32))},
            "norm.weight is another one in the graph than in the model",
        ),
        (
            {"norm.weight": NewValue(None, lambda: np.ones(3, np.float32))},
            "norm.weight has the shape [3], the base's has [64]",
        ),
    ],
)
def test_what_cannot_be_a_patch_says_why(graph, parameters, problem):
    variant = Variant("a", parameters)
    quantize(graph, "int8", variants=[variant])
    assert variant.problem == problem


def test_a_tied_weight_of_which_one_use_changes(builder):
    table = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    ids = builder.input("input_ids", ["batch"], ir.DataType.INT64)
    constant = builder.constant("embed.weight", table)
    h = builder.site("embed", ids, builder.node("Gather", [constant, ids]))
    head = builder.node("FusedMatMul", [h, constant], "com.microsoft", transB=1)
    builder.output("logits", builder.site("lm_head", h, head))
    variant = Variant("a", {"lm_head.weight": NewValue(lambda: table, lambda: table + 1)})
    quantize(builder.done(), "int8", variants=[variant])
    assert variant.problem == "the weight of lm_head is that of embed too, and only one of them changes"


def test_embeddings_of_their_own(builder):
    table = np.random.default_rng(0).standard_normal((50, 64)).astype(np.float32)
    ids = builder.input("input_ids", ["batch"], ir.DataType.INT64)
    rows = builder.node("Gather", [builder.constant("val_1", table), ids])
    builder.output("y", builder.site("embed", ids, rows))
    changed = NewValue(lambda: table, lambda: table * np.float32(1.01))
    variant = Variant("a", {"embed.weight": changed})
    base, _ = quantize(builder.done(), "int8", variants=[variant])
    blocks = round_on_grid(changed.after(), round_to_nearest(table, 8, 32, symmetric=True))
    np.testing.assert_array_equal(values(variant.graph(base))["embed.int8.rows"], blocks.codes.reshape(50, 64))


def packed(graph: Graph, folder: Path) -> dict[str, Any]:
    copy = Graph({role: model.clone() for role, model in graph.models.items()}, graph.task)
    return dict(pack(copy, folder, (), {}).graphs)


def applied(folder: Path, found: dict[str, list[FileChange]], to: Path) -> None:
    """Write a packed folder's files with the changes."""
    (to / "graph").mkdir(parents=True)
    for file in (folder / "graph").iterdir():
        data = bytearray(file.read_bytes())
        for change in found.get(f"graph/{file.name}", []):
            assert data[change.offset : change.offset + len(change.before)] == change.before.tobytes()
            data[change.offset : change.offset + len(change.after)] = change.after.tobytes()
        (to / "graph" / file.name).write_bytes(data)


def stored(folder: Path) -> dict[str, Array]:
    model = ir.load(folder / "graph" / "model.plain.onnx")
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}


@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8), ("int4", 4)])
def test_changed_files_are_the_packed_variant(graph, tmp_path, scheme, bits):
    parameters = {
        **{f"{name}.weight": new(name) for name in ("one", "two", "three")},
        "one.bias": NewValue(None, lambda: np.ones(96, np.float32)),  # in the graph's file: it is small
        "head.weight": NewValue(None, lambda: weight("head", 2)),
    }
    variant = Variant("a", parameters)
    base, _ = quantize(graph, scheme, variants=[variant])
    graphs = packed(base, tmp_path / "base")
    assert packed(variant.graph(base), tmp_path / "variant") == graphs
    found = changes(tmp_path / "base", tmp_path / "variant", graphs)
    assert isinstance(found, dict)
    assert [change.bits for change in found["graph/weights.bin"]].count(bits) == 3
    assert [change.bits for change in found["graph/weights.bin"]].count(0) == 1
    assert {change.bits for change in found["graph/model.plain.onnx"]} == {0}
    applied(tmp_path / "base", found, tmp_path / "patched")
    expected, got = stored(tmp_path / "variant"), stored(tmp_path / "patched")
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value)


def test_equal_weights_that_become_different(builder, tmp_path):
    same = weight("one")
    x, other = builder.input("x", ["batch", 64]), builder.input("other", ["batch", 64])
    y = builder.site("one", x, builder.node("Gemm", [x, builder.constant("val_1", same)], transB=1))
    z = builder.site("same", other, builder.node("Gemm", [other, builder.constant("val_2", same.copy())], transB=1))
    builder.output("y", builder.node("Add", [y, z]))
    variant = Variant("a", {"one.weight": new("one")})
    base, _ = quantize(builder.done(), "int8", variants=[variant])
    graphs = packed(base, tmp_path / "base")
    packed(variant.graph(base), tmp_path / "variant")
    found = changes(tmp_path / "base", tmp_path / "variant", graphs)
    assert found == ("one.int8.codes and same.int8.codes are stored once, and the adapter changes them differently")
