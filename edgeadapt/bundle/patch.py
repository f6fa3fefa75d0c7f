"""`adapters/NAME/patch.bin`: what an adapter, merged and rounded on the base's own grid, changes in the base's files.

Few codes change, by one step mostly. So a region holds the distances between changed codes, a byte each, and two bits
for what each is changed by, both coded by zlib with Huffman codes alone: measured within 1 % of the entropy.

    bytes 0-7     "EAPATCH1"
    bytes 8-11    length of the header, little endian
    header        zlib, JSON: the fields of `Patch`
    body          the regions' streams, one after the other in the order of the header

docs/formats/bundle-1.md is the normative text. What is read here may come from anywhere: every length is checked before
memory is taken for it.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle.manifest import Manifest
from edgeadapt.errors import BundleError
from edgeadapt.fields import from_mapping, to_mapping
from edgeadapt.files import canonical_json, parse_json

Bytes = NDArray[np.uint8]
Streams = tuple["Region", bytes, bytes]
"""A region with its two streams."""

SCHEMA = "edgeadapt.patch/1"
MAGIC = b"EAPATCH1"
REGION_BYTES = 2**22
"""A region's largest length, so that a reader needs little memory beyond the file that it changes."""

_MAX_HEADER_BYTES = 2**24
_OTHER = 2
_SHIFTS = np.array([0, 2, 4, 6], np.uint8)
_KINDS = np.arange(256, dtype=np.uint8)[:, None] >> _SHIFTS & 3
_IS_KINDS: NDArray[np.bool_] = np.all(_KINDS <= _OTHER, axis=1)
_FOUR = {bits: np.array([1, 2**bits - 1, 0, 0], np.uint8)[_KINDS] for bits in (4, 8)}
"""What a byte of four kinds of change adds to the four codes; 0 where the kind does not tell."""
_LONGEST_STEP = 255
_HINT = "export the bundle again with --patches"


@dataclass(frozen=True)
class Region:
    """Changes of one run of bytes.

    offset, length: in bytes of the file
    bits: of a code: 4 (two a byte, the first in the low half) or 8; 0 where the bytes are replaced whole
    changed: how many codes change (replaced: the bytes)
    steps, changes: lengths in bytes of the two streams: distances between changed codes, and by how much each changes
    """

    offset: int
    length: int
    bits: int
    changed: int
    steps: int
    changes: int

    @property
    def codes(self) -> int:
        """How many codes the region holds (replaced: bytes)."""
        return self.length * 8 // self.bits if self.bits else self.length


@dataclass(frozen=True)
class PatchedFile:
    """One file of the bundle: its size, its SHA-256 without and with the patch, and its regions in order."""

    path: str
    size: int
    sha256: str
    patched_sha256: str
    regions: tuple[Region, ...]


@dataclass(frozen=True)
class Patch:
    """The header of a patch: `changed` of `codes` codes change; no coding without a model needs `entropy_bytes`.

    entropy_bytes: codes times the entropy of "unchanged, or changed by how much", plus the replaced bytes
    """

    schema: str
    codes: int
    changed: int
    entropy_bytes: int
    files: tuple[PatchedFile, ...]


@dataclass(frozen=True)
class Change:
    """New values for a run of bytes of a file: uint8[length] before and after; `bits` as in `Region`."""

    offset: int
    bits: int
    before: Bytes
    after: Bytes


class PatchWriter:
    """Collects changes, file by file, and gives the patch's bytes."""

    def __init__(self) -> None:
        self._files: list[PatchedFile] = []
        self._body: list[bytes] = []
        self._counts = {4: np.zeros(16, np.int64), 8: np.zeros(256, np.int64)}
        self._replaced = 0

    def add(self, path: str, size: int, sha256: str, patched_sha256: str, changes: Sequence[Change]) -> None:
        """Add one file's changes, in the order of their offsets."""
        regions: list[Region] = []
        for change in changes:
            for first in range(0, len(change.before), REGION_BYTES):
                part = slice(first, first + REGION_BYTES)
                region = self._region(change.offset + first, change.bits, change.before[part], change.after[part])
                if region is not None:
                    regions.append(region)
        if regions:
            self._files.append(PatchedFile(path, size, sha256, patched_sha256, tuple(regions)))

    def done(self) -> tuple[Patch, bytes]:
        """Return the header and the file's bytes.

        Raises:
            BundleError: if nothing changes.
        """
        if not self._files:
            raise BundleError("the adapter changes no code of the base", hint="train it longer, or leave patches out")
        codes = int(sum(counts.sum() for counts in self._counts.values())) + self._replaced
        same = int(sum(counts[0] for counts in self._counts.values()))
        entropy = sum(_entropy_bytes(counts) for counts in self._counts.values()) + self._replaced
        patch = Patch(SCHEMA, codes, codes - same, math.ceil(entropy), tuple(self._files))
        header = zlib.compress(canonical_json(to_mapping(patch)), 9)
        return patch, b"".join([MAGIC, struct.pack("<I", len(header)), header, *self._body])

    def _region(self, offset: int, bits: int, before: Bytes, after: Bytes) -> Region | None:
        if not bits:
            self._replaced += len(after)
            data = zlib.compress(after.tobytes(), 9)
            self._body.append(data)
            return Region(offset, len(after), 0, len(after), 0, len(data))
        delta = _unpacked(after, bits) - _unpacked(before, bits) & np.uint8(2**bits - 1)
        self._counts[bits] += np.bincount(delta, minlength=2**bits)
        places = np.flatnonzero(delta)
        if not len(places):
            return None
        steps, changes = _huffman(_steps(places)), _huffman(_kinds(delta[places], bits))
        self._body += [steps, changes]
        return Region(offset, len(before), bits, len(places), len(steps), len(changes))


