"""Products that read the same input are computed as one: the same numbers, adapters at any of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgeadapt.bundle import open_bundle
from edgeadapt.pipeline import export_bundle
from edgeadapt.quantize import pack
from edgeadapt.recipe import Recipe
from edgeadapt.runtime import open_session
from tests.e2e.conftest import Tiny
from tests.e2e.reference import CLOSE, case

GetTiny = Callable[[str], Tiny]

EXPECTED = {
    "llama": {"q_proj+k_proj+v_proj", "gate_proj+up_proj"},
    "qwen2": {"q_proj+k_proj+v_proj", "gate_proj+up_proj"},
    "qwen3": {"q_proj+k_proj+v_proj", "gate_proj+up_proj"},
    "bert": {"query+key+value"},
    "t5": {"q+k+v", "k+v"},
}


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_joined_products_give_the_same_numbers(
    name: str, quantize: str, tiny: GetTiny, tmp_path: Path, traced_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(name)
    bundles = []
    for joined in (True, False):
        if not joined:
            monkeypatch.setattr(pack, "join_products", lambda *_: None)
        recipe = Recipe(
            adapters=tuple(model.adapters),
            base=str(model.base),
            quantize=quantize,
            output=tmp_path / f"{joined}.bundle",
        )
        bundles.append(export_bundle(recipe))
    assert {_short(record.inputs["a"]) for record in bundles[0].manifest.joined} == EXPECTED[name]
    assert not bundles[1].manifest.joined
    assert _products(bundles[0].path) < _products(bundles[1].path)
    with open_session(bundles[0]) as session, open_session(bundles[1]) as apart:
        inputs = case(name)
        if name == "t5":
            inputs = {**inputs, "decoder_input_ids": inputs["input_ids"][:, :5]}
        for adapter in (None, "adapter0", {"adapter0": 0.75, "adapter1": 0.25}, "adapter1", None):
            session.use(adapter)
            apart.use(adapter)
            found, expected = session.run(inputs), apart.run(inputs)
            for output, value in expected.items():
                scale = float(np.abs(value).max())
                # The same products; only the branch's sums may run in another order.
                assert np.abs(found[output] - value).max() <= (0 if adapter is None else CLOSE * scale), output


def test_what_is_stored_differently_is_not_joined(tiny: GetTiny, tmp_path: Path, traced_once: None) -> None:
    model = tiny("llama")
    recipe = Recipe(
        adapters=tuple(model.adapters),
        base=str(model.base),
        quantize="int4",
        keep={"*.v_proj": "int8", "*.layers.0.mlp.up_proj": "none"},
        output=tmp_path / "mixed.bundle",
    )
    bundle = export_bundle(recipe)
    found = {record.sites[0].rpartition(".")[0]: _short(record.inputs["a"]) for record in bundle.manifest.joined}
    assert found == {
        "model.layers.0.self_attn": "q_proj+k_proj",
        "model.layers.1.self_attn": "q_proj+k_proj",
        "model.layers.1.mlp": "gate_proj+up_proj",
    }


def test_a_module_of_a_joined_product_takes_an_adapter_that_was_added_later(
    tiny: GetTiny, tmp_path: Path, traced_once: None
) -> None:
    """The first adapters change q and v; k shares their branch, so an adapter for k fits as well."""
    model = tiny("llama")
    recipe = Recipe(adapters=(model.adapters[1],), base=str(model.base), quantize="int8", output=tmp_path / "qv.bundle")
    bundle = export_bundle(recipe)
    assert {slot.site.rpartition(".")[2] for slot in bundle.manifest.slots} == {"q_proj", "k_proj", "v_proj"}


def _short(name: str) -> str:
    return name.removesuffix(".lora_A").rpartition(".")[2]


def _products(bundle: Path) -> int:
    graphs = (bundle / record.plain for record in open_bundle(bundle).manifest.graphs.values())
    nodes = (node for path in graphs for node in onnx.load(path, load_external_data=False).graph.node)
    return sum(node.op_type == "MatMulNBits" for node in nodes)


def test_the_format_text_s_app_puts_joined_modules_together(
    root: Path, tiny: GetTiny, exported: Callable[..., Path]
) -> None:
    bundle = exported("bert", quantize="int8")
    assert open_bundle(bundle).manifest.joined
    (code,) = re.findall(r"```python\n(.*?)```", (root / "docs/formats/bundle-1.md").read_text(), re.DOTALL)
    for adapter in ("adapter0", "adapter1"):
        names = {"folder": str(bundle), "name": adapter, "inputs": case("bert")}
        exec(code, names)  # noqa: S102 - the text's own example
        with open_session(bundle) as session:
            session.use(adapter)
            expected = session.run(case("bert"))["logits"]
        np.testing.assert_allclose(names["adapted"][0], expected, rtol=1e-5, atol=1e-6)
        assert np.abs(names["adapted"][0] - names["base"][0]).max() > 1e-3
