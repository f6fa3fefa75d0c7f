"""Every weight-space type of peft, swapped and merged, against peft's own unmerged forward."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeadapt.adapters.factor import dense_sites
from edgeadapt.adapters.kinds import peft_layers
from edgeadapt.adapters.read import known_kinds, read_adapters
from edgeadapt.addition import add_adapter
from edgeadapt.errors import AdapterError, MergeError
from edgeadapt.merging.base_model import BaseModel
from edgeadapt.merging.load import load_base_model
from edgeadapt.merging.merge import check_merge, merge
from edgeadapt.pipeline import export_bundle
from edgeadapt.pipeline.inputs import resolve_on
from edgeadapt.recipe import Recipe
from edgeadapt.runtime import Session, open_session
from tests.e2e.conftest import Exported, Tiny, content
from tests.e2e.peft_kinds import LLAMA, OTHERS, Case, save
from tests.e2e.reference import CLOSE, base_model, case, error, forward, with_peft
from tests.parity import Parity

GetTiny = Callable[[str], Tiny]
PARITY = 1e-4
NEEDS_SKLEARN = pytest.mark.skipif(find_spec("sklearn") is None, reason="peft's AdaMSS needs scikit-learn")


def _params(cases: Sequence[Case]) -> list[Any]:
    marks = {"adamss": NEEDS_SKLEARN}
    return [pytest.param(item, id=f"{item.model}-{item.kind}", marks=marks.get(item.kind, ())) for item in cases]


def _possible(item: Case) -> bool:
    return item.kind != "adamss" or find_spec("sklearn") is not None


@dataclass(frozen=True)
class Made:
    """One bundle of the base `model`, with adapters of each type (two on the first base), and a session over it."""

    model: str
    session: Session
    folders: dict[str, tuple[Path, ...]]
    base: BaseModel


@pytest.fixture(scope="module")
def made(
    tiny: GetTiny, tracing_once: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Made]]:
    """Return a function from a base's name to the bundle of all types on it, made once."""
    found: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in found:
            model, folder = tiny(name), tmp_path_factory.mktemp(f"{name}-kinds")
            cases = [item for item in (*LLAMA, *OTHERS) if item.model == name and _possible(item)]
            seeds = (1, 2) if name == "llama" else (1,)
            folders = {
                item.kind: tuple(save(item, model.base, folder / f"{item.kind}-{seed}", seed) for seed in seeds)
                for item in cases
            }
            adapters = tuple(path for pair in folders.values() for path in pair)
            base = load_base_model(model.base, task=model.task)
            with tracing_once():
                bundle = export_bundle(
                    Recipe(adapters, str(model.base), folder / "out.bundle", quantize="none", task=model.task)
                )
            for kind, pair in folders.items():
                assert {bundle.manifest.adapters[path.name].kind for path in pair} == {kind}
            found[name] = Made(name, open_session(bundle), folders, base)
        return found[name]

    yield get
    for one in found.values():
        one.session.close()


@pytest.mark.parametrize("item", _params((*LLAMA, *OTHERS)))
def test_swapped_as_peft_runs_it(item: Case, tiny: GetTiny, made: Callable[[str], Made], parity: Parity) -> None:
    model, inputs, bundle = tiny(item.model), case(item.model), made(item.model)
    plain = forward(base_model(item.model, model.base), inputs)
    names = [None, *(folder.name for folder in bundle.folders[item.kind])]
    found: dict[str | None, set[bytes]] = {name: set() for name in names}
    logits: dict[str | None, np.ndarray] = {}
    for name in (*names, *names[::-1], *names):
        bundle.session.use(name)
        logits[name] = bundle.session.run(inputs)["logits"]
        found[name].add(logits[name].tobytes())
    assert [len(runs) for runs in found.values()] == [1] * len(names)
    assert len(set().union(*found.values())) == len(names)
    assert error(plain, logits[None], inputs) < CLOSE
    for folder in bundle.folders[item.kind]:
        expected = with_peft(item.model, model.base, folder, inputs)
        assert error(plain, expected, inputs) > 1e-2
        errors = {
            "swapped": error(expected, logits[folder.name], inputs),
            "blended": _blended(bundle, folder, expected),
        }
        parity.add(folder, item.model, errors=errors)
        assert max(errors.values()) < PARITY


