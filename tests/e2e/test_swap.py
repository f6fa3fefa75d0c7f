"""Adapters of a bundle against peft itself: swapped, blended, added, removed; every variant of LoRA side by side."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from edgeadapt.addition import add_adapter, remove_adapter, verify_bundle
from edgeadapt.bundle import open_bundle
from edgeadapt.errors import BundleError
from edgeadapt.pipeline import export_bundle
from edgeadapt.recipe import Recipe
from edgeadapt.runtime import Session, open_session
from tests.e2e.conftest import Exported, Tiny, content
from tests.e2e.reference import CLOSE, base_model, case, error, forward, with_peft
from tests.e2e.tiny import ENCODER, save_adapter
from tests.parity import Parity

GetTiny = Callable[[str], Tiny]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_there_and_back_again(name: str, tiny: GetTiny, exported: Exported) -> None:
    bundle, model, inputs = exported(name, quantize="none"), tiny(name), case(name)
    with open_session(bundle) as session:
        found: dict[str | None, list[bytes]] = {None: [], "adapter0": [], "adapter1": []}
        logits = {}
        for adapter in ("adapter0", "adapter1", "adapter0", None, "adapter1", None, "adapter0"):
            session.use(adapter)
            assert session.adapter == adapter
            logits[adapter] = session.run(inputs)["logits"]
            found[adapter].append(logits[adapter].tobytes())
    assert [len(set(runs)) for runs in found.values()] == [1, 1, 1]
    assert len({runs[0] for runs in found.values()}) == 3
    assert error(forward(base_model(name, model.base), inputs), logits[None], inputs) < CLOSE
    for folder in model.adapters:
        assert error(with_peft(name, model.base, folder, inputs), logits[folder.name], inputs) < CLOSE


@pytest.mark.parametrize(("name", "quantize"), [("bert", "none"), ("bert", "int8"), ("resnet", "none")])
def test_the_slots_graph_without_an_adapter_is_the_base(name: str, quantize: str, exported: Exported) -> None:
    bundle = open_bundle(exported(name, quantize=quantize))
    record = bundle.manifest.graphs["model"]
    assert record.slots is not None
    inputs = case(name)
    plain, slots = (
        onnxruntime.InferenceSession(bundle.file(file), providers=["CPUExecutionProvider"]).run(None, inputs)[0]
        for file in (record.plain, record.slots)
    )
    assert np.abs(plain - slots).max() <= 1e-6 * np.abs(plain).max()


def test_a_blend_is_peft_s_weighted_adapter(tiny: GetTiny, exported: Exported, parity: Parity) -> None:
    model, inputs = tiny("llama"), case("llama")
    weights = {"adapter0": 0.7, "adapter1": 0.3}
    tuned = PeftModel.from_pretrained(base_model("llama", model.base), model.adapters[0], adapter_name="adapter0")
    tuned.load_adapter(model.adapters[1], adapter_name="adapter1")
    with open_session(exported("llama", quantize="none")) as session:
        for values in (weights, {"adapter0": 1.5, "adapter1": -0.5}, {"adapter0": 0.25, "adapter1": 0.0}):
            used = {name: value for name, value in values.items() if value}
            tuned.add_weighted_adapter(list(used), list(used.values()), "blend", combination_type="cat")
            tuned.set_adapter("blend")
            expected = forward(tuned, inputs)
            tuned.set_adapter("adapter0")
            tuned.delete_adapter("blend")
            session.use(values)
            blended = error(expected, session.run(inputs)["logits"], inputs)
            parity.add(model.adapters[0], "llama", adapter="LoRA", errors={"blended": blended})
            assert blended < CLOSE
        session.use({"adapter1": 1.0})
        one = session.run(inputs)["logits"]
        session.use("adapter1")
        assert session.run(inputs)["logits"].tobytes() == one.tobytes()


def test_a_blend_with_heads_is_the_sum_of_the_changes(tiny: GetTiny, exported: Exported) -> None:
    model, inputs, weights = tiny("bert"), case("bert"), {"adapter0": 1.75, "adapter1": -0.75}
    blended = base_model("bert", model.base)
    total = {key: value.clone().double() for key, value in blended.state_dict().items()}
    for folder in model.adapters:
        merged = PeftModel.from_pretrained(base_model("bert", model.base), folder).merge_and_unload().state_dict()
        for key, value in blended.state_dict().items():
            total[key] += weights[folder.name] * (merged[key].double() - value.double())
    blended.load_state_dict(total)
    with open_session(exported("bert", quantize="none")) as session:
        session.use(weights)
        assert session.adapter == weights
        assert error(forward(blended, inputs), session.run(inputs)["logits"], inputs) < CLOSE
        with pytest.raises(BundleError) as caught:
            session.use({"adapter0": 0.5, "adapter1": 0.25})
        assert session.adapter == weights
    assert str(caught.value) == (
        "'classifier.bias' is replaced with weights that do not add up to 1, and the base's own value is not at hand\n"
        "Hint: choose weights that add up to 1"
    )


VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"r": 4, "use_rslora": True, "target_modules": ["query", "value"]},
    "dora": {"r": 4, "use_dora": True, "target_modules": ["query", "dense"]},
    "patterns": {
        "r": 4,
        "target_modules": ["query", "key"],
        "rank_pattern": {"layer.1.attention.self.query": 8, "key": 2},
        "alpha_pattern": {"layer.0.attention.self.query": 40},
    },
    "lora-bias": {"r": 3, "lora_bias": True, "target_modules": ["query"]},
    "all-biases": {"r": 2, "bias": "all", "target_modules": ["value"]},
    "on-the-head": {"r": 2, "target_modules": ["query", "classifier"], "use_dora": True},
    "own-biases": {"r": 2, "bias": "lora_only", "target_modules": ["value"]},
    "embedding": {"r": 4, "target_modules": ["word_embeddings", "query"]},
    "three": {"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"]},
    "five": {"r": 2, "target_modules": ["key"], "modules_to_save": ["classifier"]},
    "1": {"r": 2, "target_modules": ["query"]},
}
LABELS = {
    "rslora": "rsLoRA",
    "dora": "DoRA",
    "patterns": "LoRA, rank and alpha patterns",
    "lora-bias": "LoRA with lora_bias",
    "all-biases": "LoRA and all biases",
    "on-the-head": "DoRA on a head",
    "own-biases": "LoRA and its modules' biases",
    "embedding": "LoRA on embeddings",
    "three": "LoRA and a head",
    "five": "LoRA and a head of another size",
    "1": "LoRA",
}


def test_every_variant_in_one_bundle(tmp_path: Path, parity: Parity) -> None:
    """Eleven adapters of one base, also with heads of other sizes, and one whose name is part of a module's path."""
    torch.manual_seed(0)
    base = tmp_path / "base"
    transformers.BertForSequenceClassification(transformers.BertConfig(**ENCODER)).save_pretrained(base)
    adapters = {}
    for index, (name, config) in enumerate(VARIANTS.items()):
        torch.manual_seed(index)
        labels = {"num_labels": 5, "ignore_mismatched_sizes": True} if name == "five" else {}
        model = base_model("bert", base, **labels)
        adapters[name] = save_adapter(model, LoraConfig(lora_alpha=8, **config), tmp_path / name)

    output = tmp_path / "all.bundle"
    bundle = export_bundle(Recipe(tuple(adapters.values()), str(base), output, quantize="none"))

    assert bundle.adapter_names == tuple(sorted(VARIANTS))
    assert verify_bundle(output) == []
    inputs = case("bert")
    seen = set()
    with open_session(bundle) as session:
        for name, folder in adapters.items():
            labels = {"num_labels": 5, "ignore_mismatched_sizes": True} if name == "five" else {}
            torch.manual_seed(12345)
            expected = with_peft("bert", base, folder, inputs, **labels)
            session.use(name)
            logits = session.run(inputs)["logits"]
            assert logits.shape == (2, 5 if name == "five" else 3)
            parity.add(folder, "bert", adapter=LABELS[name], errors={"swapped": error(expected, logits, inputs)})
            assert error(expected, logits, inputs) < CLOSE, name
            seen.add(logits.tobytes())
    assert len(seen) == len(VARIANTS)


