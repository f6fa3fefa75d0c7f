"""What 4 bits leave of the weights, beside every adapter."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
from safetensors.numpy import load_file, save_file

from edgeadapt.addition import add_adapter, remove_adapter, verify_bundle
from edgeadapt.bundle import RESIDUAL_FILE, open_bundle
from edgeadapt.errors import BundleError
from edgeadapt.runtime import open_session
from tests.e2e.conftest import Exported, Invoke, Tiny, content
from tests.e2e.reference import base_model, case, error, with_peft
from tests.e2e.tiny import save_adapter

GetTiny = Callable[[str], Tiny]


def test_adapters_come_closer_to_torch_and_swap_to_the_bit(exported: Exported, tiny: GetTiny) -> None:
    model, inputs = tiny("llama"), case("llama")
    plain, repaired = (exported("llama", quantize="int4", **more) for more in ({}, {"residual_rank": 8}))
    assert verify_bundle(repaired) == []
    errors = {}
    for path in (plain, repaired):
        bundle = open_bundle(path)
        with open_session(path, threads=1) as session:
            first = {name: session.use(name) or session.run(inputs)["logits"] for name in (None, *bundle.adapter_names)}
            for name in (*reversed(bundle.adapter_names), None):
                session.use(name)
                assert session.run(inputs)["logits"].tobytes() == first[name].tobytes()
        errors[path] = [
            error(with_peft("llama", model.base, folder, inputs), first[folder.name], inputs)
            for folder in model.adapters
        ]
    assert all(after < before for before, after in zip(errors[plain], errors[repaired], strict=True))
    kls = [{row["adapter"]: row["mean_kl"] for row in open_bundle(path).manifest.quality} for path in (plain, repaired)]
    assert kls[0][None] == kls[1][None]
    assert all(kls[1][name] < kls[0][name] for name in kls[0] if name is not None)


def test_it_counts_once_in_blends_and_rows(exported: Exported) -> None:
    """A blend of a with itself is a, whatever is beside it; a weight of 0 leaves the residual alone."""
    inputs = case("llama")
    bundle = open_bundle(exported("llama", quantize="int4", residual_rank=8))
    a, b = bundle.adapter_names
    with open_session(bundle, threads=1) as session:
        session.lend("twin", bundle.adapter_tensors(a))
        session.use(a)
        alone = session.run(inputs)["logits"]
        session.use({a: 0.25, "twin": 0.75})
        assert error(alone, session.run(inputs)["logits"], inputs) < 1e-2
        session.use({a: 0.0})
        nothing = session.run(inputs)["logits"]
        session.use({b: 0.0})
        assert session.run(inputs)["logits"].tobytes() == nothing.tobytes()
        session.use(None)
        assert error(nothing, session.run(inputs)["logits"], inputs) > 1e-2
        rows = session.run(inputs, adapters=[a, b])["logits"]
        session.use(b)
        second = {name: value[1:] for name, value in inputs.items()}
        assert error(session.run(second)["logits"], rows[1:], second) < 1e-2


def test_adapters_that_come_later_have_it_too(copied: Exported, tiny: GetTiny) -> None:
    path = copied("llama", quantize="int4", residual_rank=8)
    model, inputs = tiny("llama"), case("llama")
    name = model.adapters[0].name
    with open_session(path, threads=1) as session:
        session.use(name)
        before = session.run(inputs)["logits"].tobytes()
    add_adapter(path, model.adapters[0], name="again")
    remove_adapter(path, name)
    assert verify_bundle(path) == []
    for share in (False, True):
        with open_session(path, threads=1, share_weights=share) as session:
            session.use("again")
            assert session.run(inputs)["logits"].tobytes() == before


def test_damage_is_found(copied: Exported) -> None:
    path = copied("llama", quantize="int4", residual_rank=8)
    file = path / RESIDUAL_FILE
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    assert [finding.path for finding in verify_bundle(path)][:1] == [RESIDUAL_FILE]
    with open_session(path) as session:
        with pytest.raises(BundleError) as caught:
            session.use(open_bundle(path).adapter_names[0])
        assert str(caught.value).startswith(f"{file} is damaged: its SHA-256 is not the manifest's")
        session.use(None)
        assert np.isfinite(session.run(case("llama"))["logits"]).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--residual-rank", "8"], "residual_rank is 8, and quantize is 'int8'"),
        (["--residual-rank", "0", "--quantize", "int4"], "residual_rank must be at least 1, got 0"),
        (["--residual-rank", "8", "--quantize", "int4", "--merge"], "residual_rank is 8, and the adapter is merged"),
    ],
)
def test_settings_that_are_refused(
    flags: list[str], message: str, tiny: GetTiny, invoke: Invoke, tmp_path: Path
) -> None:
    model = tiny("llama")
    result = invoke("export", model.adapters[0], "--base", model.base, "-o", tmp_path / "out.bundle", *flags)
    assert result.exit_code == 1
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_does_nothing_is_refused_although_the_residual_does(
    copied: Exported, tiny: GetTiny, tmp_path: Path
) -> None:
    path, model = copied("llama", quantize="int4", residual_rank=8), tiny("llama")
    idle = Path(shutil.copytree(model.adapters[0], tmp_path / "idle"))
    file = idle / "adapter_model.safetensors"
    tensors = {key: np.zeros_like(value) if "lora_B" in key else value for key, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    before = content(path)
    with pytest.raises(BundleError) as caught:
        add_adapter(path, idle)
    assert str(caught.value).startswith("adapter 'idle' does nothing: its outputs differ from the base's by 0 of the ")
    assert content(path) == before


def test_a_residual_without_a_slot_is_refused(tiny: GetTiny, invoke: Invoke, tmp_path: Path) -> None:
    model = tiny("llama")
    config = peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])
    ia3 = save_adapter(base_model("llama", model.base), config, tmp_path / "ia3")
    flags = ("--base", model.base, "--quantize", "int4", "--residual-rank", "8", "--quiet")
    result = invoke("export", ia3, *flags, "-o", tmp_path / "out.bundle")
    assert (result.exit_code, result.stdout) == (1, "")
    assert [line for line in result.stderr.splitlines() if not line.startswith("warning: ia3: ")] == [
        "error: residual_rank is 8, and no adapter has a low-rank term at any module: there is no slot for a residual",
        "hint: leave residual_rank out, or export a LoRA adapter too",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["ia3"]
