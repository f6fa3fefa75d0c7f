"""Bases from folders, hub ids and modules; what is wrong with one is said exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load, load_file, save_file

from edgeadapt.errors import AdapterError, BaseModelError
from edgeadapt.merging import base_from_module, load_base_model, stamp_base
from edgeadapt.merging.fingerprint import module_digest
from edgeadapt.merging.hub import hub_folder
from edgeadapt.merging.modules import module_type

from .conftest import BERT, LLAMA, VOCAB, ConvNet


@pytest.fixture
def copy_of(folder_of, tmp_path):
    """Return a function from a model's name to a copy of its folder that a test may damage."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(folder_of(name), tmp_path / name))

    return copy


def error_of(source, **settings) -> str:
    with pytest.raises(BaseModelError) as caught:
        load_base_model(source, **settings)
    return str(caught.value).replace(str(source), "SOURCE")


def test_a_folder(folder_of):
    base = load_base_model(str(folder_of("llama-tied")))
    assert (base.name, base.revision, base.task, base.model_type) == ("llama-tied", None, "text-generation", "llama")
    assert base.untrained == ()
    assert base.quantized_from is None
    assert not base.module.training
    assert {p.dtype for p in base.module.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in base.module.parameters())
    assert base.module.lm_head.weight is base.module.model.embed_tokens.weight
    assert base.modules["lm_head"].digest == base.modules["model.embed_tokens"].digest
    saved = load_file(folder_of("llama-tied") / "model.safetensors")
    for path in ("model.embed_tokens", "model.layers.1.mlp.down_proj", "model.norm"):
        np.testing.assert_array_equal(base.modules[path].weight(), saved[f"{path}.weight"].numpy())


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("bert", "feature-extraction"),
        ("bert-classifier", "text-classification"),
        ("t5", "text2text-generation"),
        ("gpt2", "text-generation"),
        ("resnet", "image-classification"),
    ],
)
def test_the_task_is_the_architecture_s(name, task, base_of):
    assert base_of(name).task == task


def test_modules_by_type(base_of):
    gpt2, net, bert, t5 = (base_of(name).modules for name in ("gpt2", "conv-net", "bert", "t5"))
    attention = gpt2["transformer.h.0.attn.c_attn"]
    assert (attention.type, attention.class_name, attention.weight_shape) == ("conv1d", "Conv1D", (32, 96))
    assert (attention.in_features, attention.out_features, attention.has_bias) == (32, 96, True)
    assert net["depth"].groups == 4
    assert (net["depth"].type, net["depth"].in_features, net["depth"].out_features) == ("conv2d", 12, 12)
    assert net["depth"].weight_shape == (12, 3, 3, 3)
    assert net["norm"].type == "norm"
    assert bert["embeddings.LayerNorm"].type == "norm"
    table = bert["embeddings.word_embeddings"]
    assert (table.type, table.in_features, table.out_features, table.has_bias) == ("embedding", VOCAB, 32, False)
    assert t5["encoder.block.0.layer.0.layer_norm"].type == "norm"
    assert "shared" in t5
    assert bert["pooler.dense"].weight_shape == (32, 32)
    assert bert["pooler.dense"].bias().shape == (32,)
    assert table.bias is None


def test_a_module_with_a_forward_of_its_own_is_something_else():
    class Scaled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    class Named(torch.nn.Linear):
        pass

    assert module_type(Scaled(2, 2)) == "other"
    assert module_type(Named(2, 2)) == "linear"
    assert module_type(torch.nn.MultiheadAttention(4, 2).out_proj) == "other"
    assert module_type(torch.nn.Conv1d(2, 2, 1)) == "other"


def test_arrays_are_views_that_nobody_can_change(base_of):
    weight = base_of("bert").modules["pooler.dense"].weight()
    with pytest.raises(ValueError, match="read-only"):
        weight[0, 0] = 1