def test_several_adapters_in_one_folder(tiny: GetTiny, tmp_path: Path, traced_once: None) -> None:
    model, inputs = tiny("llama"), case("llama")
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    tuned = get_peft_model(base_model("llama", model.base), config)
    tuned.add_adapter("second", LoraConfig(r=3, target_modules=["v_proj"]))
    tuned.add_adapter("third", config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    tuned.save_pretrained(tmp_path / "first")

    bundle = export_bundle(Recipe((tmp_path / "first",), str(model.base), tmp_path / "out.bundle", quantize="none"))

    assert bundle.adapter_names == ("first", "second", "third")
    with open_session(bundle) as session:
        for name, saved in (("first", "default"), ("second", "second"), ("third", "third")):
            tuned.set_adapter(saved)
            session.use(name)
            assert error(forward(tuned, inputs), session.run(inputs)["logits"], inputs) < CLOSE


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama-tied", (["embed_tokens", "lm_head"], ["lm_head"], ["embed_tokens", "q_proj"])),
        ("gpt2", ()),
        ("resnet", ()),
    ],
)
def test_other_layers_equal_peft(
    name: str, targets: tuple[list[str], ...], tiny: GetTiny, tmp_path: Path, traced_once: None
) -> None:
    """Embeddings and tied heads, GPT-2's Conv1D, convolutions."""
    model, inputs = tiny(name), case(name)
    adapters = list(model.adapters) if not targets else []
    for index, target in enumerate(targets):
        torch.manual_seed(index)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=target)
        adapters.append(save_adapter(base_model(name, model.base), config, tmp_path / f"tied{index}"))
    bundle = export_bundle(
        Recipe(tuple(adapters), str(model.base), tmp_path / "out.bundle", task=model.task, quantize="none")
    )
    with open_session(bundle) as session:
        base = session.run(inputs)["logits"]
        for folder in adapters:
            session.use(folder.name)
            logits = session.run(inputs)["logits"]
            assert error(with_peft(name, model.base, folder, inputs), logits, inputs) < CLOSE
            assert error(base, logits, inputs) > 1e-3


