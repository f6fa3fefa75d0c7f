"""What can be wrong with what people give: every message whole, nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.numpy import load_file, save_file

from edgeadapt.adapters.kind import known_kinds
from edgeadapt.files import canonical_json
from tests.e2e.conftest import Exported, Invoke, Tiny, content
from tests.e2e.tiny import DECODER, save_adapter

RIGHT_BASE = "give the base that the adapter was trained on, loaded for the same task"
WHOLE_FILE = "copy or download the adapter again; nothing can be repaired from this file"
OTHER_NAME = "choose another name with --name"
Alter = Callable[..., Path]
Refused = Callable[..., str]


@pytest.fixture
def refused(invoke: Invoke, tmp_path: Path) -> Refused:
    """Run the program, see that it fails as known errors do and changes nothing, and return what it says."""

    def run(*args: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        result = invoke(*args, "--quiet")
        assert (result.exit_code, result.stdout) == (1, ""), result.stderr
        assert sorted(tmp_path.rglob("*")) == before
        return result.stderr

    return run


def said(message: str, hint: str) -> str:
    return f"error: {message}\nhint: {hint}\n"


@pytest.fixture
def llama(tiny: Callable[[str], Tiny]) -> Tiny:
    return tiny("llama")


@pytest.fixture
def alter(llama: Tiny, tmp_path: Path) -> Alter:
    """Copy the first adapter with other tensors or another config."""

    def make(*, tensors: Callable[[dict[str, Any]], Any] | None = None, config: dict[str, Any] | None = None) -> Path:
        folder = Path(shutil.copytree(llama.adapters[0], tmp_path / "altered"))
        file = folder / "adapter_model.safetensors"
        if tensors is not None:
            values = load_file(file)
            save_file(tensors(values) or values, file)
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **(config or {})}))
        return folder

    return make


# What is given to `export`.


def test_a_base_that_is_not_there(refused: Refused, llama: Tiny, tmp_path: Path) -> None:
    base = tmp_path / "nowhere"
    assert refused("export", llama.adapters[0], "--base", base, "-o", tmp_path / "out.bundle") == said(
        f"there is no folder or file '{base}'", "check the path, or give a hub id such as owner/name"
    )


def test_a_hub_id_without_a_network(
    refused: Refused, llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert refused("export", llama.adapters[0], "--base", "some/model", "-o", tmp_path / "out.bundle") == said(
        "there is no folder or file 'some/model' here, HF_HUB_OFFLINE is set, and its cache does not hold the model "
        "'some/model'",
        "give the path of a local folder, or run `hf download some/model` where there is a network",
    )


def test_an_adapter_that_is_not_there(refused: Refused, llama: Tiny, tmp_path: Path) -> None:
    assert refused("export", tmp_path / "nowhere", "--base", llama.base, "-o", tmp_path / "out.bundle") == said(
        f"there is no adapter at {tmp_path / 'nowhere'}: no such folder", "check the path"
    )


def test_base_and_adapter_in_each_other_s_place(refused: Refused, llama: Tiny, tmp_path: Path) -> None:
    adapter, out = llama.adapters[0], tmp_path / "out.bundle"
    assert refused("export", llama.base, "--base", adapter, "-o", out) == said(
        f"{llama.base} is a whole model, not an adapter (it has config.json)", "give it as --base"
    )
    assert refused("export", adapter, "--base", adapter, "-o", out) == said(
        f"{adapter} holds an adapter, not a base model",
        "give the model that the adapter was trained on, and the adapter as ADAPTER",
    )


def save_llama(folder: Path, **config: Any) -> Path:
    torch.manual_seed(99)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**DECODER, **config})).save_pretrained(folder)
    return folder


def test_a_base_of_another_size(refused: Refused, llama: Tiny, tmp_path: Path) -> None:
    wide = save_llama(tmp_path / "wide", hidden_size=96)
    (tmp_path / "unstamped").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(llama.adapters[0] / name, tmp_path / "unstamped")
    message = refused("export", tmp_path / "unstamped", "--base", wide, "-o", tmp_path / "out.bundle")
    assert message == (
        "warning: unstamped: no base_fingerprint.json: only the base's module names and shapes can be checked\n"
        f"warning: unstamped: revision is null: any revision of base '{llama.base}' loads alike\n"
    ) + said(
        "adapter 'unstamped': tensor 'base_model.model.model.layers.0.mlp.down_proj.lora_B.weight' in "
        f"{tmp_path / 'unstamped' / 'adapter_model.safetensors'} has shape [64, 4], but module "
        "'model.layers.0.mlp.down_proj' of base 'wide' (a Linear with weight [96, 96]) needs [96, 4]; the "
        f"adapter was trained on base '{llama.base}', this is base 'wide'",
        RIGHT_BASE,
    )
    shallow = save_llama(tmp_path / "shallow", num_hidden_layers=1)
    assert refused("export", llama.adapters[0], "--base", shallow, "-o", tmp_path / "out.bundle") == said(
        "adapter 'adapter0': the adapter changes module 'model.layers.1.mlp.down_proj', which the base does not have "
        "(its nearest is 'model.layers.0.mlp.down_proj'); 7 of the adapter's 14 modules are there",
        RIGHT_BASE,
    )


def test_a_base_with_other_weights_and_the_same_names(refused: Refused, llama: Tiny, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other")
    digests = json.loads((llama.adapters[0] / "base_fingerprint.json").read_text())["parameters"]
    message = refused("export", llama.adapters[0], "--base", other, "-o", tmp_path / "out.bundle")
    start, _, rest = message.partition(" has digest ")
    assert start == (
        "error: adapter 'adapter0': the base is not the one that the adapter was trained on: tensor "
        "'model.layers.0.mlp.down_proj.weight'"
    )
    stamped = digests["model.layers.0.mlp.down_proj.weight"][:12]
    assert rest[12:] == (
        f" in base 'other' and {stamped} in base 'base'\n"
        "hint: give the base (and revision) that the adapter was trained on\n"
    )
    assert rest[:12] != stamped


def test_a_truncated_adapter(refused: Refused, llama: Tiny, alter: Alter, tmp_path: Path) -> None:
    file = alter() / "adapter_model.safetensors"
    size = file.stat().st_size
    data = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    file.write_bytes(file.read_bytes()[:-100])
    out = tmp_path / "out.bundle"
    assert refused("export", tmp_path / "altered", "--base", llama.base, "-o", out) == said(
        f"{file} is truncated: tensor 'base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight' ends at data "
        f"byte {size - data}, the file has {size - data - 100}",
        WHOLE_FILE,
    )
    file.write_bytes(file.read_bytes()[:100])
    assert refused("export", tmp_path / "altered", "--base", llama.base, "-o", out) == said(
        f"{file} is truncated or no safetensors file: its header needs {data - 8} bytes, the file has 100", WHOLE_FILE
    )
    file.unlink()
    assert refused("export", tmp_path / "altered", "--base", llama.base, "-o", out) == said(
        f"{tmp_path / 'altered'} has adapter_config.json but no adapter_model.safetensors",
        "copy the file from where it was trained",
    )


PREFIX = "base_model.model."
UP = "model.layers.1.mlp.up_proj"


def test_an_adapter_with_nan(refused: Refused, llama: Tiny, alter: Alter, tmp_path: Path) -> None:
    key = f"{PREFIX}{UP}.lora_A.weight"

    def poison(tensors: dict[str, Any]) -> None:
        tensors[key][1, 2] = np.nan
        tensors[key][3, 4] = np.inf

    folder = alter(tensors=poison)
    assert refused("export", folder, "--base", llama.base, "-o", tmp_path / "out.bundle") == said(
        f"adapter 'altered': tensor '{key}' in {folder / 'adapter_model.safetensors'} holds values that are not "
        "finite: 2 of 256, the first at [1, 2]",
        "the training diverged or the file is damaged: use an earlier checkpoint",
    )


def test_an_adapter_of_another_kind(refused: Refused, llama: Tiny, alter: Alter, tmp_path: Path) -> None:
    folder = alter(config={"peft_type": "TELEPATHY"})
    assert refused("export", folder, "--base", llama.base, "-o", tmp_path / "out.bundle") == said(
        f"{folder / 'adapter_config.json'}: peft_type 'TELEPATHY' is not supported",
        f"known kinds of adapter: {', '.join(known_kinds())}; peft's save_as_lora converts some other kinds to lora",
    )
    shutil.rmtree(folder)
    folder = alter(config={"use_qalora": True})
    assert refused("export", folder, "--base", llama.base, "-o", tmp_path / "out.bundle") == said(
        f"{folder / 'adapter_config.json'}: use_qalora is set: QA-LoRA: it averages groups of inputs and needs its "
        "GPTQ base, which edgeadapt does not do",
        "train plain LoRA, or merge it with peft and use the merged model as a base",
    )


def test_an_adapter_with_a_tensor_too_many(refused: Refused, llama: Tiny, alter: Alter, tmp_path: Path) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors[f"{PREFIX}model.norm.scale"] = np.ones(64, np.float32)

    folder = alter(tensors=add)
    assert refused("export", folder, "--base", llama.base, "-o", tmp_path / "out.bundle") == said(
        f"adapter 'altered': tensors without a use in base 'base': '{PREFIX}model.norm.scale' (module 'model.norm' is "
        "there; the adapter was trained on base 'base', this is base 'base')",
        RIGHT_BASE,
    )


def test_an_adapter_with_a_tensor_too_few(refused: Refused, llama: Tiny, alter: Alter, tmp_path: Path) -> None:
    out = tmp_path / "out.bundle"
    folder = alter(tensors=lambda tensors: {k: v for k, v in tensors.items() if k != f"{PREFIX}{UP}.lora_B.weight"})
    assert refused("export", folder, "--base", llama.base, "-o", out) == said(
        f"tensor '{UP}.lora_B.weight' is missing in {folder / 'adapter_model.safetensors'} "
        f"('{UP}.lora_A.weight' is there)",
        "save the adapter again with peft's save_pretrained",
    )
    shutil.rmtree(folder)
    folder = alter(tensors=lambda tensors: {k: v for k, v in tensors.items() if UP not in k})
    assert refused("export", folder, "--base", llama.base, "-o", out) == said(
        f"adapter 'altered': no tensors for 1 of the 14 modules that target_modules selects: '{UP}' (the adapter was "
        "trained on base 'base', this is base 'base')",
        f"the file is damaged or incomplete: save the adapter again with peft's save_pretrained, or {RIGHT_BASE}",
    )


def test_an_adapter_that_does_nothing(
    refused: Refused, llama: Tiny, alter: Alter, tmp_path: Path, traced_once: None
) -> None:
    folder = alter(tensors=lambda tensors: {k: v * ("lora_B" not in k) for k, v in tensors.items()})
    message = said(
        "adapter 'altered' does nothing: its outputs differ from the base's by 0 of the largest value, at least 1e-05 "
        "is needed",
        "check that the adapter was trained and saved (an untrained LoRA has a zero B)",
    )
    for flags in ((), ("--quantize", "none")):
        out = tmp_path / "out.bundle"
        assert refused("export", folder, "--base", llama.base, "-o", out, *flags) == message


def test_names(refused: Refused, llama: Tiny, tmp_path: Path) -> None:
    def named(*flags: str, adapters: tuple[Path, ...] = llama.adapters[:1]) -> str:
        return refused("export", *adapters, "--base", llama.base, "-o", tmp_path / "out.bundle", *flags)

    assert named("--name", "a b") == said(
        "adapter name 'a b': 1 to 64 letters, digits and . _ - are allowed, first a letter or digit, last not a dot",
        OTHER_NAME,
    )
    assert named("--name", "none") == said("adapter name 'none' stands for the bare base", OTHER_NAME)
    assert named("--name", "aux") == said("adapter name 'aux' cannot be a folder on Windows", OTHER_NAME)
    assert named("--name", "a", "--name", "b") == said(
        "2 names for 1 adapters: adapter0", "give one --name per adapter, in their order"
    )
    assert named("--name", "a", "--name", "A", adapters=llama.adapters) == said(
        "adapter name 'A' differs from 'a' only in case: one folder on Windows and macOS", OTHER_NAME
    )
    shutil.copytree(llama.adapters[1], tmp_path / "adapter0")
    assert named(adapters=(llama.adapters[0], tmp_path / "adapter0")) == said(
        "two adapters have the name 'adapter0'", "give each its own with --name"
    )


# Where the bundle shall go.


def test_an_output_that_cannot_be_made(refused: Refused, llama: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    (tmp_path / "link.bundle").symlink_to(folder)

    def export(out: Path, *flags: str) -> str:
        return refused("export", llama.adapters[0], "--base", llama.base, "-o", out, *flags)

    exists = "choose another target, or replace it with --force"
    assert export(file / "out.bundle") == said(
        f"cannot write {file / 'out.bundle'}: Not a directory", f"check that {file} is a folder that you may write to"
    )
    assert export(file / "below" / "out.bundle") == said(
        f"cannot make the folder {file / 'below'}: Not a directory",
        f"check that {file / 'below'} is a folder that you may write to",
    )
    assert export(file) == said(f"{file} exists already", exists)
    assert export(folder) == said(f"{folder} exists already", exists)
    own = "remove it yourself or choose another target"
    assert export(file, "--force") == said(f"{file} is a file, not a folder", own)
    assert export(tmp_path / "link.bundle", "--force") == said(
        f"{tmp_path / 'link.bundle'} is a symbolic link, not a folder", own
    )
    assert export(folder, "--force") == said(
        f"{folder} is not replaced: it holds no manifest.json, so it was not made by edgeadapt",
        "choose another target, or remove the folder yourself",
    )
    assert content(folder) == {"thesis.txt": b"mine"}
    assert file.read_text() == "mine"


def test_a_path_with_spaces_and_letters_of_other_alphabets(
    invoke: Invoke, llama: Tiny, tmp_path: Path, traced_once: None
) -> None:
    folder = tmp_path / "моя папка 模型"
    base = Path(shutil.copytree(llama.base, folder / "base é"))
    adapter = Path(shutil.copytree(llama.adapters[0], folder / "adapter ü"))
    out = folder / "new folder" / "bundle [1] ñ.bundle"
    result = invoke("export", adapter, "--base", base, "-o", out, "--name", "one", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["path"] == str(out)
    np.savez(folder / "in put.npz", input_ids=np.array([[3, 4, 5]]))
    result = invoke("run", out, "--adapter", "one", "--inputs", folder / "in put.npz", "--output", folder / "out ö.npz")
    assert (result.exit_code, result.stdout) == (0, "logits  float32[1, 3, 128]\n")
    assert invoke("verify", out).exit_code == 0
    assert sorted(path.name for path in out.parent.iterdir()) == [out.name]


# Quality.


def test_the_gate_shows_the_table_and_writes_nothing(
    refused: Refused, llama: Tiny, tmp_path: Path, traced_once: None
) -> None:
    for flag, figure in (("--max-kl", "mean KL"), ("--min-top1", "top-1 agreement")):
        limit = "0" if flag == "--max-kl" else "1"
        message = refused(
            "export", *llama.adapters, "--base", llama.base, "-o", tmp_path / "out.bundle", flag, limit
        ).splitlines()
        assert message[0].startswith(f"error: the quality gate fails: the base has a {figure} of ")
        assert message[0].count(f", {'more' if limit == '0' else 'less'} than {limit}") == 3
        assert message[1].split("  ")[0] == "adapter"
        assert [line.split()[:3] for line in message[2:5]] == [
            ["(base)", "int8", "744"],
            ["adapter0", "int8", "744"],
            ["adapter1", "int8", "744"],
        ]
        assert message[5:] == [
            "hint: use a scheme with more bits, exceptions (keep), --calibrate FILE for int4, or wider limits"
        ]


@pytest.mark.parametrize(
    ("flags", "message", "hint"),
    [
        (["--quantize", "int3"], "quantize: unknown scheme 'int3'", "known: fp16, int4, int8, none"),
        (["--keep", "a=int3"], "keep['a']: unknown scheme 'int3'", "known: fp16, int4, int8, none"),
        (["--max-kl", "-1"], "max_kl must be 0 or more, got -1.0", "0.02 is strict, 0.1 is loose"),
        (
            ["--max-kl", "nan"],
            "export settings: field max_kl must be a finite number, got the number nan",
            "correct the value",
        ),
        (["--min-top1", "95"], "min_top1 must be between 0 and 1, got 95.0", "0.95 means 95 %"),
        (["--max-length", "0"], "max_length must be at least 1, got 0", "leave it out for the model's own limit"),
        (
            ["--merge-base", "original"],
            "merge_base is 'original', and nothing is merged",
            "add merge, or leave merge_base out",
        ),
        (
            ["--quantize", "none", "--keep", "*=int8"],
            "keep has exceptions, and nothing is quantized",
            "set quantize, or leave keep out",
        ),
        (
            ["--revision", "main"],
            "revision 'main' was given, but '{base}' is on this machine and has no revisions",
            "leave the revision out, or give a hub id",
        ),
        (
            ["--task", "image-classification"],
            "{base}: a llama model cannot do the task 'image-classification'",
            (
                "it can do: feature-extraction, question-answering, text-classification, text-generation, "
                "token-classification"
            ),
        ),
        (
            ["--calibrate", "nowhere.txt"],
            "cannot read nowhere.txt: No such file or directory",
            "check the path and its permissions",
        ),
    ],
)
def test_settings_that_mean_nothing(
    refused: Refused, llama: Tiny, tmp_path: Path, flags: list[str], message: str, hint: str
) -> None:
    out = tmp_path / "out.bundle"
    expected = said(message.format(base=llama.base), hint)
    assert refused("export", llama.adapters[0], "--base", llama.base, "-o", out, *flags) == expected


def test_an_exception_that_matches_nothing(refused: Refused, llama: Tiny, tmp_path: Path, traced_once: None) -> None:
    out = tmp_path / "out.bundle"
    assert refused("export", llama.adapters[0], "--base", llama.base, "-o", out, "--keep", "*.q_prj=none") == said(
        "the exception '*.q_prj' = 'none' matches none of the model's 16 weights",
        "patterns are module paths with * for any text, such as lm_head, model.embed_tokens, "
        "model.layers.0.mlp.down_proj",
    )


def test_wrong_usage_exits_with_2(invoke: Invoke, llama: Tiny, tmp_path: Path) -> None:
    for args in (
        ["export", llama.adapters[0]],
        ["export", llama.adapters[0], "--base", llama.base, "-o", tmp_path / "out.bundle", "--quantise", "int8"],
        ["run", tmp_path],
        ["verify"],
    ):
        result = invoke(*args)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("Usage: edgeadapt ")
    assert list(tmp_path.iterdir()) == []


# What is done with a bundle that exists.


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    np.savez(tmp_path / "in.npz", input_ids=np.array([[3, 4, 5]]))
    return tmp_path / "in.npz"


def test_json_is_alone_on_stdout(invoke: Invoke, copied: Exported, llama: Tiny, inputs: Path) -> None:
    bundle = copied("llama")
    found = {}
    for args in (
        ("inspect", bundle),
        ("inspect", llama.adapters[0]),
        ("add", bundle, llama.adapters[0], "--name", "again"),
        ("verify", bundle),
        ("run", bundle, "--adapter", "again", "--inputs", inputs),
        ("remove", bundle, "again"),
    ):
        result = invoke(*args, "--json")
        assert result.exit_code == 0, result.stderr
        found[args[0]] = json.loads(result.stdout)
        if args[0] in ("add", "verify", "run", "remove"):
            assert " s  " in result.stderr  # progress, on the other channel
    assert list(found["add"]["adapters"]) == ["adapter0", "adapter1", "again"]
    assert list(found["remove"]["adapters"]) == ["adapter0", "adapter1"]
    assert found["verify"] == {"ok": True, "findings": []}
    assert found["run"]["outputs"] == {"logits": {"dtype": "float32", "shape": [1, 3, 128]}}


def test_adapters_that_a_bundle_does_not_have(refused: Refused, exported: Exported, llama: Tiny, inputs: Path) -> None:
    swap = exported("llama")
    merged = exported("llama", adapters=llama.adapters[:1], merge=True)
    known = "adapters in this bundle: adapter0, adapter1"
    assert refused("run", swap, "--adapter", "nope", "--inputs", inputs) == said("unknown adapter 'nope'", known)
    assert refused("run", swap, "--blend", "adapter0=1,nope=1", "--inputs", inputs) == said(
        "unknown adapter 'nope'", known
    )
    assert refused("run", merged, "--adapter", "other", "--inputs", inputs) == said(
        "adapter 'other' cannot be used: 'adapter0' is merged into the weights of this bundle",
        "export without --merge to swap adapters",
    )
    assert refused("add", merged, llama.adapters[1]) == said(
        "bundle 'llama' has no slots: adapter 'adapter0' was merged into it",
        "export without --merge to get a bundle that takes adapters",
    )
    assert refused("remove", swap, "nope") == said(
        f"{swap} has no adapter 'nope'", "adapters of this bundle: adapter0, adapter1"
    )
    assert refused("add", swap, llama.adapters[0]) == said(
        f"{swap} already has an adapter 'adapter0'", "choose another --name, or pass --force"
    )
    assert refused("add", swap, llama.adapters[0], "--name", "Adapter0") == said(
        "adapter name 'Adapter0' differs from 'adapter0' only in case: one folder on Windows and macOS", OTHER_NAME
    )


def new_adapter(llama: Tiny, folder: Path, **config: Any) -> Path:
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM.from_pretrained(llama.base)
    return save_adapter(model, LoraConfig(r=2, **config), folder)


def test_adding_what_the_bundle_has_no_place_for(
    refused: Refused, copied: Exported, exported: Exported, llama: Tiny, tmp_path: Path
) -> None:
    bundle = copied("llama")
    again = "export the bundle again together with this adapter, so that its graph gets what the adapter needs"
    head = new_adapter(llama, tmp_path / "head", target_modules=["lm_head"])
    assert refused("add", bundle, head) == said(
        "adapter 'head' changes module 'lm_head', for which this bundle has no slot", again
    )
    saved = new_adapter(llama, tmp_path / "saved", target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert refused("add", bundle, saved) == said(
        "adapter 'saved' changes parameter 'lm_head.weight', for which this bundle has no slot", again
    )
    few = exported("llama", adapters=llama.adapters[1:])
    assert refused("add", few, llama.adapters[0]) == said(
        "adapter 'adapter0' changes module 'model.layers.0.mlp.down_proj', for which this bundle has no slot", again
    )


def test_adding_a_dora(invoke: Invoke, refused: Refused, copied: Exported, llama: Tiny, tmp_path: Path) -> None:
    bundle = copied("llama")
    dora = new_adapter(llama, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    assert refused("add", bundle, dora) == said(
        "adapter 'dora': DoRA at module 'model.layers.0.self_attn.q_proj' needs the base's weights, which a bundle "
        "does not hold",
        "pass --base",
    )
    other = save_llama(tmp_path / "other")
    assert refused("add", bundle, dora, "--base", other) == said(
        "the bundle was made from base, not from other: 21 modules differ, lm_head first",
        "give the base that the bundle was exported from",
    )
    message = refused("add", bundle, dora, "--base", llama.base)
    assert message == said(
        "adapter 'dora' needs a gain at module 'model.layers.0.self_attn.q_proj', but this bundle's slot takes only "
        "a, b",
        "export the bundle again together with this adapter, so that its graph gets what the adapter needs",
    )


def test_adding_an_adapter_of_another_base(refused: Refused, copied: Exported, llama: Tiny, tmp_path: Path) -> None:
    bundle = copied("llama")
    folder = Path(shutil.copytree(llama.adapters[0], tmp_path / "foreign"))
    stamp = json.loads((folder / "base_fingerprint.json").read_text())
    right = stamp["parameters"]["model.layers.0.mlp.down_proj.weight"]
    stamp["parameters"] = dict.fromkeys(stamp["parameters"], "ab" * 32)
    stamp["name"] = "someone/else"
    (folder / "base_fingerprint.json").write_bytes(canonical_json(stamp))
    assert refused("add", bundle, folder) == said(
        "adapter 'foreign': the base is not the one that the adapter was trained on: tensor "
        f"'model.layers.0.mlp.down_proj.weight' has digest {right[:12]} in base 'base' and abababababab in base "
        "'someone/else'",
        "give the base (and revision) that the adapter was trained on",
    )


def test_adding_an_adapter_that_does_nothing(refused: Refused, copied: Exported, alter: Alter, llama: Tiny) -> None:
    bundle = copied("llama")
    before = content(bundle)
    folder = alter(tensors=lambda tensors: {k: v * ("lora_B" not in k) for k, v in tensors.items()})
    assert refused("add", bundle, folder) == said(
        "adapter 'altered' does nothing: its outputs differ from the base's by 0 of the largest value, at least 1e-05 "
        "is needed",
        "check that the adapter was trained and saved (an untrained LoRA has a zero B)",
    )
    assert content(bundle) == before


def test_a_flipped_byte_in_any_file(invoke: Invoke, copied: Exported) -> None:
    bundle = copied("llama")
    files = content(bundle)
    assert {Path(name).suffix for name in files} >= {".json", ".onnx", ".bin", ".onnx_adapter", ".safetensors"}
    for name, data in files.items():
        position = len(data) // 2
        changed = data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        (bundle / name).write_bytes(changed)
        result = invoke("verify", bundle, "--quiet")
        (bundle / name).write_bytes(data)
        assert (result.exit_code, result.stdout) == (1, "")
        message, hint = result.stderr.splitlines()
        if name == "manifest.json":
            assert message.startswith(f"error: {bundle / name}: ")
        else:
            assert message.startswith(f"error: {bundle} is not what it was: {name}: ")
            assert hint == "hint: export the bundle again, or copy it again from where it came"
    assert invoke("verify", bundle).exit_code == 0


def test_half_written_folders(refused: Refused, exported: Exported, inputs: Path, tmp_path: Path) -> None:
    staged = tmp_path / ".tiny.bundle.tmp-01234567"
    shutil.copytree(exported("llama"), staged)
    (staged / "manifest.json").unlink()
    for command in (("run", staged, "--inputs", inputs), ("verify", staged)):
        assert refused(*command) == said(
            f"{staged} has no manifest.json: it is an export that did not finish", "`edgeadapt export` makes bundles"
        )
    partial = Path(shutil.copytree(exported("llama"), tmp_path / "partial.bundle"))
    (partial / "graph" / "weights.bin").unlink()
    assert refused("run", partial, "--inputs", inputs) == said(
        f"{partial}: graph/weights.bin is missing", "run `edgeadapt verify`, or export it again"
    )
    assert refused("verify", partial) == said(
        f"{partial} is not what it was: graph/weights.bin: is missing",
        "export the bundle again, or copy it again from where it came",
    )
    (tmp_path / "empty").mkdir()
    assert refused("verify", tmp_path / "empty") == said(
        f"{tmp_path / 'empty'} has no manifest.json: it is not a bundle", "`edgeadapt export` makes bundles"
    )
    assert refused("verify", tmp_path / "nowhere") == said(
        f"{tmp_path / 'nowhere'} does not exist", "check the path; `edgeadapt export` makes bundles"
    )
