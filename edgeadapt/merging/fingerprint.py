"""What identifies a base: the SHA-256 of each weight that an adapter may change."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

from edgeadapt.adapters.adapter import Array
from edgeadapt.adapters.fingerprint import FILE_NAME, SCHEMA
from edgeadapt.errors import AdapterError
from edgeadapt.files import canonical_json, write_atomically
from edgeadapt.merging.base_model import BaseModel


def module_digest(weight: torch.Tensor | Array) -> str:
    """Return the SHA-256 of `weight` as little-endian float32 bytes in C order, in hexadecimal."""
    array = weight.detach().cpu().numpy() if isinstance(weight, torch.Tensor) else weight
    plain = np.ascontiguousarray(array, dtype="<f4")
    return hashlib.sha256(plain.reshape(-1).view(np.uint8).data).hexdigest()


def stamp_base(adapter_folder: Path, base: BaseModel) -> Path:
    """Write `base_fingerprint.json` into an adapter's folder and return its path.

    It names the base and holds the digest of every weight that an adapter may change, so that the adapter is later
    refused on any other base. Call it where the adapter was trained, with the base that it was trained on.

    Raises:
        AdapterError: if the folder does not exist or holds no adapter.
    """
    folder = Path(adapter_folder)
    if not (folder / "adapter_config.json").is_file():
        raise AdapterError(
            f"{folder} holds no adapter_config.json, so there is no adapter to stamp",
            hint="give the folder that the adapter was saved to",
        )
    record = {
        "schema": SCHEMA,
        "name": base.name,
        "revision": base.revision,
        "quantization": base.quantized_from,
        "parameters": {f"{path}.weight": module.digest for path, module in base.modules.items()},
    }
    target = folder / FILE_NAME
    write_atomically(target, canonical_json(record))
    return target