def _blended(bundle: Made, folder: Path, expected: np.ndarray) -> float:
    """Return how far an adapter is from itself in two parts."""
    name, inputs = folder.name, case(bundle.model)
    bundle.session.lend("twin", bundle.session.bundle.adapter_tensors(name))
    bundle.session.use({name: 0.25, "twin": 0.75})
    found = bundle.session.run(inputs)["logits"]
    bundle.session.use(None)
    bundle.session.evict("twin")
    return error(expected, found, inputs)


@pytest.mark.parametrize("item", _params((*LLAMA, *OTHERS)))
def test_merged_as_peft_runs_it(item: Case, tiny: GetTiny, made: Callable[[str], Made], parity: Parity) -> None:
    bundle = made(item.model)
    inputs = {key: torch.from_numpy(value) for key, value in case(item.model).items()}
    (adapter,) = read_adapters(bundle.folders[item.kind][0])
    resolved = resolve_on(bundle.base, adapter)
    assert item.kind != "ia3" or not dense_sites(resolved)
    merged = merge(bundle.base, resolved)
    worst = check_merge(bundle.base, adapter, merged, [inputs], PARITY)
    parity.add(bundle.folders[item.kind][0], item.model, errors={"merged": worst})
    assert worst < PARITY


@pytest.mark.parametrize("kind", ["boft", "ia3", "ln_tuning"])
def test_exported_merged(kind: str, tiny: GetTiny, tmp_path: Path) -> None:
    model, inputs = tiny("llama"), case("llama")
    (item,) = (item for item in LLAMA if item.kind == kind)
    folder = save(item, model.base, tmp_path / kind, 1)
    bundle = export_bundle(
        Recipe((folder,), str(model.base), tmp_path / "out.bundle", quantize="none", task=model.task, merge=True)
    )
    assert bundle.manifest.merged == kind
    with open_session(bundle) as session:
        logits = session.run(inputs)["logits"]
    assert error(with_peft("llama", model.base, folder, inputs), logits, inputs) < PARITY


def test_every_kind_is_here() -> None:
    assert sorted([*(item.kind for item in LLAMA), "poly"]) == sorted(peft_layers.KINDS)  # Poly is in test_poly.py
    assert peft_layers.KINDS.items() <= known_kinds().items()


# What is refused.

LORA_HINT = "train LoRA, or another type of `edgeadapt list kinds`"
REFUSED = {
    "ADAPTION_PROMPT": (
        "LLaMA-Adapter adds a gated attention to learned tokens in each layer: that is no product with a weight",
        "train prefix tuning, which the key-value cache holds, or LoRA",
    ),
    "LILY": ("Lily's router looks at the whole batch: what one text gives depends on the texts beside it", LORA_HINT),
    "SHADOW": ("Shadow runs a second network beside the base's layers: its change is no weight", LORA_HINT),
    "XLORA": (
        "X-LoRA runs the model twice to weigh its LoRA adapters for each token, and peft saves only a part of it",
        "export its LoRA adapters one by one: a bundle swaps and blends them",
    ),
}


@pytest.mark.parametrize("peft_type", REFUSED)
def test_types_that_are_refused(peft_type: str, tmp_path: Path) -> None:
    assert peft_type in peft.PeftType.__members__
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": peft_type}))
    with pytest.raises(AdapterError) as caught:
        read_adapters(tmp_path)
    reason, hint = REFUSED[peft_type]
    assert str(caught.value) == f"{file}: peft_type {peft_type!r} cannot be exported: {reason}\nHint: {hint}"


