"""Add float LoRA inputs to an onnxruntime-genai model, and write PEFT adapters for them.

    python genai_slots.py MODEL_FOLDER OUT_FOLDER ADAPTER_FOLDER...

onnxruntime-genai has no route to float adapters as inputs (its `generate-adapter` road makes int4 ones that decode at
less than half of the base's speed), so this is the form in which genai is at its best with a swappable LoRA. Runs in
genai's environment: onnx, numpy, safetensors and onnxruntime only. Knows the builder's names for Llama-like models.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

SITE = re.compile(r"^/model/(?P<layer>layers\.\d+)/(?P<block>attn|mlp)/(?P<name>\w+_proj)/MatMul_Q\d$")
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
PEFT_BLOCK = {"attn": "self_attn", "mlp": "mlp"}


def main() -> None:
    """Write OUT_FOLDER: the model with slots, and NAME.onnx_adapter per adapter."""
    source, target, *adapters = (Path(argument) for argument in sys.argv[1:])
    shutil.copytree(source, target, dirs_exist_ok=True)
    model = onnx.load(str(source / "model.onnx"), load_external_data=False)
    sites = add_slots(model)
    onnx.save(model, str(target / "model.onnx"))
    for folder in adapters:
        write_adapter(folder, sites, target / f"{folder.name}.onnx_adapter")


def add_slots(model: onnx.ModelProto) -> list[str]:
    """The sites, in genai's names ("layers.0.attn.qkv_proj"); y becomes y + (x A) B with rank-0 defaults."""
    sites, nodes = [], []
    for node in model.graph.node:
        nodes.append(node)
        match = SITE.match(node.name)
        if match is None:
            continue
        site = ".".join(match.group("layer", "block", "name"))
        attributes = {a.name: a.i for a in node.attribute}
        a, b, output = f"{site}.lora_A", f"{site}.lora_B", node.output[0]
        node.output[0] = f"{output}/base"
        nodes += [
            helper.make_node("MatMul", [node.input[0], a], [f"{output}/xa"], name=f"{site}/A"),
            helper.make_node("MatMul", [f"{output}/xa", b], [f"{output}/xab"], name=f"{site}/B"),
            helper.make_node("Add", [f"{output}/base", f"{output}/xab"], [output], name=f"{site}/add"),
        ]
        for name, shape in ((a, (attributes["K"], 0)), (b, (0, attributes["N"]))):
            model.graph.initializer.append(numpy_helper.from_array(np.zeros(shape, np.float32), name))
            symbolic = [f"{site}.rank" if size == 0 else size for size in shape]
            model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, symbolic))
        sites.append(site)
    if not sites:
        sys.exit("no site found: the builder's node names have changed")
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return sites


def write_adapter(folder: Path, sites: list[str], target: Path) -> None:
    """Write a PEFT LoRA as .onnx_adapter: packed sites get stacked A and block-diagonal B, alpha / r folded into B."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if config["peft_type"] != "LORA" or config.get("use_rslora") or config.get("alpha_pattern"):
        sys.exit(f"{folder}: only a plain LoRA is supported here")
    tensors = load_file(folder / "adapter_model.safetensors")
    unused = set(tensors)
    arrays: dict[str, np.ndarray] = {}
    for site in sites:
        layers, number, block, name = site.split(".")
        parts = [f"model.{layers}.{number}.{PEFT_BLOCK[block]}.{part}" for part in PACKED.get(name, (name,))]
        keys = [[f"base_model.model.{part}.lora_{side}.weight" for side in "AB"] for part in parts]
        unused -= {key for pair in keys for key in pair}
        downs = [tensors[a].astype(np.float32).T for a, _ in keys]
        ups = [tensors[b].astype(np.float32).T * (config["lora_alpha"] / config["r"]) for _, b in keys]
        arrays[f"{site}.lora_A"] = np.ascontiguousarray(np.concatenate(downs, axis=1))
        arrays[f"{site}.lora_B"] = _block_diagonal(ups)
    if unused:
        sys.exit(f"{folder}: tensors without a site: {sorted(unused)[:3]}")
    # An OrtValue borrows the array's memory: `arrays` must outlive the export.
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(values)
    adapter.export_adapter(str(target))


def _block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    out = np.zeros((sum(b.shape[0] for b in blocks), sum(b.shape[1] for b in blocks)), np.float32)
    row = column = 0
    for block in blocks:
        out[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return out


if __name__ == "__main__":
    main()
