"""LoRA as other libraries save it: written from peft's files of known values, exported, and compared with peft."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig
from safetensors.numpy import load_file, save_file

from edgeadapt.addition import verify_bundle
from edgeadapt.pipeline import export_bundle
from edgeadapt.recipe import Recipe
from edgeadapt.runtime import open_session
from tests.e2e.conftest import Tiny
from tests.e2e.reference import base_model, case, error, forward, with_peft
from tests.e2e.tiny import DECODER, LLAMA, save_adapter
from tests.parity import Parity

TOLERANCE = 1e-4
SMALLEST_EFFECT = 1e-2
RANK, ALPHA = 4, 6


def mlx(peft: Path, folder: Path) -> Path:
    """Write what `mlx_lm.lora` writes: its factors are peft's, transposed, and its scale is alpha / r."""
    config, tensors = json.loads((peft / "adapter_config.json").read_text()), {}
    for key, value in load_file(peft / "adapter_model.safetensors").items():
        module, part = key.removeprefix("base_model.model.").rsplit(".lora_", 1)
        name = {"A.weight": "lora_a", "B.weight": "lora_b", "magnitude_vector": "m"}[part]
        tensors[f"{module}.{name}"] = np.ascontiguousarray(value.T)
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors")
    keys = sorted({".".join(key.split(".")[3:-1]) for key in tensors})
    mine = {
        "batch_size": 4,
        "fine_tune_type": "dora" if config["use_dora"] else "lora",
        "iters": 1000,
        "lora_parameters": {"dropout": 0.0, "keys": keys, "rank": RANK, "scale": ALPHA / RANK},
        "model": "some/base",
        "num_layers": -1,
    }
    (folder / "adapter_config.json").write_text(json.dumps(mine))
    return folder


GGUF_NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def gguf(peft: Path, folder: Path) -> Path:
    """Write what llama.cpp's convert_lora_to_gguf.py writes for a Llama, with the library's own writer."""
    import gguf as library

    folder.mkdir()
    writer = library.GGUFWriter(str(folder / "lora.gguf"), "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(ALPHA))
    for key, value in load_file(peft / "adapter_model.safetensors").items():
        parts = key.removeprefix("base_model.model.model.layers.").split(".")
        name, factor = GGUF_NAMES[parts[2]], parts[3].removeprefix("lora_").lower()
        if factor == "b" and name in ("attn_q", "attn_k"):
            heads = {"attn_q": DECODER["num_attention_heads"], "attn_k": DECODER["num_key_value_heads"]}[name]
            shape = (heads, 2, value.shape[0] // heads // 2, value.shape[1])
            value = np.ascontiguousarray(value.reshape(shape).swapaxes(1, 2).reshape(value.shape))  # noqa: PLW2901
        writer.add_tensor(f"blk.{parts[0]}.{name}.weight.lora_{factor}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def kohya(peft: Path, folder: Path) -> Path:
    """Write what sd-scripts write: dots as underscores behind a prefix, and alpha as a tensor."""
    tensors = {}
    for key, value in load_file(peft / "adapter_model.safetensors").items():
        module, part = key.removeprefix("base_model.model.").rsplit(".lora_", 1)
        name = "lora_te_" + module.replace(".", "_")
        tensors[f"{name}.{ {'A.weight': 'lora_down', 'B.weight': 'lora_up'}[part] }.weight"] = value
        tensors[f"{name}.alpha"] = np.array(ALPHA, np.float32)
    folder.mkdir()
    save_file(tensors, folder / "last.safetensors", metadata={"ss_network_module": "networks.lora"})
    return folder


def olive(peft: Path, folder: Path) -> Path:
    """Write what Olive's convert-adapters writes: factors as a graph has them, alpha / r in B, by ONNX Runtime."""
    import onnxruntime

    tensors = {}
    for key, value in load_file(peft / "adapter_model.safetensors").items():
        scaled = value * np.float32(ALPHA / RANK) if "lora_B" in key else value
        name = key.replace("base_model.model.model", "model")
        tensors[name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(scaled.T))
    folder.mkdir()
    writer = onnxruntime.AdapterFormat()
    writer.set_parameters(tensors)
    writer.export_adapter(str(folder / "adapter_weights.onnx_adapter"))
    return folder


Write = Callable[[Path, Path], Path]
LAYOUTS: dict[str, tuple[Write, dict[str, Any]]] = {
    "gguf": (gguf, {}),
    "kohya": (kohya, {}),
    "mlx": (mlx, {}),
    "mlx-dora": (mlx, {"use_dora": True}),
    "olive": (olive, {}),
}


SOURCES = {"gguf": "llama.cpp (GGUF)", "kohya": "kohya sd-scripts", "mlx": "MLX-LM", "olive": "Olive (.onnx_adapter)"}


@pytest.fixture(scope="module")
def written(tiny: Callable[[str], Tiny], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Return peft's folder and the other library's, by layout."""
    base, found = tiny("llama").base, {}
    for name, (write, options) in LAYOUTS.items():
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LLAMA, **options)
        root = tmp_path_factory.mktemp(name)
        peft = save_adapter(base_model("llama", base), config, root / "peft")
        found[name] = peft, write(peft, root / name)
    return found


def test_every_layout_equals_peft(
    written: dict[str, tuple[Path, Path]], tiny: Callable[[str], Tiny], tmp_path: Path, parity: Parity
) -> None:
    base, inputs = tiny("llama").base, case("llama")
    output = tmp_path / "out.bundle"
    export_bundle(Recipe(tuple(mine for _, mine in written.values()), str(base), output, quantize="none"))
    plain = forward(base_model("llama", base), inputs)
    with open_session(output) as session:
        for name, (peft, _) in written.items():
            session.use(name)
            expected = with_peft("llama", base, peft, inputs)
            assert error(expected, plain, inputs) >= SMALLEST_EFFECT, name
            found = error(expected, session.run(inputs)["logits"], inputs)
            source, adapter = SOURCES[name.partition("-")[0]], "DoRA" if "dora" in name else "LoRA"
            parity.add(written[name][1], "llama", source=source, adapter=adapter, errors={"swapped": found})
            assert found <= TOLERANCE, name
    assert verify_bundle(output) == []


def test_added_without_torch(
    written: dict[str, tuple[Path, Path]], tiny: Callable[[str], Tiny], tmp_path: Path
) -> None:
    model, inputs = tiny("llama"), case("llama")
    output = tmp_path / "out.bundle"
    export_bundle(Recipe((model.adapters[0],), str(model.base), output, quantize="none"))
    names = [name for name, (_, options) in LAYOUTS.items() if not options]
    code = (
        "import sys\nfrom edgeadapt.addition import add_adapter\n"
        "for folder in sys.argv[2:]:\n    add_adapter(sys.argv[1], folder)\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules), sorted(sys.modules)\n"
    )
    folders = [str(written[name][1]) for name in names]
    subprocess.run([sys.executable, "-c", code, str(output), *folders], check=True, timeout=120)
    with open_session(output) as session:
        for name in names:
            session.use(name)
            expected = with_peft("llama", model.base, written[name][0], inputs)
            assert error(expected, session.run(inputs)["logits"], inputs) <= TOLERANCE
