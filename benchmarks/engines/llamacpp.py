"""llama.cpp through llama-cpp-python, built from source for this CPU, LoRA converted to GGUF (float16).

The Python class takes one LoRA at construction and switches mmap off, so the C functions are called directly. There is
no wheel, and the converters are in the source package only. Q4_1 is the file that the base comes in: its quality beside
the others' is flattered, because the float32 reference is that file dequantized.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

LABEL = "llama.cpp"
PACKAGES = (
    ("scikit-build-core", "cmake", "ninja", "numpy", "diskcache", "jinja2", "typing_extensions"),
    ("torch==2.13.0",),
    ("torch==2.13.0", "transformers==4.57.6", "safetensors", "sentencepiece", "protobuf", "pyyaml", "requests"),
)
SOURCE = "llama-cpp-python==0.3.36"
"""Built from its source package, which stays in the environment's folder source/ for its converters."""
_NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
"""Its AMX products use tile registers, which a virtual machine need not allow: they crash at the first prompt."""
_FLAGS = f'-DCMAKE_C_FLAGS="{_NO_AMX}" -DCMAKE_CXX_FLAGS="{_NO_AMX}" ' if platform.machine() == "x86_64" else ""
BUILD = {
    "CMAKE_ARGS": f"{_FLAGS}-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF "
    "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_CURL=OFF"
}
MODULES = ("numpy", "llama_cpp")
VERSIONS = ("llama-cpp-python",)
SWITCHES_AT_ONCE = True
WHOLE = False
EVERY = 1
CONFIGURATIONS: dict[str, dict[str, Any]] = {"Q8_0": {"ftype": 7}, "Q4_0": {"ftype": 2}, "Q4_1": {}}
CONTEXT = 1024


def prepare(configuration: str, base: str, checkpoint: str, adapters: dict[str, str], folder: str) -> None:
    """Convert the float32 checkpoint to GGUF and quantize it; convert the adapters."""
    import llama_cpp

    target, (source,) = Path(folder), (Path(sys.prefix) / "source").glob("*/vendor/llama.cpp")
    if "ftype" in CONFIGURATIONS[configuration]:
        float32 = target / "float32.gguf"
        _run(source / "convert_hf_to_gguf.py", checkpoint, "--outtype", "f32", "--outfile", str(float32))
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.nthread = CONFIGURATIONS[configuration]["ftype"], os.cpu_count() or 1
        out = str(target / "model.gguf").encode()
        if llama_cpp.llama_model_quantize(str(float32).encode(), out, ctypes.byref(parameters)):
            raise RuntimeError(f"llama_model_quantize to {configuration} failed")
        float32.unlink()
    else:
        (target / "model.gguf").symlink_to(Path(base).resolve())
    for name, path in adapters.items():
        outfile = str(target / f"{name}.gguf")
        _run(source / "convert_lora_to_gguf.py", path, "--base", checkpoint, "--outtype", "f16", "--outfile", outfile)


def files(folder: Path, adapter: str) -> dict[str, list[Path]]:
    """The files of the base and of one adapter."""
    return {"base": [folder / "model.gguf"], "adapter": [folder / f"{adapter}.gguf"]}


class Engine:
    """One model and one context."""

    def __init__(self, configuration: str, folder: Path, threads: int, adapters: dict[str, str]) -> None:
        import llama_cpp

        del configuration
        self._c: Any = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda *_: None)  # it says a line for each tensor of each adapter
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p())
        self._folder = folder
        self._model = llama_cpp.llama_model_load_from_file(
            str(folder / "model.gguf").encode(), llama_cpp.llama_model_default_params()
        )
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = CONTEXT, 512, 512
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._model or not self._context:
            raise RuntimeError(f"llama.cpp cannot open {folder / 'model.gguf'}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._adapters: dict[str, Any] = {}
        self._token = 0
        if adapters:
            self.use(next(iter(adapters)))

    def use(self, adapter: str | None) -> None:
        """Make an adapter active, loading it if it is not loaded."""
        if adapter is None:
            self._set([])
            return
        if adapter not in self._adapters:
            path = str(self._folder / f"{adapter}.gguf").encode()
            self._adapters[adapter] = self._c.llama_adapter_lora_init(self._model, path)
            if not self._adapters[adapter]:
                raise RuntimeError(f"llama.cpp cannot load {adapter}.gguf")
        self._set([self._adapters[adapter]])

    def forget(self, adapter: str) -> None:
        """Free an adapter."""
        if adapter in self._adapters:
            self._set([])
            self._c.llama_adapter_lora_free(self._adapters.pop(adapter))

    def prefill(self, ids: list[int], room: int) -> int:
        """Read a prompt into an empty context; the first token."""
        del room
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        self._token = self._next(ids)
        return self._token

    def decode(self, count: int) -> list[int]:
        """`count` more tokens."""
        tokens = []
        for _ in range(count):
            self._token = self._next([self._token])
            tokens.append(self._token)
        return tokens

    def logits(self, ids: list[int]) -> Any:
        """Logits at every position."""
        import numpy as np

        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        batch = self._c.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
        self._check(self._c.llama_decode(self._context, batch))
        shape = (len(ids), self._vocabulary)
        found = np.ctypeslib.as_array(self._c.llama_get_logits(self._context), shape=shape).copy()
        self._c.llama_batch_free(batch)
        return found

    def _next(self, ids: list[int]) -> int:
        import numpy as np

        tokens = (self._c.llama_token * len(ids))(*ids)  # the batch only borrows it
        self._check(self._c.llama_decode(self._context, self._c.llama_batch_get_one(tokens, len(ids))))
        logits = self._c.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())

    def _set(self, adapters: list[Any]) -> None:
        handles = (self._c.llama_adapter_lora_p_ctypes * len(adapters))(*adapters)
        scales = (ctypes.c_float * len(adapters))(*[1.0] * len(adapters))
        self._check(self._c.llama_set_adapters_lora(self._context, handles, len(adapters), scales))

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"llama.cpp answers {status}")


def _run(script: Path, *arguments: str) -> None:
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{script.name}: {done.stderr.strip()[-2000:]}")
