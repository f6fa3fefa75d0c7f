"""Everything that can be wrong with a bundle's files, found without running it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path

from edgeadapt.bundle.adapter_json import AdapterJson
from edgeadapt.bundle.bind import check_inputs
from edgeadapt.bundle.bundle import Bundle, file_problem
from edgeadapt.bundle.cache_scales import read_cache_scales
from edgeadapt.bundle.golden import parse_golden
from edgeadapt.bundle.manifest import Manifest
from edgeadapt.bundle.names import MANIFEST_FILE
from edgeadapt.bundle.patch_files import patched_files
from edgeadapt.bundle.prefix import check_prefix_tokens
from edgeadapt.bundle.rules import WEIGHTS_FILE, parse_manifest, patch_path, slot_inputs
from edgeadapt.bundle.stored import to_float32
from edgeadapt.decoder_spec import DecoderSpec
from edgeadapt.errors import BundleError, EdgeAdaptError
from edgeadapt.fields import from_mapping
from edgeadapt.files import read_bytes, sha256_file
from edgeadapt.onnx_adapter import OnnxAdapter, parse_onnx_adapter


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: a path in the bundle, and what."""

    path: str
    problem: str


def verify_files(bundle: Bundle) -> list[Finding]:
    """Return what is wrong with a bundle's files, sorted by path; an empty list is a sound bundle.

    Every digest, missing and extra files, leftovers of interrupted changes, each adapter's tensors (strict reader,
    only inputs that adapters may set, shapes, finite values), its record and its golden. Open the bundle with
    `check_files=False`, so that all findings are reported rather than the first.
    """
    findings = _check_manifest_file(bundle)
    damaged = set()
    for path in sorted(bundle.manifest.files):
        problem = file_problem(bundle.path, path, bundle.manifest) or _check_digest(bundle, path)
        if problem is not None:
            damaged.add(path)
            findings.append(Finding(path, problem))
    findings += _extra_files(bundle) + _check_cache_scales(bundle, damaged)
    for name in bundle.adapter_names:
        findings += _check_adapter(bundle, name, damaged)
    return sorted(findings, key=lambda finding: (finding.path, finding.problem))


def _check_manifest_file(bundle: Bundle) -> list[Finding]:
    """Compare what lies there with what was opened; an export of an earlier version has fewer fields than are known."""
    try:
        same = parse_manifest(read_bytes(bundle.path / MANIFEST_FILE), MANIFEST_FILE).digest == bundle.manifest.digest
    except EdgeAdaptError as error:
        return [Finding(MANIFEST_FILE, error.message)]
    return [] if same else [Finding(MANIFEST_FILE, "was changed after it was written")]


def _check_digest(bundle: Bundle, path: str) -> str | None:
    try:
        found = sha256_file(bundle.path / path)
    except EdgeAdaptError as error:
        return error.message
    wanted = bundle.manifest.files[path].sha256
    return None if found == wanted else f"SHA-256 is {found}, the manifest says {wanted}"


def _check_cache_scales(bundle: Bundle, damaged: set[str]) -> list[Finding]:
    """Look at the scales of a quantized key-value cache: ONNX Runtime takes any."""
    record = bundle.manifest.generation or {}
    if record.get("cache_dtype") != "int8" or WEIGHTS_FILE in damaged:
        return []
    try:
        read_cache_scales(bundle, from_mapping(DecoderSpec, record, "manifest.json: generation", BundleError))
    except EdgeAdaptError as error:
        return [Finding(WEIGHTS_FILE, error.message)]
    return []


