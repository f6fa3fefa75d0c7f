"""`adapters/NAME/adapter.json`: what one adapter's tensors are, for readers that look at the folder alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeadapt.bundle.manifest import AdapterRecord
from edgeadapt.errors import BundleError
from edgeadapt.fields import from_mapping, to_mapping
from edgeadapt.files import canonical_json, parse_json, read_bytes

SCHEMA = "edgeadapt.adapter/1"
_MAX_BYTES = 2**26


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of `adapter.onnx_adapter`: dtype ("float32", "float16", "int8") and shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class AdapterJson:
    """The content of `adapter.json`.

    base_fingerprint: of the bundle that the adapter was made for
    record: the same as in the manifest; tensors: by graph input name
    """

    schema: str
    name: str
    base_fingerprint: str
    record: AdapterRecord
    tensors: Mapping[str, TensorRecord]


def dump_adapter_json(content: AdapterJson) -> bytes:
    """Return the bytes of `adapter.json`."""
    return canonical_json(to_mapping(content))


def read_adapter_json(path: Path) -> AdapterJson:
    """Return the content of the file at `path`.

    Raises:
        BundleError: if it is damaged or of another format.
        FileError: if it cannot be read.
    """
    data = parse_json(read_bytes(path, max_bytes=_MAX_BYTES), str(path), BundleError)
    content = from_mapping(AdapterJson, data, str(path), BundleError)
    if content.schema != SCHEMA:
        raise BundleError(
            f"{path}: schema is {content.schema!r}, must be {SCHEMA!r}", hint="remove the adapter and add it again"
        )
    return content
