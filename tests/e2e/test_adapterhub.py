"""Adapters that the library `adapters` (AdapterHub) saved, from export to swap, against its own unmerged forward."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import pytest
import torch

from edgeadapt.adapters import read_adapters
from edgeadapt.addition import add_adapter, verify_bundle
from edgeadapt.bundle import open_bundle
from edgeadapt.errors import AdapterError, BundleError, EdgeAdaptError, MergeError, QuantizeError
from edgeadapt.export.cases import parity_cases
from edgeadapt.merging.load import load_base_model
from edgeadapt.merging.merge import check_merge, merge
from edgeadapt.pipeline import export_bundle
from edgeadapt.pipeline.inputs import MERGE_TOLERANCE, resolve_on
from edgeadapt.recipe import Recipe
from edgeadapt.runtime import open_session
from tests.e2e import hub
from tests.e2e.reference import error
from tests.parity import Parity

TOLERANCE = 1e-4
LIBRARY = "adapters"
SMALLEST_EFFECT = 1e-2

CONFIGS, FAMILIES, AS_PICKLE = hub.CONFIGS, hub.FAMILIES, hub.AS_PICKLE
ADDED = "seq_bn_wide"
"""What is held back from BERT's bundle, to be added."""
WEIGHTS = {"lora", "lora_all", "ia3", "ia3_output", "dora", "dora_q", "vera", "vera_k", "dvora", "dvora_q"} | {
    *("mtl_lora", "mtl_lora_one")
}
PLUGIN = "qwen2"
"""The family that the library knows through a plugin interface."""
FIVE = "five"
"""An adapter with a head of five classes from an AutoAdapterModel, in these families' bundles too."""
HEADS: Mapping[str, Any] = {
    "bert": (adapters.BertAdapterModel, {}),
    "roberta": (adapters.RobertaAdapterModel, {}),
    "distilbert": (adapters.DistilBertAdapterModel, {"activation_function": "relu"}),
    "vit": (adapters.ViTAdapterModel, {"layers": 1}),
}


def fresh(family: hub.Family, base: Path, **options: Any) -> Any:
    """Return a base with the attention that the library's prefixes need."""
    return family.model.from_pretrained(base, attn_implementation="eager", **options)


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
            model, config = fresh(FAMILIES[family], bases[family]), name
            if name in hub.SETUPS:
                made[family, name] = hub.save_setup(model, name, bases[family].parent / name, seed=len(name))
                return made[family, name]
            if name == FIVE:
                model_class, options = HEADS[family]
                model, config = model_class.from_pretrained(bases[family]), "double_seq_bn"
                labels = dict(enumerate("abcde"))
                add = model.add_image_classification_head if family == "vit" else model.add_classification_head
                add(f"{name}_of_mine", num_labels=5, id2label=labels, **options)
            made[family, name] = hub.save(
                model,
                CONFIGS[config],
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
            names = tuple(name for name in FAMILIES[family].adapters if name != ADDED)
            names += (FIVE,) if family in HEADS else ()
            folders = tuple(saved(family, name) for name in names)
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


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != PLUGIN])
def test_every_adapter_equals_the_library_and_goes_without_a_trace(
    family: str, bases: dict[str, Path], saved: Any, exported: Any, parity: Parity
) -> None:
    inputs, names = case(family), tuple(name for name in FAMILIES[family].adapters if name != ADDED)
    names += (FIVE,) if family in HEADS else ()
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
        model = (
            fresh(FAMILIES[family], bases[family]) if name != FIVE else HEADS[family][0].from_pretrained(bases[family])
        )
        expected = hub.forward(model, saved(family, name), inputs, safe=name not in AS_PICKLE)
        worst = error(expected, logits[name], inputs)
        assert worst <= TOLERANCE, name
        parity.add(saved(family, name), family, source=LIBRARY, adapter=name, errors={"swapped": worst})
        if name == FIVE:
            assert expected.shape == (2, 5)
        else:
            assert error(base, expected, inputs) >= SMALLEST_EFFECT, name
    bundle = open_bundle(exported(family))
    if family in HEADS:
        assert bundle.manifest.adapters[FIVE].labels == tuple("abcde")
    assert verify_bundle(bundle.path) == []


