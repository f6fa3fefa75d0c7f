"""Patches: what is written comes back, close to the entropy; whatever else a file may hold is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import struct
import tracemalloc
import zlib

import numpy as np
import pytest

from edgeadapt.bundle import patch as format_module
from edgeadapt.bundle.add import insert_adapter, remove_adapter
from edgeadapt.bundle.bind import bind
from edgeadapt.bundle.bundle import Bundle, open_bundle
from edgeadapt.bundle.patch import Change, Patch, PatchWriter, parse_patch
from edgeadapt.bundle.patch_files import patched_contents, write_patch, write_patched
from edgeadapt.bundle.verify import Finding, verify_files
from edgeadapt.bundle.write import write_manifest
from edgeadapt.errors import BundleError
from edgeadapt.fields import to_mapping
from edgeadapt.files import canonical_json

WEIGHTS, PLAIN = "graph/weights.bin", "graph/model.plain.onnx"
PATCH = "adapters/one/patch.bin"


def codes(count: int, bits: int, share: float, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return (before, after) uint8 of which `share` of the codes go one step up or down."""
    random = np.random.default_rng(seed)
    before = random.integers(0, 2**bits, count)
    after = (before + random.choice([0, 1, -1], count, p=[1 - share, share / 2, share / 2])) % 2**bits
    packed = [x.astype(np.uint8) if bits == 8 else (x[::2] | x[1::2] << 4).astype(np.uint8) for x in (before, after)]
    return packed[0], packed[1]


@pytest.fixture
def patched(make_bundle):
    """Return a function from the new bytes of the weights file, and the changes, to a bundle whose adapter has them."""

    def make(before: np.ndarray, after: np.ndarray, changes: list[Change], *names: str) -> tuple[Bundle, bytes, Patch]:
        bundle = make_bundle("one", *names)
        (bundle.path / WEIGHTS).write_bytes(before.tobytes())
        manifest = write_manifest(bundle.path, bundle.manifest)
        writer = PatchWriter()
        record = manifest.files[WEIGHTS]
        writer.add(WEIGHTS, record.size, record.sha256, hashlib.sha256(after.tobytes()).hexdigest(), changes)
        patch, data = writer.done()
        write_patch(bundle.path, "one", data)
        write_manifest(bundle.path, manifest)
        return open_bundle(bundle.path), data, patch

    return make


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("share", [0.0002, 0.01, 0.3, 1.0])
def test_codes_come_back_in_little_more_than_their_entropy(patched, tmp_path, bits, share):
    before, after = codes(200_000, bits, share)
    bundle, data, patch = patched(before, after, [Change(0, bits, before, after)])
    assert bundle.has_patch("one")
    assert patch.codes == 200_000
    assert patch.changed == np.count_nonzero(codes(200_000, 8, share)[0] - codes(200_000, 8, share)[1])
    assert patch == bundle.patch("one")
    body = len(data) - 12 - struct.unpack_from("<I", data, 8)[0]
    # Where all codes change, the distances still cost a bit each.
    assert patch.entropy_bytes - 300 < body < patch.entropy_bytes * (1.05 if share < 1 else 2.05) + 250
    out = tmp_path / "out"
    out.mkdir()
    digests = write_patched(bundle, "one", out)
    assert (out / "weights.bin").read_bytes() == after.tobytes()
    assert (out / "model.plain.onnx").read_bytes() == (bundle.path / PLAIN).read_bytes()
    assert digests["weights.bin"] == hashlib.sha256(after).hexdigest()
    assert verify_files(bundle) == []


