"""AdapterHub's ReFT: what is read, what is refused with which words, and R as torch makes it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrizations

from edgeadapt.adapters import describe, read_adapters
from edgeadapt.adapters.adapter import ResolvedAdapter
from edgeadapt.adapters.kinds import _reft_tensors
from edgeadapt.adapters.resolve import resolve
from edgeadapt.errors import AdapterError
from edgeadapt.merging.modules import target_modules

SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
LLAMA = {**SMALL, "num_key_value_heads": 2}
LAYER = "bert.encoder.layer.0.reft_layer.refts.task"
FILE = "adapter.safetensors"


def bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))


def save(model: Any, config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    logging.getLogger("adapters").setLevel(logging.CRITICAL)
    adapters.init(model)
    model.add_adapter("task", config=config)
    model.save_adapter(str(folder), "task", use_safetensors=True)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(bert(), adapters.LoReftConfig(r=2, suffix_positions=1), tmp_path_factory.mktemp("reft") / "a")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "mine"))


def settings(folder: Path, **entries: Any) -> None:
    file = folder / "adapter_config.json"
    content = json.loads(file.read_text())
    content["config"].update(entries)
    file.write_text(json.dumps(content))


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    found = load_file(folder / FILE)
    change(found)
    save_file(found, folder / FILE)


def resolved(folder: Path, model: Any) -> ResolvedAdapter:
    (adapter,) = read_adapters(folder)
    return resolve(adapter, target_modules(model), base_name="small")


def refusal(folder: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        read_adapters(folder)
    return caught.value.message.replace(f"{folder}", "FOLDER")


def test_what_it_is(folder: Path) -> None:
    (adapter,) = read_adapters(folder)
    assert adapter.kind == "adapterhub_reft"
    assert not any("DiReFT" in warning for warning in adapter.warnings)
    described = describe(adapter)
    assert described["positions"] == {"first": 3, "last": 1}
    assert (described["rank"], described["layers"], described["orthogonal"]) == (2, [0, 1], True)
    assert described["merge"]["exact"] is False
    assert "classifier" in described["modules_to_save"]


def test_a_file_that_may_be_direft_says_so(tmp_path: Path) -> None:
    folder = save(bert(), adapters.DiReftConfig(), tmp_path / "a")
    (adapter,) = read_adapters(folder)
    assert sum("trained as DiReFT" in warning for warning in adapter.warnings) == 1
    assert describe(adapter)["subtract_projection"] is True
    settings(folder, subtract_projection=False)
    (adapter,) = read_adapters(folder)
    assert not any("DiReFT" in warning for warning in adapter.warnings)
    assert describe(adapter)["subtract_projection"] is False


def test_an_adapter_of_a_model_that_writes_says_what_to_compare_with(tmp_path: Path) -> None:
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    (adapter,) = read_adapters(save(llama, adapters.LoReftConfig(), tmp_path / "a"))
    (warning,) = (warning for warning in adapter.warnings if "cache" in warning)
    assert warning == (
        "it acts on the first positions of a text, as in the library's forward over a whole text; with a key-value "
        "cache the library takes each new token for the first one: compare with use_cache=False"
    )
    (other,) = read_adapters(save(bert(), adapters.LoReftConfig(), tmp_path / "b"))
    assert not any("cache" in warning for warning in other.warnings)


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"magic": 1}, "magic is 1, a setting that edgeadapt does not know"),
    "flag": ({"tied_weights": 1}, "tied_weights is 1, not true or false"),
    "rank": ({"r": 0}, "r is 0, not a whole number of at least 1"),
    "positions": ({"prefix_positions": "3"}, "prefix_positions is '3', not a whole number of at least 0"),
    "nowhere": ({"prefix_positions": 0, "suffix_positions": 0}, "it is for no position: the adapter does nothing"),
    "no output": ({"output_reft": False}, "output_reft is false: the adapter does nothing"),
    "layers": ({"layers": "even"}, "layers is 'even', not 'all' or a list of layers"),
    "activation": ({"non_linearity": "mish"}, "non_linearity is 'mish', which is not supported"),
    "half": (
        {"dtype": "float16"},
        "dtype is 'float16': the library computes with it in that precision and on a base in it alone",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_are_refused(name: str, folder: Path) -> None:
    entries, message = SETTINGS[name]
    settings(folder, **entries)
    assert refusal(folder) == f"FOLDER/adapter_config.json: {message}"


def test_tensors_that_are_refused(folder: Path, original: Path) -> None:
    key = f"{LAYER}.units.1.learned_source.bias"
    tensors(folder, lambda found: found.pop(key))
    assert refusal(folder) == f"tensor '{key.replace('.task.', '.')}' is missing in FOLDER/{FILE}"
    shutil.copy(original / FILE, folder)
    tensors(folder, lambda found: found.update({key: torch.zeros(3)}))
    assert refusal(folder) == f"tensor '{key}' in FOLDER/{FILE} is [3]; with r = 2 it would be [2]"
    shutil.copy(original / FILE, folder)
    settings(folder, tied_weights=True)
    assert refusal(folder) == f"tensor '{key}' in FOLDER/{FILE} does not fit its config"
    settings(folder, tied_weights=False, orthogonality=False)
    assert refusal(folder) == (
        f"tensor '{LAYER.replace('.task', '')}.units.0.projection.weight' is missing in FOLDER/{FILE}"
    )
    settings(folder, orthogonality=True)
    tensors(folder, lambda found: found[key].fill_(torch.nan))
    with pytest.raises(AdapterError) as caught:
        resolved(folder, bert())
    assert f"tensor '{key}' in {folder / FILE} holds values that are not finite" in str(caught.value)


def test_layers_that_do_not_fit(folder: Path, original: Path, tmp_path: Path) -> None:
    settings(folder, layers=[1])
    with pytest.raises(AdapterError) as caught:
        resolved(folder, bert())
    assert caught.value.message == (
        "adapter 'mine': the adapter's tensors do not fit the layers of base 'small': 0 (missing, or there against "
        "layers = [1])"
    )
    other = transformers.BertForSequenceClassification(transformers.BertConfig(**{**SMALL, "hidden_size": 8}))
    with pytest.raises(AdapterError) as caught:
        resolved(original, other)
    assert caught.value.message == (
        f"adapter 'a': tensor '{LAYER}.units.0.learned_source.weight' reads 16 values; the base's module "
        "'bert.encoder.layer.0.output.LayerNorm' gives 8"
    )
    wide = save(bert(), adapters.LoReftConfig(r=16), tmp_path / "wide")
    with pytest.raises(AdapterError) as caught:
        resolved(wide, bert())
    assert caught.value.message == (
        "adapter 'wide': r is 16 and the layers are 16 wide: so many orthogonal rows are made in another way"
    )


def test_bases_that_cannot_take_it(original: Path, tmp_path: Path) -> None:
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    folder = save(llama, adapters.NoReftConfig(suffix_positions=2), tmp_path / "b")
    with pytest.raises(AdapterError) as caught:
        resolved(folder, transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)))
    assert str(caught.value) == (
        "adapter 'b': suffix_positions is 2, and base 'small' writes texts, in which a position is the last one only "
        "until the next token; with a key-value cache the library itself fails\n"
        "Hint: train it with suffix_positions=0"
    )
    with pytest.raises(AdapterError) as caught:
        resolved(original, transformers.ResNetModel(transformers.ResNetConfig(hidden_sizes=[8], depths=[1])))
    assert caught.value.message == (
        "adapter 'a': the adapter changes the outputs of layers such as 'bert.encoder.layer.0'; base 'small' has no "
        "layers that are known to end in one module"
    )


def test_columns_are_for_positions_of_their_own(tmp_path: Path) -> None:
    folder = save(bert(), adapters.NoReftConfig(r=2, prefix_positions=4, suffix_positions=1), tmp_path / "a")
    branches = resolved(folder, bert()).branches
    assert [branch.site for branch in branches] == [f"bert.encoder.layer.{i}.output.LayerNorm" for i in (0, 1)]
    terms = branches[0].tensors
    far = np.float32(2.0**31)
    np.testing.assert_array_equal(terms["first"], [4, 4, far, far])
    np.testing.assert_array_equal(terms["rest"], [1, 1, 0, 0])
    np.testing.assert_array_equal(terms["last"], [far, far, 1, 1])


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_orthogonal_rows_are_torch_s(rank: int) -> None:
    torch.manual_seed(rank)
    layer: Any = parametrizations.orthogonal(torch.nn.Linear(8, rank, bias=False))
    weights = layer.parametrizations.weight
    with torch.no_grad():
        weights.original.add_(0.3 * torch.randn(rank, 8).fill_diagonal_(0))
        weights.original[0, 0] *= 1.4  # the sign alone counts
        expected = layer.weight.numpy()
    found = _reft_tensors._orthogonal(weights.original.detach().numpy(), weights[0].base.numpy())
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(found @ found.T, np.eye(rank), atol=1e-6)