def test_the_digest_is_of_float32_bytes_in_c_order():
    import hashlib

    weight = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    want = hashlib.sha256(b"".join(np.float32(v).tobytes() for v in (0, 3, 1, 4, 2, 5))).hexdigest()
    assert module_digest(weight.T) == want
    assert module_digest(weight.T.numpy().astype(np.float64)) == want
    assert module_digest(weight) != want


def test_assets_are_the_same_bytes_each_time(copy_of):
    folder = copy_of("bert-classifier")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (folder / name).write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (folder / "README.md").write_text("no asset")
    one, two = load_base_model(folder).assets, load_base_model(folder).assets
    assert one == two
    assert sorted(one) == [
        "config.json", "pooling.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    config = json.loads(one["config.json"])
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert not {"_name_or_path", "transformers_version", "dtype", "torch_dtype"} & config.keys()
    assert str(folder).encode() not in one["config.json"]


def test_a_slow_tokenizer_is_converted(copy_of):
    folder = copy_of("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "##s"]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    assets = load_base_model(folder).assets
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(assets["tokenizer.json"].decode())
    assert tokenizer.encode("Hello worlds").tokens == ["[CLS]", "hello", "world", "##s", "[SEP]"]
    assert {"tokenizer_config.json", "special_tokens_map.json"} <= assets.keys()


def test_a_damaged_asset(copy_of):
    folder = copy_of("bert")
    (folder / "tokenizer.json").write_text('{"a": ')
    assert error_of(folder).startswith("SOURCE/tokenizer.json: not valid JSON: ")


def test_a_fresh_head_is_zero_and_named(folder_of):
    base = load_base_model(folder_of("bert"), task="text-classification", num_labels=4)
    assert base.untrained == ("classifier.bias", "classifier.weight")
    assert base.modules["classifier"].weight_shape == (4, 32)
    assert not base.modules["classifier"].weight().any()
    assert base.config.num_labels == 4
    config = json.loads(base.assets["config.json"])
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert list(config["id2label"].values()) == ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"]
    whole = load_base_model(folder_of("bert"))
    assert base.modules["bert.pooler.dense"].digest == whole.modules["pooler.dense"].digest


def test_a_head_of_other_size_is_untrained(folder_of):
    base = load_base_model(folder_of("bert-classifier"), num_labels=5)
    assert base.untrained == ("classifier.bias", "classifier.weight")
    assert base.modules["classifier"].weight_shape == (5, 32)
    assert load_base_model(folder_of("bert-classifier"), num_labels=3).untrained == ()


def test_an_unused_pooler_may_be_missing(tmp_path):
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**BERT), add_pooling_layer=False).save_pretrained(tmp_path / "b")
    base = load_base_model(tmp_path / "b")
    assert base.untrained == ("pooler.dense.bias", "pooler.dense.weight")
    assert error_of(tmp_path / "b", task="text-classification") == (
        "SOURCE lacks 2 weights of a BertForSequenceClassification: bert.pooler.dense.bias, bert.pooler.dense.weight\n"
        "Hint: give the base that the adapter was trained on, or the task that this model was made for"
    )


def test_wrong_tasks(folder_of, tmp_path):
    assert error_of(folder_of("llama"), task="image-classification") == (
        "SOURCE: a llama model cannot do the task 'image-classification'\n"
        "Hint: it can do: feature-extraction, question-answering, text-classification, text-generation, "
        "token-classification"
    )
    assert error_of(folder_of("llama"), task="poetry").startswith("unknown task 'poetry'\nHint: known: audio-")
    assert error_of(folder_of("llama"), num_labels=3) == (
        "a number of labels (3) was given, but the task 'text-generation' has none\n"
        "Hint: leave it out, or give one of the tasks audio-classification, image-classification, "
        "semantic-segmentation, text-classification, token-classification"
    )
    assert error_of(folder_of("bert"), task="text-classification", num_labels=0) == (
        "0 labels are too few\nHint: give the number of classes, 1 or more"
    )
    assert error_of(folder_of("bert"), task="fill-mask").startswith(
        "SOURCE lacks 6 weights of a BertForMaskedLM: cls.predictions.bias, "
    )
    assert error_of(folder_of("llama"), quantize_as="int8") == (
        "a base cannot be quantized as 'int8'\nHint: known: \"nf4\""
    )
    assert error_of(folder_of("llama"), revision="main") == (
        "revision 'main' was given, but 'SOURCE' is on this machine and has no revisions\n"
        "Hint: leave the revision out, or give a hub id"
    )