def test_many_regions_between_bytes_that_stay(patched, tmp_path, monkeypatch):
    monkeypatch.setattr(format_module, "REGION_BYTES", 1000)
    random = np.random.default_rng(1)
    before = random.integers(0, 256, 9000).astype(np.uint8)
    after = before.copy()
    after[2000:2500] = codes(1000, 4, 0.2)[1]
    before[2000:2500] = codes(1000, 4, 0.2)[0]
    after[3000:6500] += (random.random(3500) < 0.5).astype(np.uint8)
    after[8990:] = random.integers(0, 256, 10)
    parts = [(2000, 2500, 4), (3000, 6500, 8), (7000, 8000, 8), (8990, 9000, 0)]
    bundle, _, patch = patched(before, after, [Change(a, bits, before[a:b], after[a:b]) for a, b, bits in parts])
    found = [(region.offset, region.length, region.bits) for region in patch.files[0].regions]
    assert found == [(2000, 500, 4), (3000, 1000, 8), (4000, 1000, 8), (5000, 1000, 8), (6000, 500, 8), (8990, 10, 0)]
    out = tmp_path / "out"
    out.mkdir()
    write_patched(bundle, "one", out)
    assert (out / "weights.bin").read_bytes() == after.tobytes()


def test_nothing_to_change_is_an_error():
    before, _ = codes(100, 8, 0.5)
    writer = PatchWriter()
    writer.add(WEIGHTS, 100, "0" * 64, "0" * 64, [Change(0, 8, before, before)])
    with pytest.raises(BundleError, match="the adapter changes no code of the base"):
        writer.done()


def test_an_adapter_without_a_patch_says_how_to_get_one(make_bundle):
    bundle = make_bundle("one")
    assert not bundle.has_patch("one")
    with pytest.raises(BundleError) as caught:
        bundle.patch("one")
    assert caught.value.message == (
        "adapter 'one' has no patch: only an export with --patches makes one, from the float base"
    )
    assert caught.value.hint == "export the bundle again with --patches, or use the adapter as it is"


def test_a_patch_goes_with_its_adapter(patched, make_adapter, manifest, golden, record):
    before, after = codes(1000, 8, 0.3)
    bundle, _, _ = patched(before, after, [Change(0, 8, before, after)], "two")
    replaced = insert_adapter(bundle, "one", bind(make_adapter(seed=5), manifest), record, golden, replace=True)
    assert not replaced.has_patch("one")
    assert not (bundle.path / PATCH).exists()
    assert verify_files(replaced) == []
    bundle, _, _ = patched(before, after, [Change(0, 8, before, after)], "two")
    removed = remove_adapter(bundle, "one")
    assert not any("one" in path for path in removed.manifest.files)
    assert not (bundle.path / "adapters" / "one").exists()
    assert verify_files(removed) == []


def test_verify_applies_the_patch(patched):
    before, after = codes(1000, 8, 0.3)
    bundle, data, _ = patched(before, after, [Change(0, 8, before, after)])
    wrong = after.copy()
    wrong[500] += 1
    bundle, _, _ = patched(before, wrong, [Change(0, 8, before, after)])
    assert verify_files(bundle) == [
        Finding(
            PATCH,
            f"{bundle.path / PATCH} does not make of {bundle.path / WEIGHTS} what the export made: "
            "one of them is damaged",
        )
    ]
    (bundle.path / PATCH).write_bytes(data[:-1])
    assert [finding.path for finding in verify_files(open_bundle(bundle.path, check_files=False))] == [PATCH]


def test_a_patch_for_other_weights_is_refused(patched):
    before, after = codes(1000, 8, 0.3)
    bundle, data, _ = patched(before, after, [Change(0, 8, before, after)])
    other = dataclasses.replace(bundle.manifest.files[WEIGHTS], sha256="0" * 64)
    manifest = dataclasses.replace(bundle.manifest, files={**bundle.manifest.files, WEIGHTS: other})
    with pytest.raises(BundleError) as caught:
        parse_patch(data, "it", manifest)
    assert caught.value.message == "it: made for another graph/weights.bin than the bundle's"


def test_cancelling_ends_the_work(patched, tmp_path):
    before, after = codes(1000, 8, 0.3)
    bundle, _, _ = patched(before, after, [Change(0, 8, before, after)])

    def check() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_patched(bundle, "one", tmp_path, check=check)
    assert not (tmp_path / "weights.bin").stat().st_size


