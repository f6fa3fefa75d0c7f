"""A bundle's plain graphs and weights with an adapter's patch applied: in one pass, in pieces, checked by digest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle.bundle import Bundle
from edgeadapt.bundle.patch import REGION_BYTES, Streams, apply_region, parse_patch
from edgeadapt.bundle.rules import patch_path
from edgeadapt.errors import BundleError
from edgeadapt.files import write_errors

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class PatchedContent:
    """One file as the patch leaves it: its path in the bundle, size and SHA-256, and what `chunks` computes it from."""

    path: str
    size: int
    sha256: str
    source: Path
    streams: Iterable[Streams]
    where: str

    def chunks(self) -> Iterator[memoryview]:
        """Yield the file's bytes in order, once; the last is followed by the check of the digest.

        Raises:
            BundleError: if the patch or the bundle's file is damaged; what was yielded is then not to be used.
        """
        digest = hashlib.sha256()
        for piece in self._pieces():
            digest.update(piece.data)
            yield piece.data
        if digest.hexdigest() != self.sha256:
            raise BundleError(
                f"{self.where} does not make of {self.source} what the export made: one of them is damaged",
                hint="run `edgeadapt verify` on the bundle, or copy it again",
            )

    def _pieces(self) -> Iterator[Bytes]:
        with self.source.open("rb") as file:
            place = 0
            for region, steps, changes in self.streams:
                yield from self._read(file, region.offset - place)
                piece = next(self._read(file, region.length))
                apply_region(piece, region, steps, changes, self.where)
                yield piece
                place = region.offset + region.length
            yield from self._read(file, self.size - place)

    def _read(self, file: BinaryIO, count: int) -> Iterator[Bytes]:
        """Yield the next `count` bytes in pieces; a region is one piece."""
        while count > 0:
            piece = np.empty(min(count, REGION_BYTES), np.uint8)
            if file.readinto(piece.data) < len(piece):  # type: ignore[attr-defined]
                raise BundleError(f"{self.source} became shorter", hint="copy the bundle again")
            yield piece
            count -= len(piece)


def patched_files(bundle: Bundle, name: str) -> list[PatchedContent]:
    """Return the bundle's plain graphs and weights as adapter `name`'s patch leaves them; most graphs as they are.

    Raises:
        BundleError: if there is no such adapter, it has no patch, or the patch is damaged.
    """
    return patched_contents(bundle, bundle.patch_bytes(name), str(bundle.path / patch_path(name)))


def patched_contents(bundle: Bundle, data: bytes, where: str) -> list[PatchedContent]:
    """Return what `patched_files` does for a patch that is not in the bundle: `data`, called `where` in messages.

    Raises:
        BundleError: if the patch is damaged, or not of this bundle's files.
    """
    patch, streams = parse_patch(data, where, bundle.manifest)
    changed = {file.path: (file, found) for file, found in zip(patch.files, streams, strict=True)}
    weights = [path for path, record in bundle.manifest.files.items() if record.role == "weights"]
    result = []
    for path in [*weights, *(graph.plain for graph in bundle.manifest.graphs.values())]:
        record = bundle.manifest.files[path]
        digest = record.sha256
        found: Iterable[Streams] = ()
        if path in changed:
            file, found = changed[path]
            digest = file.patched_sha256
        result.append(PatchedContent(path, record.size, digest, bundle.file(path), found, where))
    return result


def write_patched(
    bundle: Bundle, name: str, folder: Path, *, check: Callable[[], None] = lambda: None
) -> dict[str, str]:
    """Write those files into `folder` under their own names, and return their SHA-256.

    Args:
        bundle: the bundle.
        name: the adapter's.
        folder: where the files go; after an error it holds nothing of use.
        check: called every few milliseconds; what it raises ends the work.

    Raises:
        BundleError: if the patch or a file of the bundle is damaged.
        FileError: if a file cannot be written.
    """
    digests = {}
    for content in patched_files(bundle, name):
        target = folder / Path(content.path).name
        with write_errors(target), target.open("xb") as file:
            for chunk in content.chunks():
                check()
                file.write(chunk)
        digests[target.name] = content.sha256
    return digests


def write_patch(folder: Path, name: str, data: bytes) -> None:
    """Write the patch of an adapter that `write_adapter` wrote to `folder`."""
    (folder / patch_path(name)).write_bytes(data)
