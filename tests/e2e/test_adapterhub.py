"""Adapters that the library `adapters` (AdapterHub) saved, from export to swap, against its own unmerged forward."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import pytest
import torch
import transformers

from edgeadapt.addition import add_adapter, verify_bundle
from edgeadapt.bundle import open_bundle
from edgeadapt.errors import AdapterError, BundleError, MergeError, QuantizeError
from edgeadapt.pipeline import export_bundle
from edgeadapt.recipe import Recipe
from edgeadapt.runtime import open_session
from tests.e2e import hub
from tests.e2e.reference import error
from tests.e2e.tiny import DECODER, ENCODER, IMAGE

TOLERANCE = 1e-4
SMALLEST_EFFECT = 1e-2

CONFIGS: Mapping[str, Any] = {
    "seq_bn": adapters.SeqBnConfig(reduction_factor=8),
    "seq_bn_wide": adapters.SeqBnConfig(reduction_factor={"0": 2, "default": 4}),
    "seq_bn_one_layer": adapters.SeqBnConfig(reduction_factor=8, leave_out=[0]),
    "double_seq_bn": adapters.DoubleSeqBnConfig(reduction_factor=8),
    "par_bn": adapters.ParBnConfig(reduction_factor=4),
    "scaled_par_bn": adapters.ParBnConfig(reduction_factor=4, scaling="learned"),
    "compacter": adapters.CompacterConfig(reduction_factor=8),
    "compacterpp": adapters.CompacterPlusPlusConfig(reduction_factor=8, factorized_phm_rule=True),
    "own_rules": adapters.CompacterConfig(reduction_factor=8, shared_phm_rule=False, factorized_phm_W=False),
    # with stochastic depth the library asks for torchvision
    "adapterplus": adapters.AdapterPlusConfig(reduction_factor=8, stochastic_depth=0.0),
    "normalized": adapters.SeqBnConfig(reduction_factor=8, ln_before=True, non_linearity="gelu_new"),
    "leaky": adapters.DoubleSeqBnConfig(reduction_factor=8, non_linearity="leakyrelu"),
}
AS_PICKLE = {"normalized", "double_seq_bn"}  # safetensors refuses what shares memory


@dataclass(frozen=True)
class Family:
    """A tiny base, and the adapters that are tried on it."""

    model: Any
    config: Any
    adapters: tuple[str, ...]


_DISTILBERT = {"vocab_size": 128, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96, "num_labels": 3}
_GPT2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_USUAL = ("seq_bn", "double_seq_bn", "par_bn", "adapterplus")
FAMILIES = {
    "bert": Family(transformers.BertForSequenceClassification, transformers.BertConfig(**ENCODER), tuple(CONFIGS)),
    # with heads below
    "roberta": Family(transformers.RobertaForSequenceClassification, transformers.RobertaConfig(**ENCODER), ()),
    "distilbert": Family(
        *(
            transformers.DistilBertForSequenceClassification,
            transformers.DistilBertConfig(max_position_embeddings=64, **_DISTILBERT),
        ),
        ("seq_bn", "par_bn"),
    ),
    "gpt2": Family(transformers.GPT2LMHeadModel, transformers.GPT2Config(**_GPT2), ("seq_bn", "par_bn")),
    "llama": Family(transformers.LlamaForCausalLM, transformers.LlamaConfig(**DECODER), _USUAL),
    "vit": Family(
        transformers.ViTForImageClassification, transformers.ViTConfig(**IMAGE, num_labels=3), ("adapterplus", "seq_bn")
    ),
}


def fresh(family: Family, base: Path, **options: Any) -> Any:
    return family.model.from_pretrained(base, **options)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, family in FAMILIES.items():
        torch.manual_seed(0)
        model = family.model(family.config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        found[name] = tmp_path_factory.mktemp(name) / "base"
        model.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def saved(bases: dict[str, Path]) -> Any:
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, name: str) -> Path:
        if (family, name) not in made:
            made[family, name] = hub.save(
                fresh(FAMILIES[family], bases[family]),
                CONFIGS[name],
                bases[family].parent / name,
                name=f"{name}_of_mine",
                safe=name not in AS_PICKLE,
                seed=len(name),
            )
        return made[family, name]

    return get


@pytest.fixture(scope="module")
def exported(bases: dict[str, Path], saved: Any) -> Any:
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, quantize: str = "none") -> Path:
        if (family, quantize) not in made:
            folders = tuple(saved(family, name) for name in FAMILIES[family].adapters)
            output = bases[family].parent / f"{quantize}.bundle"
            export_bundle(Recipe(folders, str(bases[family]), output, quantize=quantize))
            made[family, quantize] = output
        return made[family, quantize]

    return get


def case(family: str) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(11)
    if family == "vit":
        return {"pixel_values": generator.standard_normal((2, 3, 32, 32)).astype(np.float32)}
    mask = np.ones((2, 9), np.int64)
    mask[1, 6:] = 0
    inputs = {"input_ids": generator.integers(3, 128, (2, 9)), "attention_mask": mask}
    return {**inputs, "token_type_ids": np.zeros_like(mask)} if family == "bert" else inputs


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.adapters])
def test_every_adapter_equals_the_library_and_goes_without_a_trace(
    family: str, bases: dict[str, Path], saved: Any, exported: Any
) -> None:
    inputs, names = case(family), FAMILIES[family].adapters
    found: dict[str | None, set[bytes]] = {None: set(), **{name: set() for name in names}}
    logits = {}
    with open_session(exported(family)) as session:
        for name in (None, *names, None, *reversed(names), *names):
            session.use(name)
            logits[name] = session.run(inputs)["logits"]
            found[name].add(logits[name].tobytes())
    assert all(len(runs) == 1 for runs in found.values())
    base = hub.forward(fresh(FAMILIES[family], bases[family]), None, inputs)
    assert error(base, logits[None], inputs) <= TOLERANCE
    for name in names:
        folder = saved(family, name)
        model = fresh(FAMILIES[family], bases[family])
        expected = hub.forward(model, folder, inputs, safe=name not in AS_PICKLE)
        assert error(base, expected, inputs) >= SMALLEST_EFFECT, name
        assert error(expected, logits[name], inputs) <= TOLERANCE, name
    assert verify_bundle(exported(family)) == []


def test_the_slots_graph_without_an_adapter_is_the_base(exported: Any) -> None:
    import onnxruntime

    bundle = open_bundle(exported("bert"))
    record = bundle.manifest.graphs["model"]
    plain, slots = (
        onnxruntime.InferenceSession(bundle.file(file), providers=["CPUExecutionProvider"]).run(None, case("bert"))[0]
        for file in (record.plain, record.slots)
    )
    assert np.abs(plain - slots).max() <= 1e-6 * np.abs(plain).max()


@pytest.mark.parametrize("quantize", ["int4"])
def test_a_quantized_base_takes_the_same_adapters(quantize: str, exported: Any, bases: dict[str, Path]) -> None:
    """The bottlenecks stay as they are; q, k and v are still one product with an adapter beside another module."""
    bundle = open_bundle(exported("llama", quantize))
    assert {slot.site.rpartition(".")[2] for slot in bundle.manifest.bottlenecks} == {"o_proj", "down_proj"}
    rows = {row["adapter"]: row for row in bundle.manifest.quality}
    assert set(rows) == {None, *FAMILIES["llama"].adapters}
    assert verify_bundle(bundle.path) == []


def test_added_without_torch(bases: dict[str, Path], exported: Any, saved: Any, tmp_path: Path) -> None:
    """Into a bundle that was made for an adapter of another width."""
    output = tmp_path / "out.bundle"
    export_bundle(Recipe((saved("bert", "seq_bn"),), str(bases["bert"]), output, quantize="none"))
    wide = saved("bert", "seq_bn_wide")
    code = (
        "import sys\nfrom edgeadapt.addition import add_adapter\n"
        "add_adapter(sys.argv[1], sys.argv[2])\n"
        "assert not {'torch', 'adapters', 'transformers', 'peft'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(output), str(wide)], check=True, timeout=120)
    inputs = case("bert")
    with open_session(output) as session, open_session(exported("bert")) as together:
        session.use("seq_bn_wide")
        together.use("seq_bn_wide")
        ours, theirs = session.run(inputs)["logits"], together.run(inputs)["logits"]
    assert error(theirs, ours, inputs) <= 1e-6
    with pytest.raises(BundleError) as caught:
        add_adapter(output, saved("bert", "par_bn"))
    assert str(caught.value) == (
        "adapter 'par_bn' has a bottleneck (relu, reads residual) beside module 'bert.encoder.layer.0.output.dense', "
        "for which this bundle has no slot (it has (relu, reads norm))\n"
        "Hint: export the bundle again together with this adapter, so that its graph has what it needs"
    )


def test_merging_and_pruning_are_refused(bases: dict[str, Path], saved: Any, tmp_path: Path) -> None:
    recipe = {"base": str(bases["bert"]), "output": tmp_path / "x.bundle", "quantize": "none"}
    with pytest.raises(MergeError) as caught:
        export_bundle(Recipe((saved("bert", "seq_bn"),), **recipe, merge=True))
    assert str(caught.value) == (
        "adapter 'seq_bn' cannot be merged: it has bottlenecks ('bert.encoder.layer.0.output.dense' first), whose "
        "activation (relu) is not linear, so they fold into no weight\n"
        "Hint: export without --merge; the adapter then stays beside the base and can be swapped"
    )
    with pytest.raises(QuantizeError) as pruned:
        export_bundle(Recipe((saved("bert", "seq_bn"),), **recipe, prune_kl=0.1))
    assert pruned.value.message == ("adapter 'seq_bn' has bottlenecks, which cannot be pruned: only low-rank terms can")
    assert not (tmp_path / "x.bundle").exists()


HEADS: Mapping[str, Any] = {
    "bert": (adapters.BertAdapterModel, {}),
    "roberta": (adapters.RobertaAdapterModel, {}),
    "distilbert": (adapters.DistilBertAdapterModel, {"activation_function": "relu"}),
}


@pytest.mark.parametrize("family", HEADS)
def test_a_head_by_name_with_other_classes(family: str, bases: dict[str, Path], saved: Any, tmp_path: Path) -> None:
    """A head of an AutoAdapterModel with five classes beside a bundle's adapter with three."""
    model_class, options = HEADS[family]
    inputs = case(family)
    model = model_class.from_pretrained(bases[family])
    model.add_classification_head("five", num_labels=5, id2label=dict(enumerate("abcde")), **options)
    folder = hub.save(model, CONFIGS["double_seq_bn"], tmp_path / "five", name="five")
    output = tmp_path / "out.bundle"
    export_bundle(Recipe((folder, saved(family, "seq_bn")), str(bases[family]), output, quantize="none"))
    expected = hub.forward(model_class.from_pretrained(bases[family]), folder, inputs)
    assert expected.shape == (2, 5)
    with open_session(output) as session:
        session.use("five")
        logits = session.run(inputs)["logits"]
        assert error(expected, logits, inputs) <= TOLERANCE
        session.use("seq_bn")
        assert session.run(inputs)["logits"].shape == (2, 3)
    assert open_bundle(output).manifest.adapters["five"].labels == tuple("abcde")