def _refusal(folder: Path, base: BaseModel) -> str:
    with pytest.raises(AdapterError) as caught:
        resolve_on(base, read_adapters(folder)[0])
    return str(caught.value)


def _change(folder: Path, **entries: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def test_a_layer_that_is_no_product(tiny: GetTiny, tmp_path: Path) -> None:
    """peft's OFT rotates what a convolution sees as a whole, borders and all: no kernel does that."""
    model = tiny("resnet")
    item = Case("oft", lambda: peft.OFTConfig(r=0, oft_block_size=9, target_modules=["layer.1.convolution"]), "resnet")
    folder = save(item, model.base, tmp_path / "oft", 1)
    assert _refusal(folder, load_base_model(model.base, task=model.task)) == (
        "adapter 'oft': OFT at module 'resnet.encoder.stages.0.layers.0.layer.1.convolution' depends on its input in "
        "another way than a product: its change is no weight\n"
        "Hint: merge the adapter with peft, check the result, and use it as a base"
    )


def test_configs_and_tensors_that_are_refused(tiny: GetTiny, tmp_path: Path) -> None:
    model = tiny("llama")
    base = load_base_model(model.base, task=model.task)
    item = Case("pvera", lambda: peft.PveraConfig(r=8, target_modules=["q_proj"]))
    folder = save(item, model.base, tmp_path / "a", 1)
    _change(folder, strange=7)
    assert _refusal(folder, base) == (
        f"adapter 'a': unknown key 'strange' is set to 7 in adapter_config.json (saved by peft {peft.__version__}): it "
        "may change what is computed\nHint: update peft, or remove the key if it has no effect after training"
    )
    _change(folder, sample_at_inference=True)
    assert _refusal(folder, base) == (
        f"{folder / 'adapter_config.json'}: sample_at_inference is true: it draws random numbers at each run, so no "
        "output is the right one\nHint: set it to false: the adapter is then used at its mean"
    )


def test_damaged_and_idle_adapters_are_refused(tiny: GetTiny, tmp_path: Path) -> None:
    model = tiny("llama")
    base = load_base_model(model.base, task=model.task)
    idle = Case("ia3", lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), noise=0.0)
    folder = save(idle, model.base, tmp_path / "a", 1)
    assert _refusal(folder, base) == (
        "adapter 'a': it changes nothing in base 'base': with it every module computes what it did before\n"
        "Hint: check that it was trained before it was saved"
    )
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = min(tensors)
    tensors[key] = torch.full_like(tensors[key], torch.nan)
    save_file(tensors, file)
    assert _refusal(folder, base) == (
        f"adapter 'a': tensor {key!r} in {file} holds values that are not finite: 64 of 64, the first at [0, 0]\n"
        "Hint: the training diverged or the file is damaged: use an earlier checkpoint"
    )
    del tensors[key]
    save_file(tensors, file)
    with pytest.raises(MergeError) as caught:
        resolve_on(base, read_adapters(folder)[0])
    assert caught.value.message == (
        "peft's copy of adapter 'a' is not the saved one: 1 tensors are not in its file: "
        f"{key.removeprefix('base_model.model.')}"
    )


def test_adding_without_the_base_is_refused(tiny: GetTiny, copied: Exported, tmp_path: Path) -> None:
    (item,) = (item for item in LLAMA if item.kind == "loha")
    folder = save(item, tiny("llama").base, tmp_path / "loha", 1)
    bundle = copied("llama", quantize="none")
    before = content(bundle)
    with pytest.raises(AdapterError) as caught:
        add_adapter(bundle, folder)
    assert str(caught.value) == (
        "adapter 'loha': a loha adapter can only be read together with the float base, which a bundle does not hold\n"
        "Hint: pass the base with --base, or export the bundle again together with it"
    )
    assert content(bundle) == before
