"""The files of ONNX Runtime's web build that a page asks for."""

from __future__ import annotations

from pathlib import Path

from edgeadapt.errors import ProfileError
from edgeadapt.profiling.node_packages import find_package, install_command

PACKAGE = "onnxruntime-web"
_FILES = {
    "wasm": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    "webgpu": ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
}
PROVIDERS = tuple(_FILES)


def runtime_files(provider: str) -> dict[str, Path]:
    """Return the files for a provider by their names.

    Raises:
        ProfileError: if the package is missing, or of a version that has other files.
    """
    package = find_package(PACKAGE)
    found = {name: package / "dist" / name for name in _FILES[provider]}
    for path in found.values():
        if not path.is_file():
            raise ProfileError(
                f"{package} has no file dist/{path.name}: it is another version than this one was made for",
                hint=install_command(PACKAGE, str(package.parents[1])),
            )
    return found