def test_two_dense_layers_with_another_activation_are_no_head_of_the_base(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    model = adapters.BertAdapterModel.from_pretrained(bases["bert"])
    model.add_classification_head("x", num_labels=2, activation_function="relu")
    folder = hub.save(model, CONFIGS["seq_bn"], tmp_path / "x", name="x")
    with pytest.raises(AdapterError) as caught:
        export_bundle(Recipe((folder,), str(bases["bert"]), tmp_path / "x.bundle", quantize="none"))
    assert str(caught.value) == (
        "adapter 'x': a head of type 'classification' with 2 layers, 'relu' between them and use_pooler False is not "
        "one that base 'base' has for its task\n"
        "Hint: save the adapter with with_head=False, or export it on a base with the same head"
    )


def test_an_incomplete_adapter_is_refused(bases: dict[str, Path], saved: Any, tmp_path: Path) -> None:
    """The library itself leaves what is missing random, and says nothing."""
    folder = saved("bert", "seq_bn_one_layer")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    config = json.loads((broken / "adapter_config.json").read_text())
    config["config"]["leave_out"] = []
    (broken / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError) as caught:
        export_bundle(Recipe((broken,), str(bases["bert"]), tmp_path / "x.bundle", quantize="none"))
    assert str(caught.value) == (
        "adapter 'broken': the adapter's tensors do not fit the layers of base 'base': output_adapter in layer 0 "
        "(missing, or there against leave_out)\n"
        "Hint: the adapter's files are incomplete or damaged, or give the base that the adapter was trained on, loaded "
        "for the same task"
    )