def test_an_architecture_that_tells_no_task(copy_of):
    folder = copy_of("bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForPreTraining"]}))
    assert error_of(folder).startswith(
        "SOURCE: config.json names the architecture 'BertForPreTraining', which tells no task\nHint: give the task, one"
    )
    (folder / "config.json").write_text(json.dumps({**config, "architectures": None}))
    assert error_of(folder).startswith("SOURCE: config.json names no architecture, which tells no task\n")
    assert load_base_model(folder, task="feature-extraction").task == "feature-extraction"


def test_missing_things(tmp_path, copy_of):
    assert error_of("no/such/folder") == (
        "there is no folder or file 'SOURCE'\nHint: check the path, or give a hub id such as owner/name"
    )
    assert error_of(tmp_path / "gone") == (
        "there is no folder or file 'SOURCE'\nHint: check the path, or give a hub id such as owner/name"
    )
    empty = tmp_path / "with spaces"
    empty.mkdir()
    assert error_of(empty) == (
        "SOURCE holds no config.json\nHint: give the folder of a Hugging Face model, a .gguf file, or a hub id"
    )
    (empty / "adapter_config.json").write_text("{}")
    assert error_of(empty) == (
        "SOURCE holds an adapter, not a base model\n"
        "Hint: give the model that the adapter was trained on, and the adapter as ADAPTER"
    )
    folder = copy_of("llama")
    (folder / "adapter_config.json").write_text("{}")
    assert error_of(folder) == (
        "SOURCE holds a model and an adapter (adapter_config.json), which would be loaded on top of it unasked\n"
        "Hint: move the adapter's files to a folder of their own"
    )
    (folder / "adapter_config.json").unlink()
    (folder / "model.safetensors").unlink()
    assert error_of(folder) == (
        "SOURCE holds no weights: none of model.safetensors, model.safetensors.index.json, pytorch_model.bin, "
        "pytorch_model.bin.index.json\nHint: the download is incomplete; download the model again"
    )