def test_the_slots_graph_without_an_adapter_is_the_base(exported: Any) -> None:
    import onnxruntime

    bundle = open_bundle(exported("bert"))
    record = bundle.manifest.graphs["model"]
    plain, slots = (
        onnxruntime.InferenceSession(bundle.file(file), providers=["CPUExecutionProvider"]).run(None, case("bert"))[0]
        for file in (record.plain, record.slots)
    )
    assert np.abs(plain - slots).max() <= 1e-6 * np.abs(plain).max()


def test_a_quantized_base_takes_the_same_adapters(exported: Any, saved: Any, parity: Parity) -> None:
    """The bottlenecks stay as they are; q, k and v are still one product with an adapter beside another module.

    On a model that has a plugin interface; what the export compared before it quantized stands in the bundle.
    """
    bundle, names = open_bundle(exported(PLUGIN, "int4")), {None, *FAMILIES[PLUGIN].adapters}
    assert {slot.site.rpartition(".")[2] for slot in bundle.manifest.bottlenecks} == {
        "down_proj",
        "embed_tokens",
        "norm",
    }
    assert {row["adapter"] for row in bundle.manifest.parity["rows"]} == names
    assert bundle.manifest.parity["max_relative_error"] <= TOLERANCE
    for row in bundle.manifest.parity["rows"]:
        if (name := row["adapter"]) is not None:
            errors = {"swapped": row["max_relative_error"]}
            parity.add(saved(PLUGIN, name), PLUGIN, source=LIBRARY, adapter=name, errors=errors)
    assert {row["adapter"] for row in bundle.manifest.quality} == names
    assert verify_bundle(bundle.path) == []