def parse_patch(data: bytes, where: str, manifest: Manifest) -> tuple[Patch, list[Iterator[Streams]]]:
    """Return a patch's header, and for each of its files the regions with their two streams.

    Raises:
        BundleError: if it is damaged, or not of this bundle's files.
    """
    patch, body = _read_header(data, where)
    _check(patch, body, where)
    _check_files(patch, where, manifest)
    streams = []
    first = 0
    for file in patch.files:
        streams.append(_streams(data, len(data) - body + first, file.regions))
        first += sum(region.steps + region.changes for region in file.regions)
    return patch, streams


def apply_region(target: Bytes, region: Region, steps: bytes, changes: bytes, where: str) -> None:
    """Change the region's bytes `target` uint8[length] in place.

    Raises:
        BundleError: if the streams are damaged; `target` may then be half changed.
    """
    if not region.bits:
        target[:] = _inflate(changes, region.length, where, zlib.MAX_WBITS)
        return
    places = _places(_inflate_up_to(steps, region.changed + region.codes // _LONGEST_STEP, where), region, where)
    quarter = -(-region.changed // 4)
    added = np.zeros(region.codes, np.uint8)
    added[places] = _delta(_inflate_up_to(changes, quarter + region.changed, where), region, where)
    if region.bits == 8:
        target += added
    else:
        low = target + added[::2] & 0x0F
        target += added[1::2] << 4
        target &= 0xF0
        target |= low


def _read_header(data: bytes, where: str) -> tuple[Patch, int]:
    """Return the header and the body's length."""
    if len(data) < len(MAGIC) + 4 or data[: len(MAGIC)] != MAGIC:
        raise _damaged(where, "it does not begin as one")
    (length,) = struct.unpack_from("<I", data, len(MAGIC))
    first = len(MAGIC) + 4
    if length > len(data) - first:
        raise _damaged(where, f"its header of {length} bytes does not fit")
    text = _inflate_up_to(data[first : first + length], _MAX_HEADER_BYTES, where, zlib.MAX_WBITS)
    content = parse_json(text.tobytes(), where, BundleError)
    patch = from_mapping(Patch, content, where, BundleError)
    if patch.schema != SCHEMA:
        raise BundleError(f"{where}: schema is {patch.schema!r}, must be {SCHEMA!r}", hint=_HINT)
    return patch, len(data) - first - length


def _check(patch: Patch, body: int, where: str) -> None:
    regions = [region for file in patch.files for region in file.regions]
    for region in regions:
        if not _is_possible(region):
            raise _damaged(where, f"there is no such region: {region}")
    for file in patch.files:
        end = 0
        for region in file.regions:
            if region.offset < end:
                raise _damaged(where, f"a region of {file.path} at {region.offset} overlaps the one before")
            end = region.offset + region.length
        if not 0 < end <= file.size:
            raise _damaged(where, f"its regions end at {end}, {file.path} has {file.size} bytes")
    needed = sum(region.steps + region.changes for region in regions)
    if needed != body or not regions:
        raise _damaged(where, f"its regions have {needed} bytes, its body {body}")


def _is_possible(region: Region) -> bool:
    sizes = 0 < region.length <= REGION_BYTES and region.offset >= 0 and region.bits in {0, 4, 8}
    streams = region.changes > 0 and (region.steps > 0 if region.bits else region.steps == 0)
    return sizes and streams and 0 < region.changed <= region.codes


def _check_files(patch: Patch, where: str, manifest: Manifest) -> None:
    """Check that the patch is for this bundle's weights and plain graphs."""
    allowed = {path for path, record in manifest.files.items() if record.role == "weights"}
    allowed |= {graph.plain for graph in manifest.graphs.values()}
    paths = [file.path for file in patch.files]
    if len(set(paths)) < len(paths):
        raise _damaged(where, "it names a file twice")
    for file in patch.files:
        if file.path not in allowed:
            raise _damaged(where, f"it changes {file.path!r}, which is no weights file and no plain graph")
        record = manifest.files[file.path]
        if (file.size, file.sha256) != (record.size, record.sha256):
            raise BundleError(f"{where}: made for another {file.path} than the bundle's", hint=_HINT)


def _streams(data: bytes, first: int, regions: Sequence[Region]) -> Iterator[Streams]:
    for region in regions:
        middle = first + region.steps
        last = middle + region.changes
        yield region, data[first:middle], data[middle:last]
        first = last


def _unpacked(values: Bytes, bits: int) -> Bytes:
    """Return one code a byte."""
    return values if bits == 8 else np.stack([values & 0x0F, values >> 4], axis=1).reshape(-1)


def _steps(places: NDArray[np.intp]) -> Bytes:
    """Return how many codes are skipped before each changed one, 255 for "255, and more follow"."""
    skipped = np.diff(places, prepend=-1) - 1
    full = skipped // _LONGEST_STEP
    result = np.full(int((full + 1).sum()), _LONGEST_STEP, np.uint8)
    result[np.cumsum(full + 1) - 1] = skipped % _LONGEST_STEP
    return result


def _places(steps: Bytes, region: Region, where: str) -> NDArray[np.int32]:
    """Return the changed codes' places in the region, int32[changed], rising."""
    ends = np.flatnonzero(steps != _LONGEST_STEP)
    if len(ends) != region.changed or not len(steps) or steps[-1] == _LONGEST_STEP:
        raise _damaged(where, f"{len(ends)} places for {region.changed} changes")
    last = int(steps.sum(dtype=np.int64)) + region.changed - 1
    if last >= region.codes:
        raise _damaged(where, f"code {last} of {region.codes}")
    places = np.cumsum(steps, dtype=np.int32)
    if len(steps) > region.changed:
        places = places[ends]
    return np.asarray(places + np.arange(region.changed, dtype=np.int32), np.int32)


def _kinds(delta: Bytes, bits: int) -> Bytes:
    """Return two bits a change, the first lowest: 0 for one up, 1 for one down, 2 for another; then the others."""
    kinds = np.select([delta == 1, delta == 2**bits - 1], [0, 1], 2).astype(np.uint8)
    others = delta[kinds == _OTHER]
    four = np.concatenate([kinds, np.zeros(-len(kinds) % 4, np.uint8)]).reshape(-1, 4) << _SHIFTS
    return np.concatenate([np.bitwise_or.reduce(four, axis=1), others])


def _delta(values: Bytes, region: Region, where: str) -> Bytes:
    """Return what is added to each changed code, uint8[changed]."""
    quarter = -(-region.changed // 4)
    delta = _FOUR[region.bits][values[:quarter]].reshape(-1)[: region.changed]
    places = np.flatnonzero(delta == 0)
    others = values[quarter:]
    unused = values[quarter - 1] >> 2 * ((region.changed - 1) % 4 + 1) if len(values) >= quarter else 1
    if unused or not _IS_KINDS[values[:quarter]].all() or len(others) != len(places):
        raise _damaged(where, f"{len(values)} bytes are not what {region.changed} codes are changed by")
    if not others.all() or (len(others) and others.max() >= 2**region.bits):
        raise _damaged(where, "a code is changed by nothing, or by more than there are codes")
    delta[places] = others
    return np.asarray(delta, np.uint8)


def _huffman(values: Bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(values.tobytes()) + coder.flush()


def _inflate(data: bytes, length: int, where: str, bits: int) -> Bytes:
    result = _inflate_up_to(data, length, where, bits)
    if len(result) != length:
        raise _damaged(where, f"a stream holds {len(result)} bytes instead of {length}")
    return result


def _inflate_up_to(data: bytes, limit: int, where: str, bits: int = -zlib.MAX_WBITS) -> Bytes:
    coder = zlib.decompressobj(bits)
    try:
        result = coder.decompress(data, limit + 1)
    except zlib.error as error:
        raise _damaged(where, str(error)) from error
    if len(result) > limit or not coder.eof or coder.unused_data:
        raise _damaged(where, f"a stream has no end within {limit} bytes")
    return np.frombuffer(result, np.uint8)


def _entropy_bytes(counts: NDArray[np.int64]) -> float:
    total = counts.sum()
    found = counts[counts > 0]
    return float(-(found * np.log2(found / total)).sum() / 8) if total else 0.0


def _damaged(where: str, problem: str) -> BundleError:
    return BundleError(f"{where} is no sound patch: {problem}", hint=_HINT)
