"""OpenVINO GenAI on the CPU, its own precision (bfloat16 where the CPU has it), LoRA in MODE_DYNAMIC.

MODE_DYNAMIC is the mode that can swap; MODE_STATIC holds one adapter, MODE_FUSE fails on compressed weights. OpenVINO
does not read adapter_config.json: without alpha / r by hand the LoRA has the wrong strength, silently. Group size 128,
the exporter's own for int4, does not divide this model's width; 64 does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LABEL = "OpenVINO GenAI"
PACKAGES = (
    ("torch==2.13.0",),
    # With its dependencies, optimum-intel replaces the CPU's torch by gigabytes of another build.
    ("torch==2.13.0", "openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0",
     "transformers==4.57.6", "nncf==3.4.0", "onnx", "safetensors"),
    ("--no-deps", "optimum==2.1.0", "optimum-intel==2.2.0"),
)  # fmt: skip
MODULES = ("numpy", "openvino_genai")
VERSIONS = ("openvino", "openvino-genai", "optimum-intel", "nncf")
SWITCHES_AT_ONCE = False  # a switch happens inside the next call
WHOLE = True  # no way to ask for one token at a time
EVERY = 1
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "int8": {"flags": ["--weight-format", "int8"]},
    "int4": {"flags": ["--weight-format", "int4", "--group-size", "64"]},
}


def prepare(configuration: str, base: str, checkpoint: str, adapters: dict[str, str], folder: str) -> None:
    """Export the base with optimum-intel; the adapters are PEFT's own files."""
    del base
    program = str(Path(sys.executable).with_name("optimum-cli"))
    command = [program, "export", "openvino", "-m", checkpoint, "--task", "text-generation-with-past"]
    command += [*CONFIGURATIONS[configuration]["flags"], f"{folder}/model"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-2000:])
    Path(folder, "adapters.json").write_text(json.dumps(adapters), encoding="utf-8")


def files(folder: Path, adapter: str) -> dict[str, list[Path]]:
    """The files of the base and of one adapter."""
    adapters = json.loads((folder / "adapters.json").read_text(encoding="utf-8"))
    return {
        "base": [folder / "model" / f"openvino_model.{end}" for end in ("xml", "bin")],
        "adapter": [Path(adapters[adapter]) / "adapter_model.safetensors"],
    }


class Engine:
    """One pipeline, with all adapters if there are any."""

    def __init__(self, configuration: str, folder: Path, threads: int, adapters: dict[str, str]) -> None:
        import openvino_genai as ov

        del configuration
        self._folder, self._settings = folder / "model", {"INFERENCE_NUM_THREADS": threads}
        self._paths = adapters
        self._adapters = {name: self._read(name) for name in adapters}
        self._adapter: str | None = None
        settings: dict[str, Any] = dict(self._settings)
        if adapters:
            mode = ov.AdapterConfig.Mode.MODE_DYNAMIC
            settings["adapters"] = ov.AdapterConfig(list(self._adapters.values()), mode)
        self._pipeline = ov.LLMPipeline(str(self._folder), "CPU", **settings)

    def use(self, adapter: str | None) -> None:
        """Read an adapter's file if that was not done; the switch itself is part of the next call."""
        if adapter is not None and adapter not in self._adapters:
            self._adapters[adapter] = self._read(adapter)
        self._adapter = adapter

    def forget(self, adapter: str) -> None:
        """Drop an adapter."""
        self._adapters.pop(adapter, None)

    def prefill(self, ids: list[int], room: int) -> int:
        """Read a prompt; the first token."""
        del room
        return int(self._generate(ids, 1).tokens[0][0])

    def generate(self, ids: list[int], count: int) -> tuple[list[float], list[int]]:
        """`count` tokens after a prompt, and at which second each came."""
        result = self._generate(ids, count)
        raw = result.perf_metrics.raw_metrics
        times = [raw.m_times_to_first_token[0] / 1e3]  # ms
        for duration in raw.m_durations[-(count - 1) :]:  # microseconds of each further token
            times.append(times[-1] + duration / 1e6)
        tokens = [int(token) for token in result.tokens[0]]
        if len(tokens) != count or len(times) != count:
            raise RuntimeError(f"{len(tokens)} tokens with {len(times)} times instead of {count}")
        return times, tokens

    def logits(self, ids: list[int]) -> Any:
        """Not given by openvino_genai; without an adapter, by OpenVINO itself from the same file and settings."""
        if self._adapter is not None:
            return None
        import numpy as np
        import openvino

        model = openvino.Core().compile_model(self._folder / "openvino_model.xml", "CPU", self._settings)
        inputs = {
            "input_ids": np.asarray([ids], np.int64),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        wanted = {name for port in model.inputs for name in port.names}
        return model({name: value for name, value in inputs.items() if name in wanted})["logits"][0]

    def _generate(self, ids: list[int], count: int) -> Any:
        import numpy as np
        import openvino
        import openvino_genai as ov

        config = ov.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = count, True, False
        if self._adapter is not None:
            config.adapters = ov.AdapterConfig([self._adapters[self._adapter]])
        tensors = [openvino.Tensor(array) for array in (np.asarray([ids], np.int64), np.ones((1, len(ids)), np.int64))]
        return self._pipeline.generate(ov.TokenizedInputs(*tensors), config)

    def _read(self, adapter: str) -> tuple[Any, float]:
        import openvino_genai as ov

        folder = Path(self._paths[adapter])
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return ov.Adapter(str(folder / "adapter_model.safetensors")), config["lora_alpha"] / config["r"]