# Bytes.


def test_the_same_input_gives_the_same_bytes(
    tiny: GetTiny, exported: Exported, start: Callable[..., Any], tmp_path: Path
) -> None:
    """Here and in another process, with other hashes of texts."""
    model = tiny("llama")
    out = tmp_path / "llama.bundle"
    process = start(
        "export", *model.adapters, "--base", model.base, "-o", out, "--task", model.task, PYTHONHASHSEED="4711"
    )
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    expected, found = content(exported("llama")), content(out)
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []


def test_adding_later_gives_the_bytes_of_exporting_both(tiny: GetTiny, exported: Exported, tmp_path: Path) -> None:
    model = tiny("llama")
    both = content(exported("llama"))
    bundle = tmp_path / "llama.bundle"
    shutil.copytree(exported("llama", adapters=model.adapters[:1]), bundle)
    added = add_adapter(bundle, model.adapters[1])
    assert added.adapter_names == ("adapter0", "adapter1")
    found = content(bundle)
    assert found.keys() == both.keys()
    assert [name for name in both if both[name] != found[name]] == ["manifest.json"]
    one, other = (json.loads(files["manifest.json"]) for files in (both, found))
    assert {key for key in one if one[key] != other[key]} == {"digest", "parity", "quality"}
    assert verify_bundle(bundle) == []


HEAVY = ("torch", "transformers", "peft", "onnx", "onnx_ir", "onnxscript", "optimum")


def test_adding_and_running_need_no_torch(tiny: GetTiny, copied: Exported) -> None:
    model = tiny("llama")
    bundle = copied("llama", adapters=tiny("llama").adapters[:1])
    code = (
        "import sys\n"
        "from edgeadapt.addition import add_adapter, verify_bundle\n"
        "from edgeadapt.runtime import open_session\n"
        f"add_adapter({str(bundle)!r}, {str(model.adapters[1])!r})\n"
        f"assert verify_bundle({str(bundle)!r}) == []\n"
        f"with open_session({str(bundle)!r}) as session:\n"
        "    session.use('adapter1')\n"
        "    print(session.run({'input_ids': [[3, 4]]})['logits'].shape)\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "(1, 2, 128)\n[]\n"), result.stderr


def run(session: Session, adapter: str | None) -> bytes:
    session.use(adapter)
    return bytes(session.run(case("llama"))["logits"].tobytes())


def test_removing_and_adding_again(tiny: GetTiny, copied: Exported) -> None:
    model, bundle = tiny("llama"), copied("llama")
    before = content(bundle)
    with open_session(bundle) as session:
        outputs = run(session, "adapter1")
        base = run(session, None)
    removed = remove_adapter(bundle, "adapter1")
    assert removed.adapter_names == ("adapter0",)
    assert not (bundle / "adapters" / "adapter1").exists()
    assert verify_bundle(bundle) == []
    remove_adapter(bundle, "adapter0")
    with open_session(bundle) as session:
        assert session.adapters == ()
        assert run(session, None) == base
    for adapter in model.adapters:
        add_adapter(bundle, adapter)
    after = content(bundle)
    assert [name for name in before if before[name] != after.get(name)] == []
    with open_session(bundle) as session:
        assert run(session, "adapter1") == outputs


def test_replacing_an_adapter(tiny: GetTiny, copied: Exported) -> None:
    model, bundle = tiny("llama"), copied("llama")
    changed = add_adapter(bundle, model.adapters[0], name="adapter1", force=True)
    assert changed.adapter_names == ("adapter0", "adapter1")
    with open_session(changed) as session:
        assert run(session, "adapter1") == run(session, "adapter0")
    assert verify_bundle(bundle) == []