def test_damaged_folders(copy_of):
    folder = copy_of("llama")
    config, raw = (folder / "config.json").read_text(), (folder / "model.safetensors").read_bytes()
    weights = load(raw)

    (folder / "config.json").write_text(config[:40])
    assert error_of(folder).startswith("SOURCE/config.json: not valid JSON: ")
    (folder / "config.json").write_text("{}")
    assert error_of(folder) == (
        "SOURCE/config.json names no model_type\nHint: use the config.json that came with the model"
    )
    (folder / "config.json").write_text(json.dumps({**json.loads(config), "model_type": "brandnew"}))
    assert error_of(folder) == (
        f"SOURCE/config.json: transformers {transformers.__version__} knows no model type 'brandnew'\n"
        "Hint: code that comes with a model is never run; only architectures of transformers can be loaded"
    )
    (folder / "config.json").write_text(json.dumps({**json.loads(config), "num_hidden_layers": 1}))
    assert error_of(folder).startswith(
        "SOURCE holds layers that config.json does not count: model.layers.1.input_layernorm.weight, "
    )
    (folder / "config.json").write_text(json.dumps({**json.loads(config), "num_hidden_layers": 3}))
    assert error_of(folder).startswith(
        "SOURCE lacks 9 weights of a LlamaForCausalLM: model.layers.2.input_layernorm.weight, "
    )
    (folder / "config.json").write_text(json.dumps({**json.loads(config), "intermediate_size": 40}))
    assert error_of(folder) == (
        "SOURCE: 6 weights have another shape than config.json says: model.layers.0.mlp.down_proj.weight "
        "(config.json asks for (32, 40))\n"
        "Hint: config.json and the weights are of different models; download the model again"
    )
    (folder / "config.json").write_text(config)

    (folder / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    assert error_of(folder).startswith("SOURCE cannot be loaded as LlamaForCausalLM: ")
    gone = "model.layers.1.self_attn.k_proj.weight"
    save_file({k: v for k, v in weights.items() if k != gone}, folder / "model.safetensors", {"format": "pt"})
    assert error_of(folder) == (
        f"SOURCE lacks 1 weights of a LlamaForCausalLM: {gone}\n"
        "Hint: give the base that the adapter was trained on, or the task that this model was made for"
    )
    save_file({**weights, gone: weights[gone] * float("nan")}, folder / "model.safetensors", {"format": "pt"})
    assert error_of(folder) == (
        f"SOURCE: the weight {gone} holds NaN or infinite values\nHint: download or save the model again"
    )


def test_a_causal_model_without_its_head_is_refused(tmp_path):
    torch.manual_seed(0)
    transformers.LlamaModel(transformers.LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "l")
    assert load_base_model(tmp_path / "l").task == "feature-extraction"
    assert error_of(tmp_path / "l", task="text-generation") == (
        "SOURCE lacks 1 weights of a LlamaForCausalLM: lm_head.weight\n"
        "Hint: give the base that the adapter was trained on, or the task that this model was made for"
    )


def test_old_bin_weights_are_read_but_never_run(copy_of, tmp_path):
    folder = copy_of("llama")
    weights = load((folder / "model.safetensors").read_bytes())
    want = load_base_model(folder).modules
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert load_base_model(folder).modules == want

    trace = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return (open, (str(trace), "w"))

    torch.save({**weights, "extra": Attack()}, folder / "pytorch_model.bin")
    assert error_of(folder).startswith("SOURCE cannot be loaded as LlamaForCausalLM: ")
    assert not trace.exists()


REPOSITORY = [
    ".gitattributes", "README.md", "config.json", "tokenizer.json", "chat_template.jinja", "vocab.txt",
    "1_Pooling/config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    "model.safetensors.index.json", "consolidated.safetensors", "pytorch_model.bin", "onnx/model.onnx",
    "onnx/config.json", "original/params.json", "adapter_config.json", "tf_model.h5",
]  # fmt: skip


def hub_with(monkeypatch, files, seen, error=None):
    from types import SimpleNamespace

    from huggingface_hub.utils import filter_repo_objects

    def snapshot_download(name, *, revision, allow_patterns, ignore_patterns, **_):
        if error is not None:
            raise error
        seen.extend(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return f"/cache/{revision}"

    info = SimpleNamespace(sha="c0ffee", siblings=[SimpleNamespace(rfilename=file) for file in files])
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)


def test_which_files_of_a_repository_are_fetched(monkeypatch):
    seen: list[str] = []
    hub_with(monkeypatch, REPOSITORY, seen)
    assert hub_folder("acme/model", "main") == (Path("/cache/c0ffee"), "c0ffee")
    assert seen == [
        "config.json", "tokenizer.json", "chat_template.jinja", "vocab.txt", "1_Pooling/config.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    ]  # fmt: skip
    seen.clear()
    hub_with(monkeypatch, ["config.json", "pytorch_model.bin", "model.onnx"], seen)
    hub_folder("acme/model", None)
    assert seen == ["config.json", "pytorch_model.bin"]


def test_what_the_hub_refuses(monkeypatch):
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    from requests import Response

    messages = {
        GatedRepoError: "the hub gives the model 'SOURCE' only to people who accepted its terms\n"
        "Hint: accept them at https://huggingface.co/SOURCE and run `hf auth login`",
        RevisionNotFoundError: "the hub's model 'SOURCE' has no revision 'v9'\n"
        "Hint: give a branch, tag or full commit hash",
        RepositoryNotFoundError: "the hub knows no model 'SOURCE', and there is no such folder or file here\n"
        "Hint: check the spelling; for a private model run `hf auth login` first",
    }
    for error, message in messages.items():
        hub_with(monkeypatch, ["model.safetensors"], [], error("no", response=Response()))
        assert error_of("acme/model", revision="v9") == message


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """Let the hub be a port where nobody listens, and its cache empty."""
    from huggingface_hub import constants

    huggingface_hub.utils.reset_sessions()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield constants
    huggingface_hub.utils.reset_sessions()


def test_a_hub_id_that_cannot_be_reached(no_hub, monkeypatch):
    message = error_of("acme/tiny-model")
    assert message == (
        "there is no folder or file 'SOURCE' here, the hub cannot be reached (ConnectionError), and its cache does "
        "not hold the model 'SOURCE'\n"
        "Hint: give the path of a local folder, or run `hf download SOURCE` where there is a network"
    )
    monkeypatch.setattr(no_hub, "HF_HUB_OFFLINE", True)
    huggingface_hub.utils.reset_sessions()
    assert error_of("acme/tiny-model", revision="v1") == (
        "there is no folder or file 'SOURCE' here, HF_HUB_OFFLINE is set, and its cache does not hold the model "
        "'SOURCE' at revision 'v1'\n"
        "Hint: give the path of a local folder, or run `hf download SOURCE` where there is a network"
    )


def test_a_hub_id_in_the_cache(no_hub, folder_of, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "cache" / "models--acme--tiny-model"
    shutil.copytree(folder_of("llama"), repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    base = load_base_model("acme/tiny-model")
    assert (base.name, base.revision) == ("acme/tiny-model", commit)
    assert base.modules == load_base_model(folder_of("llama")).modules


def test_a_plain_module():
    torch.manual_seed(0)
    module = ConvNet().half().train()
    inputs = {"pixels": torch.randn(2, 3, 16, 16)}
    base = base_from_module(module, name="net", example_inputs=inputs, dynamic_axes={"pixels": {0: "batch"}})
    assert (base.task, base.model_type, base.name, base.config) == ("module", "module", "net", None)
    assert sorted(base.modules) == ["depth", "head", "norm", "point", "stem"]
    assert not base.module.training
    assert module.training
    assert module.head.weight.dtype == torch.float16
    assert base.module.head.weight.dtype == torch.float32

    def refuse(**settings) -> str:
        with pytest.raises(BaseModelError) as caught:
            base_from_module(module, name="net", **settings)
        return str(caught.value)

    assert refuse(example_inputs={}, dynamic_axes={}) == (
        "net: there are no example inputs\nHint: give the forward's arguments by name"
    )
    assert refuse(example_inputs=inputs, dynamic_axes={"pixels": {4: "x"}}) == (
        "net: the dynamic axes {4: 'x'} of input 'pixels' do not exist\nHint: inputs: pixels [2, 3, 16, 16]"
    )


def test_a_stamp_is_what_the_reader_checks(base_of, folder_of, adapt):
    from edgeadapt.adapters import read_adapters, resolve

    base = base_of("llama")
    adapter = adapt("llama", target_modules=["q_proj"], r=2)
    path = stamp_base(adapter.path, base)
    assert path == adapter.path / "base_fingerprint.json"
    stamped = read_adapters(adapter.path)[0]
    assert stamped.base.name == "llama"
    assert stamped.base.quantization is None
    assert stamped.base.fingerprint["lm_head.weight"] == base.modules["lm_head"].digest
    resolve(stamped, base.modules)
    rounded = load_base_model(folder_of("llama"), quantize_as="nf4")
    with pytest.raises(AdapterError, match="the base is not the one that the adapter was trained on"):
        resolve(stamped, rounded.modules)
    stamp_base(adapter.path, rounded)
    assert read_adapters(adapter.path)[0].base.quantization == "nf4"
    with pytest.raises(AdapterError) as caught:
        stamp_base(adapter.path.parent, base)
    assert caught.value.message == (
        f"{adapter.path.parent} holds no adapter_config.json, so there is no adapter to stamp"
    )
