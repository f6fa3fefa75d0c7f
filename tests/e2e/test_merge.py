"""Merged bundles against peft's unmerged forward, and adapters that were trained on a 4-bit base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from edgeadapt.bundle import open_bundle
from edgeadapt.merging.fingerprint import stamp_base
from edgeadapt.merging.load import load_base_model
from edgeadapt.merging.nf4 import as_trained_on_nf4
from edgeadapt.runtime import open_session
from tests.e2e.conftest import Exported, Invoke, Tiny, content
from tests.e2e.reference import CLOSE, base_model, case, error, forward, with_peft
from tests.e2e.tiny import DECODER
from tests.parity import Parity

GetTiny = Callable[[str], Tiny]


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "bert", "resnet"])
def test_a_merged_bundle_equals_peft_unmerged(name: str, tiny: GetTiny, exported: Exported, parity: Parity) -> None:
    model, inputs = tiny(name), case(name)
    bundle = open_bundle(exported(name, adapters=model.adapters[:1], merge=True, quantize="none"))

    manifest = bundle.manifest
    assert (manifest.merged, manifest.adapters, manifest.slots, manifest.parameters) == ("adapter0", {}, (), ())
    assert not any("slots" in path or path.startswith("adapters/") for path in content(bundle.path))
    assert manifest.parity["merge"]["adapter"] == "adapter0"
    assert manifest.parity["merge"]["base"] == "original"
    assert manifest.parity["merge"]["max_relative_error"] < CLOSE

    with open_session(bundle) as session:
        assert session.adapter == "adapter0"
        logits = session.run(inputs)["logits"]
        session.use("adapter0")  # its own name is no error
        assert session.run(inputs)["logits"].tobytes() == logits.tobytes()
    merged = error(with_peft(name, model.base, model.adapters[0], inputs), logits, inputs)
    parity.add(model.adapters[0], name, adapter="LoRA", errors={"merged": merged})
    assert merged < CLOSE
    assert error(forward(base_model(name, model.base), inputs), logits, inputs) > 1e-2


@pytest.mark.parametrize("quantize", ["int8", "fp16"])
def test_a_merged_bundle_can_be_quantized(quantize: str, tiny: GetTiny, exported: Exported) -> None:
    model, inputs = tiny("llama"), case("llama")
    path = exported("llama", adapters=model.adapters[:1], merge=True, quantize=quantize)
    plain = exported("llama", adapters=model.adapters[:1], merge=True, quantize="none")
    (row,) = open_bundle(path).manifest.quality
    assert (row["scheme"], row["positions"]) == (quantize, 744)
    assert 0 < row["mean_kl"] < 1e-3
    sizes = [(folder / "graph" / "weights.bin").stat().st_size for folder in (path, plain)]
    assert sizes[0] < (0.4 if quantize == "int8" else 0.6) * sizes[1]
    with open_session(path) as session:
        logits = session.run(inputs)["logits"]
    expected = with_peft("llama", model.base, model.adapters[0], inputs)
    assert 1e-7 < error(expected, logits, inputs) < 0.1


# An adapter that was trained on a base in NF4.


@pytest.fixture
def qlora(tiny: GetTiny, tmp_path: Path) -> Path:
    """The first adapter, stamped with the NF4 base, as the training program has it at hand."""
    model = tiny("llama")
    folder = Path(shutil.copytree(model.adapters[0], tmp_path / "qlora"))
    stamp_base(folder, load_base_model(model.base, quantize_as="nf4"))
    assert json.loads((folder / "base_fingerprint.json").read_text())["quantization"] == "nf4"
    return folder


def dequantized(base: Path) -> Any:
    """Return the model as bitsandbytes computes with it: all linear layers but the output embedding in NF4."""
    model = transformers.LlamaForCausalLM.from_pretrained(base, attn_implementation="eager")
    with torch.no_grad():
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and path != "lm_head":
                module.weight.copy_(as_trained_on_nf4(module.weight))
    return model


@pytest.mark.parametrize("flags", [(), ("--merge-base", "dequantized"), ("--merge-base", "original")])
def test_a_qlora_adapter_goes_into_the_base_that_it_was_trained_on(
    flags: tuple[str, ...], invoke: Invoke, tiny: GetTiny, qlora: Path, tmp_path: Path, traced_once: None
) -> None:
    base, inputs, out = tiny("llama").base, case("llama"), tmp_path / "out.bundle"
    result = invoke("export", qlora, "--base", base, "-o", out, "--merge", "--quantize", "none", "--json", *flags)
    assert result.exit_code == 0, result.stderr
    record: Mapping[str, Any] = json.loads(result.stdout)["parity"]["merge"]
    with open_session(out) as session:
        logits = session.run(inputs)["logits"]
    rounded = forward(PeftModel.from_pretrained(dequantized(base), qlora), inputs)
    original = with_peft("llama", base, qlora, inputs)
    assert error(rounded, original, inputs) > 1e-2  # which of the two it is can be told
    if "original" in flags:
        assert record["base"] == "original"
        assert error(original, logits, inputs) < CLOSE
    else:
        assert record["base"] == "nf4"
        assert record["nf4_error_to_change"].startswith("rounding of the base against the adapter's change: median ")
        assert record["nf4_error_to_change"].endswith(" in 14 modules")
        assert error(rounded, logits, inputs) < CLOSE


def test_a_qlora_adapter_can_be_swapped_and_added(
    invoke: Invoke, tiny: GetTiny, qlora: Path, exported: Exported, copied: Exported, tmp_path: Path, traced_once: None
) -> None:
    """On the base as given. The stamp is checked by what NF4 does not round, also without the base's weights."""
    model, inputs, out = tiny("llama"), case("llama"), tmp_path / "out.bundle"
    result = invoke("export", qlora, "--base", model.base, "-o", out, "--quantize", "none", "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")
    bundle = copied("llama", quantize="none")
    assert invoke("add", bundle, qlora).exit_code == 0
    expected = with_peft("llama", model.base, qlora, inputs)
    for path in (out, bundle):
        assert open_bundle(path).manifest.adapters["qlora"].base_checked == "stamp"
        with open_session(path) as session:
            session.use("qlora")
            assert error(expected, session.run(inputs)["logits"], inputs) < CLOSE
    torch.manual_seed(99)
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))
    other.save_pretrained(tmp_path / "other")
    result = invoke("export", qlora, "--base", tmp_path / "other", "-o", tmp_path / "wrong.bundle", "--quiet")
    assert result.exit_code == 1
    assert result.stderr.startswith(
        "error: adapter 'qlora': the base is not the one that the adapter was trained on: tensor "
        "'model.embed_tokens.weight' has digest "
    )
    assert not (tmp_path / "wrong.bundle").exists()