def _extra_files(bundle: Bundle) -> list[Finding]:
    listed = {MANIFEST_FILE, *bundle.manifest.files}
    folders = {parent.as_posix() for path in listed for parent in Path(path).parents}
    found = []
    for path in sorted(bundle.path.rglob("*")):
        name = path.relative_to(bundle.path).as_posix()
        if name in listed or (name in folders and not path.is_symlink()) or name == "adapters":
            continue
        parts = name.split("/")
        if any(_is_hidden("/".join(parts[:depth])) for depth in range(1, len(parts))):
            continue  # reported once, by the hidden folder
        leftover = _is_hidden(name) and any(mark in name for mark in (".tmp-", ".old-"))
        problem = (
            "a leftover of an interrupted change; the next add removes it" if leftover else "is not in the manifest"
        )
        found.append(Finding(name, problem))
    return found


def _is_hidden(path: str) -> bool:
    return path.rsplit("/", 1)[-1].startswith(".")


def _check_adapter(bundle: Bundle, name: str, damaged: set[str]) -> list[Finding]:
    """Look into an adapter's files; also into those with a wrong digest, to say what the damage is."""
    findings = []
    content: OnnxAdapter | None = None
    path = f"adapters/{name}/adapter.onnx_adapter"
    try:
        content = parse_onnx_adapter(read_bytes(bundle.path / path), path)
        tensors = check_inputs(name, to_float32(content.tensors), bundle.manifest)
        check_prefix_tokens(name, tensors, bundle.manifest)
    except BundleError as error:
        findings.append(Finding(path, error.message))
    except EdgeAdaptError:
        pass  # it cannot be read: reported with its place and size
    if path in damaged:
        content = None  # what differs from it is not to blame
    path = f"adapters/{name}/adapter.json"
    try:
        problem = _json_problem(bundle.adapter_json(name), name, bundle.manifest, content)
    except BundleError as error:
        problem = error.message
    except EdgeAdaptError:
        problem = None
    if problem is not None:
        findings.append(Finding(path, problem))
    path = f"adapters/{name}/golden.safetensors"
    if path not in damaged:
        findings += _check_golden(bundle, name, path)
    return findings + _check_patch(bundle, name, damaged)


def _check_patch(bundle: Bundle, name: str, damaged: set[str]) -> list[Finding]:
    """Apply an adapter's patch, if it has one, to sound files, without keeping the result."""
    path = patch_path(name)
    if path not in bundle.manifest.files or path in damaged:
        return []
    try:
        patched = patched_files(bundle, name)
        for file in patched:
            if file.path not in damaged:
                deque(file.chunks(), maxlen=0)
    except EdgeAdaptError as error:
        return [Finding(path, error.message)]
    return []


def _json_problem(content: AdapterJson, name: str, manifest: Manifest, tensors: OnnxAdapter | None) -> str | None:
    if content.name != name:
        return f"its name is {content.name!r}"
    if content.record != manifest.adapters[name]:
        return "its record differs from the manifest's"
    if content.base_fingerprint != manifest.base.fingerprint:
        return f"made for the base {content.base_fingerprint}, the bundle's is {manifest.base.fingerprint}"
    if tensors is None:
        return None
    listed = {key: (record.dtype, record.shape) for key, record in content.tensors.items()}
    held = {key: (str(value.dtype), value.shape) for key, value in tensors.tensors.items()}
    differ = sorted(key for key in listed.keys() | held.keys() if listed.get(key) != held.get(key))
    return f"tensor {differ[0]!r} differs from adapter.onnx_adapter" if differ else None


def _check_golden(bundle: Bundle, name: str, path: str) -> list[Finding]:
    try:
        golden = parse_golden(bundle.read(path), path)
    except EdgeAdaptError as error:
        return [Finding(path, error.message)]
    record = bundle.manifest.adapters[name]
    if (golden.tolerance, golden.minimum_effect) != (record.tolerance, record.minimum_effect):
        return [Finding(path, "its tolerance or minimum effect differs from the manifest's")]
    set_by_adapters = sorted(golden.inputs.keys() & slot_inputs(bundle.manifest).keys())
    if set_by_adapters:
        return [Finding(path, f"it sets {set_by_adapters[0]!r}, which only adapters may set")]
    return []
