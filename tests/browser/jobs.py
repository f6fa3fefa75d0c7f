"""Job folders of tiny bundles whose goldens are numpy's: an answer of a runtime is checked against plain arithmetic."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from onnx import helper
from safetensors.numpy import save_file

from edgeadapt.bundle import open_bundle
from edgeadapt.device import Device

Array = np.ndarray[Any, Any]
PROMPT, NEW, REPEATS, SWAPS = 5, 3, 2, 4


@dataclass
class Tensors:
    arrays: dict[str, Array] = field(default_factory=dict)

    def add(self, arrays: Mapping[str, Array]) -> dict[str, str]:
        names = {}
        for name, value in arrays.items():
            names[name] = f"{len(self.arrays)}:{name}"
            self.arrays[names[name]] = np.ascontiguousarray(value)
        return names


def decoder_bundle(path: Path, tiny: ModuleType, bundles: ModuleType, bits: int | None, monkeypatch: Any) -> Any:
    """Write a decoder's bundle with adapters a and b, its products in float32 or MatMulNBits; return its reference."""
    if bits is not None:
        monkeypatch.setattr(tiny, "GraphWriter", writer_of(tiny.GraphWriter, bits))
        # as bundles are exported
        monkeypatch.setattr(tiny, "OPSETS", [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)])
    sites = tiny.decoder_sites(tiny.DecoderShape())
    adapters = {"a": tiny.low_rank(sites, 4, 11), "b": tiny.low_rank(sites, 2, 12)}
    shape, weights = bundles.write_decoder(path, adapters)
    for site in sites if bits is not None else ():
        weights[f"{site}.weight"] = rounded(weights[f"{site}.weight"], bits)[2]
    return lambda ids, adapter: tiny.decoder_reference(shape, weights, ids, adapters.get(adapter))


def writer_of(plain: type, bits: int) -> type:
    class Writer(plain):
        """Writes products as the schemes int8 and int4 do."""

        def linear(self, x: str, site: str) -> str:
            weight = self.weights[f"{site}.weight"]
            codes, scales, _ = rounded(weight, bits)
            self.constant(f"{site}.codes", codes)
            self.constant(f"{site}.scales", scales)
            rows, columns = weight.shape
            sizes = {"K": columns, "N": rows, "bits": bits, "block_size": 32, "accuracy_level": 4}
            y = self.op("MatMulNBits", [x, f"{site}.codes", f"{site}.scales"], f"{site}.y", "com.microsoft", **sizes)
            if not self.slots:
                return y
            a = self.slot(f"{site}.lora_A", np.zeros((columns, 0), np.float32), [columns, "rank"])
            b = self.slot(f"{site}.lora_B", np.zeros((0, rows), np.float32), ["rank", rows])
            xa = self.op("MatMul", [x, a], f"{site}.xa")
            return self.op("Add", [y, self.op("MatMul", [xa, b], f"{site}.xab")], f"{site}.adapted")

    return Writer


def rounded(weight: Array, bits: int) -> tuple[Array, Array, Array]:
    """float32[out, in] -> codes uint8[out, blocks, bytes], scales float32[out, blocks], and what they stand for."""
    rows, columns = weight.shape
    blocks = -(-columns // 32)
    padded = np.zeros((rows, blocks, 32), np.float32)
    padded.reshape(rows, -1)[:, :columns] = weight
    middle = 2 ** (bits - 1)
    scales = np.maximum(np.abs(padded).max(-1), 1e-6) / (middle - 1)
    codes = np.clip(np.rint(padded / scales[..., None]) + middle, 0, 2 * middle - 1).astype(np.uint8)
    values = (codes.astype(np.float32) - middle) * scales[..., None]
    packed = codes if bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4
    return packed, scales.astype(np.float32), values.reshape(rows, -1)[:, :columns].astype(np.float32)


def write_decoder_job(
    folder: Path, bundle: Path, runtime: ModuleType, device: Device, reference: Any, **changes: Any
) -> dict[str, Any]:
    """Write a job of a decoder; `changes` go into job.json."""
    ids = np.random.default_rng(1).integers(0, 256, (1, 9))
    checks = [
        (name, {"input_ids": ids}, {"logits": reference(ids[0], name).astype(np.float32)[None]})
        for name in (None, "a", "b")
    ]
    decoder = {
        "cache": [
            {"past": f"past_key_values.{name}", "present": f"present.{name}"}
            for name in ("0.key", "0.value", "1.key", "1.value")
        ],
        "heads": 2,
        "head_dim": 16,
        "dtype": "float32",
        "max_length": 64,
        "vocab_size": 300,
        "shared": True,
        "logits_from": True,
        "start_ids": None,
    }
    return _write(folder, bundle, runtime, device, checks, {"decoder": decoder, **changes}, {})


def write_pass_job(
    folder: Path, bundle: Path, runtime: ModuleType, device: Device, reference: Any, **changes: Any
) -> dict[str, Any]:
    """Write a job of the text classifier."""
    rng = np.random.default_rng(2)
    inputs = {"input_ids": rng.integers(0, 256, (2, 7)), "attention_mask": np.ones((2, 7), np.int64)}
    inputs["attention_mask"][1, 4:] = 0
    checks = [(name, inputs, {"logits": reference(inputs, name).astype(np.float32)}) for name in (None, "a")]
    return _write(folder, bundle, runtime, device, checks, {"decoder": None, **changes}, inputs)


def _write(
    folder: Path,
    bundle: Path,
    runtime: ModuleType,
    device: Device,
    checks: list[Any],
    changes: dict[str, Any],
    inputs: dict[str, Array],
) -> dict[str, Any]:
    opened = open_bundle(bundle)
    folder.mkdir()
    models = runtime.prepare(opened, device, folder, None)
    tensors = Tensors()
    job = {
        "schema": "edgeadapt.job/1",
        "engine": runtime.ENGINE,
        "options": dict(models.options),
        "models": dict(models.files),
        "adapters": {name: tensors.add(opened.graph_tensors(name)) for name in opened.adapter_names},
        "checks": [
            {"adapter": name, "inputs": tensors.add(fed), "outputs": tensors.add(wanted)}
            for name, fed, wanted in checks
        ],
        "inputs": tensors.add(inputs),
        "answers": ["logits"],
        "workload": {
            "prompt_tokens": [PROMPT, 2],
            "new_tokens": NEW,
            "repeats": REPEATS,
            "batch_size": 1,
            "swaps": SWAPS,
        },
        "active": None,
        "tax_adapter": "a",
        "others": [name for name in opened.adapter_names if name != changes.get("active")],
        "notes": ["from the host", *models.notes],
        **changes,
    }
    if job["decoder"] is not None:
        job["answers"] += [pair["present"] for pair in job["decoder"]["cache"]]
    save_file(tensors.arrays, folder / "tensors.safetensors")
    (folder / "job.json").write_text(json.dumps(job))
    return job
