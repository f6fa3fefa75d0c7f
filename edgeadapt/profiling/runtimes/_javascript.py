"""What ONNX Runtime's JavaScript API needs of a bundle, in node and on the web."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from edgeadapt.bundle import Bundle
from edgeadapt.profiling.runtimes._required import required_graphs

_DEFAULTS = "model/defaults.safetensors"


def write_graphs(bundle: Bundle, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Write a bundle's graphs for this API into a job's folder.

    Returns:
        Files by "plain" and "slots"; the engine's option `defaults`, which names a file with the values of the inputs
        that were optional.

    Raises:
        ProfileError: if the bundle has several graphs.
        BundleError: if its files are damaged.
    """
    files, defaults = required_graphs(bundle, folder)
    if not defaults:
        return files, {}
    save_file({name: np.asarray(value, order="C") for name, value in defaults.items()}, folder / _DEFAULTS)
    return files, {"defaults": _DEFAULTS}


def external_files(bundle: Bundle) -> list[str]:
    """Return the files of weights beside the graphs, by their paths in the job's folder."""
    weights = [path for path, record in bundle.manifest.files.items() if record.role == "weights"]
    return sorted(f"model/{Path(path).name}" for path in weights)