def test_added_without_torch(bases: dict[str, Path], exported: Any, saved: Any, tmp_path: Path) -> None:
    """Into a bundle that was made for adapters of other widths."""
    output = Path(shutil.copytree(exported("bert"), tmp_path / "out.bundle"))
    code = (
        "import sys\nfrom edgeadapt.addition import add_adapter\n"
        "add_adapter(sys.argv[1], sys.argv[2])\n"
        "assert not {'torch', 'adapters', 'transformers', 'peft'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(output), str(saved("bert", ADDED))], check=True, timeout=120)
    inputs = case("bert")
    expected = hub.forward(fresh(FAMILIES["bert"], bases["bert"]), saved("bert", ADDED), inputs)
    with open_session(output) as session:
        session.use(ADDED)
        assert error(expected, session.run(inputs)["logits"], inputs) <= TOLERANCE
    other = hub.save(
        fresh(FAMILIES["bert"], bases["bert"]),
        adapters.SeqBnConfig(reduction_factor=8, non_linearity="tanh"),
        tmp_path / "tanh",
    )
    with pytest.raises(BundleError) as caught:
        add_adapter(output, other)
    assert str(caught.value).startswith(
        "adapter 'tanh' has a bottleneck (tanh, reads norm) beside module 'bert.encoder.layer.0.output.dense', for "
        "which this bundle has no slot (it has (gelu, reads norm), "
    )
    assert caught.value.hint == (
        "export the bundle again together with this adapter, so that its graph has what it needs"
    )


def test_weights_are_added_with_the_float_base_at_hand(
    bases: dict[str, Path], exported: Any, saved: Any, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(exported("roberta"), tmp_path / "out.bundle"))
    folder = hub.save(fresh(FAMILIES["roberta"], bases["roberta"]), adapters.LoRAConfig(r=3), tmp_path / "more", seed=5)
    with pytest.raises(AdapterError) as caught:
        add_adapter(output, folder)
    assert str(caught.value) == (
        "adapter 'more': an adapterhub_lora adapter can only be read together with the float base, which a bundle does "
        "not hold\nHint: pass the base with --base, or export the bundle again together with it"
    )
    add_adapter(output, folder, base=str(bases["roberta"]))
    inputs = case("roberta")
    expected = hub.forward(fresh(FAMILIES["roberta"], bases["roberta"]), folder, inputs)
    with open_session(output) as session:
        session.use("more")
        assert error(expected, session.run(inputs)["logits"], inputs) <= TOLERANCE


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_weights_are_merged(family: str, bases: dict[str, Path], saved: Any, parity: Parity) -> None:
    base = load_base_model(str(bases[family]))
    for name in WEIGHTS & set(FAMILIES[family].adapters):
        (adapter,) = read_adapters(saved(family, name))
        merged = merge(base, resolve_on(base, adapter))
        worst = check_merge(base, adapter, merged, parity_cases(base, ()), MERGE_TOLERANCE)
        assert worst <= MERGE_TOLERANCE
        parity.add(saved(family, name), family, source=LIBRARY, adapter=name, errors={"merged": worst})


def test_merging_and_pruning_are_refused(bases: dict[str, Path], saved: Any, tmp_path: Path) -> None:
    recipe = Recipe((saved("bert", "seq_bn"),), str(bases["bert"]), tmp_path / "x.bundle", quantize="none")
    with pytest.raises(MergeError) as caught:
        export_bundle(dataclasses.replace(recipe, merge=True))
    assert str(caught.value) == (
        "adapter 'seq_bn' cannot be merged: it has bottlenecks ('bert.encoder.layer.0.output.dense' first), whose "
        "activation (relu) is not linear, so they fold into no weight\n"
        "Hint: export without --merge; the adapter then stays beside the base and can be swapped"
    )
    with pytest.raises(QuantizeError) as pruned:
        export_bundle(dataclasses.replace(recipe, prune_kl=0.1))
    assert pruned.value.message == ("adapter 'seq_bn' has bottlenecks, which cannot be pruned: only low-rank terms can")
    assert not (tmp_path / "x.bundle").exists()


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


REFUSED: Mapping[tuple[str, str], tuple[Any, type[EdgeAdaptError], str]] = {
    ("bert", "prefix"): (
        hub.CONFIGS["prefix"],
        AdapterError,
        (
            "adapter 'no': a prefix is held in the key-value cache of a decoder-only language model, and base for "
            "text-classification has none"
        ),
    ),
    ("gpt2", "prefix"): (
        hub.CONFIGS["prefix"],
        AdapterError,
        (
            "adapter 'no': base learns its positions: behind a prefix in the cache a text has other ones than in "
            "AdapterHub, where it begins at position 0"
        ),
    ),
    ("llama", "vera"): (
        hub.CONFIGS["vera"],
        MergeError,
        (
            "the library adapters cannot run adapter 'no' at module 'model.layers.0.self_attn.v_proj': RuntimeError: "
            "mat1 and mat2 shapes cannot be multiplied (32x32 and 64x4)"
        ),
    ),
    ("gpt2", "mtl_lora"): (
        hub.CONFIGS["mtl_lora"],
        MergeError,
        (
            "the library adapters cannot run adapter 'no' at module 'transformer.h.0.attn.c_attn': RuntimeError: "
            "Expected 4-dimensional input for 4-dimensional weight [2, 128, 3, 1], but got 3-dimensional input of size "
            "[1, 6, 1] instead"
        ),
    ),
    ("gpt2", "vera"): (
        hub.CONFIGS["vera"],
        MergeError,
        (
            "the library adapters cannot run adapter 'no' at module 'transformer.h.0.attn.c_attn': AttributeError: "
            "'Vera' object has no attribute 'lora_A'"
        ),
    ),
}


@pytest.mark.parametrize(("family", "name"), REFUSED)
def test_what_cannot_be_is_refused(family: str, name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    config, error_class, message = REFUSED[family, name]
    folder = hub.save(fresh(FAMILIES[family], bases[family]), config, tmp_path / "no", safe=name not in AS_PICKLE)
    with pytest.raises(error_class) as caught:
        export_bundle(Recipe((folder,), str(bases[family]), tmp_path / "x.bundle", quantize="none"))
    assert caught.value.message == message
    assert not (tmp_path / "x.bundle").exists()


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
