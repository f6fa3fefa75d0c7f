"""Where npm packages lie that a measurement needs, and the command that installs them."""

from __future__ import annotations

import os
from pathlib import Path

from edgeadapt.errors import ProfileError
from edgeadapt.runtime.device_cache import cache_folder

MODULES_VARIABLE = "EDGEADAPT_NODE_MODULES"
VERSIONS = {"onnxruntime-node": "1.30.0", "onnxruntime-web": "1.30.0"}


def find_package(name: str) -> Path:
    """Return the folder of a package: below the one that the environment names, else in ./node_modules or the cache.

    Raises:
        ProfileError: if it is in none of them, with the command that installs it.
    """
    places = _places()
    for place in places:
        for folder in (place / "node_modules" / name, place / name):
            if (folder / "package.json").is_file():
                return folder
    raise ProfileError(
        f"the npm package {name} is not installed in {' or '.join(str(place) for place in places)}",
        hint=install_command(name, str(places[-1])),
    )


def install_command(name: str, folder: str) -> str:
    """Return the command that installs a package, without its script: that fetches CUDA libraries."""
    return f"npm install --ignore-scripts --prefix '{folder}' {name}@{VERSIONS[name]}"


def _places() -> list[Path]:
    """Return where packages may lie; a new one belongs in the last."""
    named = os.environ.get(MODULES_VARIABLE)
    return [Path(named).absolute()] if named else [Path.cwd(), cache_folder() / "npm"]
