"""`export --patches`: adapters with patches, measured and gated, and the patched weights to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from edgeadapt.adapters.read import read_adapters
from edgeadapt.adapters.resolve import resolve
from edgeadapt.addition import golden_inputs, verify_bundle
from edgeadapt.bundle import open_bundle, write_patched
from edgeadapt.merging.fingerprint import stamp_base
from edgeadapt.merging.load import load_base_model
from edgeadapt.merging.merge import merge
from edgeadapt.runtime import open_session
from tests.e2e.conftest import Exported, Invoke, Tiny

GetTiny = Callable[[str], Tiny]
Array = np.ndarray[Any, Any]


def quieter(adapter: Path, share: float = 0.02) -> None:
    """Scale an adapter down to what training does: a change far smaller than the weights."""
    file = adapter / "adapter_model.safetensors"
    tensors = {name: value * (share if "lora_B" in name else 1) for name, value in load_file(file).items()}
    save_file({name: value.astype(np.float32) for name, value in tensors.items()}, file, {"format": "pt"})


@pytest.fixture(scope="module")
def small(tiny: GetTiny, tmp_path_factory: pytest.TempPathFactory) -> GetTiny:
    """Return tiny models whose adapters change little."""
    made: dict[str, Tiny] = {}

    def get(name: str) -> Tiny:
        if name not in made:
            model = tiny(name)
            folder = tmp_path_factory.mktemp(f"small-{name}")
            adapters = [Path(shutil.copytree(path, folder / path.name)) for path in model.adapters]
            for path in adapters:
                quieter(path)
            made[name] = Tiny(model.base, (adapters[0], adapters[1]), model.task)
        return made[name]

    return get


def stored(folder: Path, file: str) -> dict[str, Array]:
    model = ir.load(folder / file)
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}


def unpacked(values: Array, bits: int) -> Array:
    """Return one code a byte along the last axis."""
    return values if bits == 8 else np.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:-1], -1)


@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8), ("int4", 4)])
def test_patched_weights_are_the_merged_float_weights_on_the_base_s_grid(
    scheme: str, bits: int, small: GetTiny, exported: Exported, tmp_path: Path
) -> None:
    model = small("llama")
    path = exported("llama", adapters=model.adapters, quantize=scheme, patches=True)
    bundle = open_bundle(path)
    base = load_base_model(model.base, task=model.task)
    old = stored(path / "graph", "decoder.plain.onnx")
    for index, folder in enumerate(model.adapters):
        out = tmp_path / str(index)
        out.mkdir()
        write_patched(bundle, f"adapter{index}", out)
        new = stored(out, "decoder.plain.onnx")
        adapter = read_adapters(folder)[0]
        merged = merge(base, resolve(adapter, base.modules, base_name=base.name)).module
        changed = {name for name in new if not np.array_equal(new[name], old[name])}
        assert changed
        for name in (name for name in new if (name.endswith(".codes") and f".int{bits}" in name) or "+" in name):
            if not name.endswith(".codes"):
                continue
            prefix = name.removesuffix(".codes")
            sites = prefix.removesuffix(f".int{bits}")
            first, _, rest = sites.partition("+")
            parent = first.rpartition(".")[0]
            paths = [first, *(f"{parent}.{part}" for part in rest.split("+") if part)]
            weight = np.concatenate([merged.get_parameter(f"{p}.weight").detach().numpy() for p in paths])
            scales = new[f"{prefix}.scales"].reshape(len(weight), -1, 1)
            zeros: Any = 2 ** (bits - 1)
            if f"{prefix}.zero_points" in new:
                zeros = unpacked(new[f"{prefix}.zero_points"].reshape(len(weight), -1), bits)
                zeros = zeros[:, : scales.shape[1], None].astype(np.float32)
            blocks = np.zeros((len(weight), scales.shape[1] * 32), np.float32)
            blocks[:, : weight.shape[1]] = weight
            grouped = blocks.reshape(len(weight), -1, 32)
            expected = np.clip(np.rint(grouped / scales) + zeros, 0, 2**bits - 1).astype(np.uint8)
            np.testing.assert_array_equal(unpacked(new[name], bits).reshape(expected.shape), expected, err_msg=name)


def test_both_forms_are_measured_gated_and_close(
    small: GetTiny, exported: Exported, invoke: Invoke, tmp_path: Path
) -> None:
    model = small("llama")
    path = exported("llama", adapters=model.adapters, quantize="int8", patches=True)
    rows = {(row["adapter"], row["promoted"]): row for row in open_bundle(path).manifest.quality}
    assert set(rows) == {(None, False), *((f"adapter{i}", form) for i in (0, 1) for form in (False, True))}
    assert 0 < rows["adapter0", True]["mean_kl"] < 1e-3
    assert verify_bundle(path) == []
    described = json.loads(invoke("inspect", path, "--json").stdout)
    patch = described["patches"]["adapter1"]
    assert 0 < patch["changed"] < patch["codes"]
    assert patch["entropy_bytes"] > 0
    assert described["bytes"]["patch"] == sum(p["bytes"] for p in described["patches"].values())
    limit = (rows["adapter0", True]["mean_kl"] + rows["adapter0", False]["mean_kl"]) / 2
    flags = ("--quantize", "int8", "--patches", "--max-kl", limit, "--quiet")
    result = invoke("export", *model.adapters, "--base", model.base, "-o", tmp_path / "out.bundle", *flags)
    assert result.exit_code == 1
    assert "(promoted) has a mean KL of" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "resnet", "t5", "whisper"])
def test_promoted_answers_are_those_of_the_adapter(
    name: str,
    small: GetTiny,
    exported: Exported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EDGEADAPT_CACHE_DIR", str(tmp_path / "cache"))
    path = exported(name, adapters=small(name).adapters, quantize="int8", patches=True)
    with open_session(path, threads=1) as session:
        inputs = golden_inputs(session)
        base = session.run(inputs)["logits"]
        session.use("adapter1")
        expected = session.run(inputs)["logits"]
        session.promote("adapter1", wait=True)
        found = session.run(inputs)["logits"]
        assert session.form == "promoted"
    # Rounding differs between the forms, and some of these adapters do little more than rounding does: what counts is
    # that all of the adapter's effect is there.
    effect, moved = (expected - base).ravel(), (found - base).ravel()
    assert moved @ effect / (effect @ effect) == pytest.approx(1, abs=0.4)


def test_an_adapter_that_cannot_have_a_patch_is_named_with_the_reason(
    small: GetTiny, tiny: GetTiny, invoke: Invoke, tmp_path: Path, traced_once: None
) -> None:
    model, out = small("llama-tied"), tmp_path / "out.bundle"
    flags = ("--base", model.base, "-o", out, "--quantize", "int8", "--patches")
    result = invoke("export", *model.adapters, *flags)
    assert result.exit_code == 0, result.stderr
    said = " ".join(result.stderr.split())
    assert (
        "adapter0 has no patch and cannot be promoted: the weight of model.embed_tokens is that of lm_head too, "
        "and only one of them changes" in said
    )
    bundle = open_bundle(out)
    assert [bundle.has_patch(name) for name in ("adapter0", "adapter1")] == [False, True]
    loud = tiny("llama")
    flags = ("--base", loud.base, "-o", tmp_path / "loud.bundle", "--quantize", "int8", "--patches", "--quiet")
    result = invoke("export", loud.adapters[0], *flags)
    assert result.exit_code == 1
    assert "no adapter can have a patch: adapter0: its change is too large for the base's scales" in result.stderr
    assert not (tmp_path / "loud.bundle").exists()


def test_adding_makes_no_patch_and_says_so(
    small: GetTiny, exported: Exported, copied: Exported, invoke: Invoke, tmp_path: Path
) -> None:
    model = small("llama")
    path = copied("llama", adapters=model.adapters, quantize="int8", patches=True)
    stamp_base(model.adapters[1], load_base_model(model.base, task=model.task))
    result = invoke("add", path, model.adapters[1], "--name", "third")
    assert result.exit_code == 0, result.stderr
    said = " ".join(result.stderr.split())
    assert "third has no patch and cannot be promoted: only an export makes patches, from the float base" in said
    bundle = open_bundle(path)
    assert [bundle.has_patch(name) for name in ("adapter0", "adapter1", "third")] == [True, True, False]
    assert invoke("remove", path, "adapter0").exit_code == 0
    assert not any("adapter0" in file for file in open_bundle(path).manifest.files)
    assert verify_bundle(path) == []