# Attacks


def rebuilt(data: bytes, **changes) -> bytes:
    """Return a patch whose header has other fields: of its one file, or of that file's one region."""
    (length,) = struct.unpack_from("<I", data, 8)
    body = changes.pop("body", data[12 + length :])
    header = format_module._read_header(data, "it")[0]
    file, region = header.files[0], header.files[0].regions[0]
    of_region = {key: value for key, value in changes.items() if hasattr(region, key)}
    of_file = {key: value for key, value in changes.items() if hasattr(file, key) and key not in of_region}
    regions = changes.pop("regions", (dataclasses.replace(region, **of_region),))
    file = dataclasses.replace(file, **{**of_file, "regions": regions})
    header = dataclasses.replace(header, files=changes.pop("files", (file,)))
    schema = changes.get("schema", header.schema)
    packed = zlib.compress(canonical_json({**to_mapping(header), "schema": schema}))
    return b"EAPATCH1" + struct.pack("<I", len(packed)) + packed + body


def raw(values: bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    return coder.compress(values) + coder.flush()


def applied(bundle: Bundle, data: bytes) -> dict[str, bytes]:
    """Return the files as a patch leaves them."""
    return {content.path: b"".join(content.chunks()) for content in patched_contents(bundle, data, "it")}


@pytest.fixture
def attack(patched):
    """Return a function that applies damaged bytes as a patch of 1000 codes of 8 bits, 300 of which change or so."""
    before, after = codes(1000, 8, 0.3)
    bundle, data, patch = patched(before, after, [Change(0, 8, before, after)])

    def apply(damage) -> str:
        with pytest.raises(BundleError) as caught:
            applied(bundle, damage(data))
        return caught.value.message

    apply.region = patch.files[0].regions[0]
    apply.bundle, apply.data, apply.after = bundle, data, after.tobytes()
    return apply


def test_the_untouched_patch_is_sound(attack):
    assert applied(attack.bundle, rebuilt(attack.data))[WEIGHTS] == attack.after


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"offset": -1}, "there is no such region: Region(offset=-1, "),
        ({"offset": 1}, "its regions end at 1001, graph/weights.bin has 1000 bytes"),
        ({"offset": 2**62}, "its regions end at 4611686018427388904, graph/weights.bin has 1000 bytes"),
        ({"length": 0}, "there is no such region: "),
        ({"length": 2**40}, "there is no such region: "),
        ({"bits": 5}, "there is no such region: "),
        ({"bits": 0}, "there is no such region: "),
        ({"changed": 0}, "there is no such region: "),
        ({"changed": 1001}, "there is no such region: "),
        ({"changed": 5}, "a stream has no end within 8 bytes"),
        ({"steps": 2**50}, "its regions have "),
        ({"steps": 0}, "there is no such region: "),
        ({"changes": -5}, "there is no such region: "),
        ({"path": "graph/model.slots.onnx"}, "it changes 'graph/model.slots.onnx', which is no weights file and no "),
        ({"path": "../../etc/passwd"}, "it changes '../../etc/passwd', which is no weights file and no plain graph"),
        ({"files": ()}, "its regions have 0 bytes, its body "),
        ({"regions": ()}, "its regions end at 0, graph/weights.bin has 1000 bytes"),
    ],
)
def test_a_header_that_lies_is_refused(attack, changes, problem):
    message = attack(lambda data: rebuilt(data, **changes))
    assert message.startswith(f"it is no sound patch: {problem}"), message


def test_regions_and_files_that_occur_twice_are_refused(attack):
    region = attack.region
    assert attack(lambda data: rebuilt(data, regions=(region, region))).startswith(
        "it is no sound patch: a region of graph/weights.bin at 0 overlaps the one before"
    )
    header = format_module._read_header(attack.data, "it")[0]
    body = attack.data[12 + struct.unpack_from("<I", attack.data, 8)[0] :]
    assert attack(lambda data: rebuilt(data, files=header.files * 2, body=body * 2)) == (
        "it is no sound patch: it names a file twice"
    )


