"""Names that a bundle may use: adapters and file paths, the same on every system."""

from __future__ import annotations

import re
from collections.abc import Iterable

from edgeadapt.errors import BundleError

ADAPTER_FILES = ("adapter.json", "adapter.onnx_adapter", "golden.safetensors")
PATCH_FILE = "patch.bin"
"""Beside an adapter's files, if the export made one."""
MANIFEST_FILE = "manifest.json"
RESERVED_NAMES = ("base", "none")
"""Names for the bare base wherever an adapter is chosen."""

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DEVICE_NAME = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')


def check_adapter_name(name: str, taken: Iterable[str] = ()) -> None:
    """Refuse a name that is not 1 to 64 of A-Z a-z 0-9 . _ -, is reserved, or is taken but for its case.

    Raises:
        BundleError: naming the rule.
    """
    hint = "choose another name with --name"
    if not _ADAPTER_NAME.fullmatch(name) or name.endswith("."):
        raise BundleError(
            f"adapter name {name!r}: 1 to 64 letters, digits and . _ - are allowed, first a letter or digit, "
            "last not a dot",
            hint=hint,
        )
    if name.lower() in RESERVED_NAMES:
        raise BundleError(f"adapter name {name!r} stands for the bare base", hint=hint)
    if _DEVICE_NAME.fullmatch(name):
        raise BundleError(f"adapter name {name!r} cannot be a folder on Windows", hint=hint)
    for other in taken:
        if other != name and other.lower() == name.lower():
            raise BundleError(
                f"adapter name {name!r} differs from {other!r} only in case: one folder on Windows and macOS", hint=hint
            )


def check_file_path(path: str, where: str) -> None:
    """Refuse a path that is not a plain relative one with forward slashes.

    Raises:
        BundleError: naming `where` and the path.
    """
    parts = path.split("/")
    wrong = any(part in ("", ".", "..") or part.startswith(".") or part.endswith((" ", ".")) for part in parts)
    device = any(_DEVICE_NAME.fullmatch(part) for part in parts)
    if wrong or device or _FORBIDDEN.search(path) or any(len(part.encode()) > 255 for part in parts):
        raise BundleError(
            f"{where}: {path!r} is not a path that a bundle may hold",
            hint="paths are relative, with / and without .., hidden names or characters that Windows refuses",
        )