def test_another_schema_is_refused(attack):
    assert attack(lambda data: rebuilt(data, schema="edgeadapt.patch/2")) == (
        "it: schema is 'edgeadapt.patch/2', must be 'edgeadapt.patch/1'"
    )


@pytest.mark.parametrize(
    ("steps", "changes", "problem"),
    [
        (b"\x00" * 301, bytes(75), "75 bytes are not what 301 codes are changed by"),
        (b"\x00" * 301, bytes(77), "77 bytes are not what 301 codes are changed by"),
        (b"\x00" * 301, bytes(75) + b"\x03", "76 bytes are not what 301 codes are changed by"),
        (b"\x00" * 301, bytes(75) + b"\x04", "76 bytes are not what 301 codes are changed by"),
        (b"\x00" * 301, bytes(75) + b"\x02", "76 bytes are not what 301 codes are changed by"),
        (b"\x00" * 301, bytes(75) + b"\x02\x00", "a code is changed by nothing, or by more than there are codes"),
        (b"\x00" * 301, bytes(400), "a stream has no end within 377 bytes"),
        (b"\x00" * 300, bytes(76), "300 places for 301 changes"),
        (b"\x00" * 302, bytes(76), "302 places for 301 changes"),
        (b"\x00" * 301 + b"\xff", bytes(76), "301 places for 301 changes"),
        (b"\x03" * 301, bytes(76), "code 1203 of 1000"),
        (b"\xff" * 305, bytes(76), "a stream has no end within 304 bytes"),
        (b"\x00" * 10**7, bytes(76), "a stream has no end within 304 bytes"),
    ],
)
def test_streams_that_lie_are_refused(attack, steps, changes, problem):
    streams = raw(steps), raw(changes)

    def damage(data):
        return rebuilt(data, changed=301, steps=len(streams[0]), changes=len(streams[1]), body=b"".join(streams))

    assert attack(damage) == f"it is no sound patch: {problem}"


def test_a_stream_that_is_cut_or_goes_on_is_refused(attack):
    good = raw(bytes(301)), raw(bytes(76))
    for steps, changes in ((good[0][:-1], good[1]), (good[0], good[1] + b"x"), (b"\xff\xff", good[1])):

        def damage(data, steps=steps, changes=changes):
            return rebuilt(data, changed=301, steps=len(steps), changes=len(changes), body=steps + changes)

        assert attack(damage).startswith("it is no sound patch: ")


def test_a_bomb_takes_no_memory(attack):
    bomb = zlib.compress(b" " * 200_000_000, 9)
    header = b"EAPATCH1" + struct.pack("<I", len(bomb)) + bomb
    small = raw(b"\x00" * 100_000_000)
    rest = raw(bytes(75))
    tracemalloc.start()
    try:
        assert attack(lambda _: header) == "it is no sound patch: a stream has no end within 16777216 bytes"
        sizes = {"changed": 300, "steps": len(small), "changes": len(rest)}
        tracemalloc.reset_peak()
        attack(lambda data: rebuilt(data, **sizes, body=small + rest))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**25


def test_no_damage_goes_unnoticed_or_breaks_out(attack):
    random = np.random.default_rng(0)
    places = {*range(16), *random.integers(0, len(attack.data), 150).tolist()}
    refused = 0
    for place, bit in itertools.product(places, (0, 5)):
        damaged = bytearray(attack.data)
        damaged[place] ^= 1 << bit
        try:  # bits that fill up a stream's last byte mean nothing
            assert applied(attack.bundle, bytes(damaged))[WEIGHTS] == attack.after
        except BundleError:
            refused += 1
    assert refused > len(places) * 2 - 20
    for length in random.integers(0, len(attack.data), 60).tolist():
        attack(lambda data, length=length: data[:length])
    attack(lambda data: data + b"x")
    attack(lambda _: b"")
