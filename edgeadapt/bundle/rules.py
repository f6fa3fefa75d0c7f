"""What makes a manifest valid, and its one spelling as JSON: rules without files."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from edgeadapt.bundle.base import base_fingerprint
from edgeadapt.bundle.bottlenecks import bottleneck_inputs, check_bottleneck_slot
from edgeadapt.bundle.branches import branch_inputs, check_branch_slot
from edgeadapt.bundle.manifest import SCHEMA, AdapterRecord, Manifest
from edgeadapt.bundle.names import ADAPTER_FILES, PATCH_FILE, check_adapter_name, check_file_path
from edgeadapt.bundle.prefix import is_prefix_tensor
from edgeadapt.bundle.stored import DTYPES
from edgeadapt.decoder_spec import DecoderSpec
from edgeadapt.errors import BundleError
from edgeadapt.fields import from_mapping, to_mapping
from edgeadapt.files import canonical_json, parse_json
from edgeadapt.slots import BOTTLENECK_ACTIVATIONS, BOTTLENECK_READS, INPUT_GAIN_TYPES, Joined, Slot

WEIGHTS_FILE = "graph/weights.bin"
RESIDUAL_FILE = "graph/residual.onnx_adapter"
ROLES = ("graph", "weights", "residual", "asset", "adapter", "golden", "patch")
_GRAPH_FILES = {WEIGHTS_FILE: "weights", RESIDUAL_FILE: "residual"}
TERMS = ("a", "b", "gain", "offset", "input_gain")
MODULE_TYPES = ("linear", "conv1d", "conv2d", "embedding", "norm", "other")

_HINT = "the bundle is damaged or was not written by edgeadapt; export it again"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def dump_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of `manifest.json`, with the digest filled in.

    Raises:
        BundleError: if the manifest breaks a rule.
    """
    check_manifest(manifest, "the new manifest")
    content = to_mapping(manifest)
    return canonical_json({**content, "digest": manifest_digest(content)})


def manifest_digest(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest's canonical JSON with an empty digest."""
    return hashlib.sha256(canonical_json({**content, "digest": ""})).hexdigest()


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Return the manifest that the bytes of a `manifest.json` hold.

    Raises:
        BundleError: if it is of another format, not exactly what `dump_manifest` writes, or breaks a rule.
    """
    content = parse_json(data, where, BundleError)
    schema = content.get("schema") if isinstance(content, Mapping) else None
    if schema != SCHEMA:
        raise BundleError(
            f"{where}: schema is {schema!r}, this version of edgeadapt reads {SCHEMA!r}",
            hint="open it with the edgeadapt that wrote it, or export it again",
        )
    manifest = from_mapping(Manifest, content, where, BundleError)
    canonical = canonical_json(content)  # slow, so not also for `manifest_digest`
    field = '\n  "digest": {}'  # nowhere else: in texts a line break is escaped, and inner fields are indented more
    empty = canonical.replace(field.format(json.dumps(manifest.digest)).encode(), field.format('""').encode())
    if manifest.digest != hashlib.sha256(empty).hexdigest():
        raise BundleError(f"{where}: its digest does not match: it was changed after it was written", hint=_HINT)
    if data != canonical:
        raise BundleError(f"{where}: not in canonical form: it was changed after it was written", hint=_HINT)
    check_manifest(manifest, where)
    return manifest


def check_manifest(manifest: Manifest, where: str) -> None:
    """Check every rule of format 1 that needs no file.

    Raises:
        BundleError: on the first rule that is broken, naming the field.
    """
    if manifest.schema != SCHEMA:
        raise _broken(where, f"schema is {manifest.schema!r}, must be {SCHEMA!r}")
    _check_choice(where, "adapter_dtype", manifest.adapter_dtype, DTYPES)
    _check_base(manifest, where)
    _check_files(manifest, where)
    _check_graphs(manifest, where)
    _check_slots(manifest, where)
    _check_inputs(manifest, where)
    _check_adapters(manifest, where)
    _check_cache(manifest, where)


def adapter_paths(name: str) -> tuple[str, ...]:
    """Return the paths of the files in a bundle that every adapter has."""
    return tuple(f"adapters/{name}/{file}" for file in ADAPTER_FILES)


def patch_path(name: str) -> str:
    """Return the path in a bundle of an adapter's patch, if it has one."""
    return f"adapters/{name}/{PATCH_FILE}"


def slot_inputs(manifest: Manifest) -> dict[str, str]:
    """Return what each adapter input belongs to: input name to site or parameter name."""
    inputs = {name: slot.site for slot in manifest.slots for name in slot.inputs.values()}
    inputs |= {name: "+".join(joined.sites) for joined in manifest.joined for name in joined.inputs.values()}
    inputs |= bottleneck_inputs(manifest) | branch_inputs(manifest)
    return inputs | {parameter.input: parameter.parameter for parameter in manifest.parameters}


def _broken(where: str, message: str) -> BundleError:
    return BundleError(f"{where}: {message}", hint=_HINT)


def _check_choice(where: str, name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise _broken(where, f"{name} is {value!r}, must be one of {', '.join(allowed)}")


def _check_unique(where: str, what: str, values: Iterable[str]) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise _broken(where, f"{what} {twice[0]!r} occurs twice")


def _check_base(manifest: Manifest, where: str) -> None:
    base = manifest.base
    _check_unique(where, "base module", (module.path for module in base.modules))
    for module in base.modules:
        _check_choice(where, f"type of base module {module.path!r}", module.type, MODULE_TYPES)
    fingerprint = base_fingerprint(base.modules)
    if base.fingerprint != fingerprint:
        raise _broken(where, f"base.fingerprint is {base.fingerprint}, its modules give {fingerprint}")


def _check_files(manifest: Manifest, where: str) -> None:
    for path, record in manifest.files.items():
        check_file_path(path, where)
        _check_choice(where, f"role of {path}", record.role, ROLES)
        if record.role != file_role(path):
            raise _broken(where, f"role of {path} is {record.role!r}, must be {file_role(path)!r}")
        if record.size < 0 or not _SHA256.fullmatch(record.sha256):
            raise _broken(where, f"size or digest of {path} is not one: {record.size}, {record.sha256!r}")
    _check_unique(where, "path but for case", (path.lower() for path in manifest.files))


def file_role(path: str) -> str | None:
    """Return the role that a file's place in a bundle gives it, or None where no file belongs."""
    parts = path.split("/")
    if path in _GRAPH_FILES:
        return _GRAPH_FILES[path]
    if parts[0] == "graph" and len(parts) == 2 and path.endswith(".onnx"):
        return "graph"
    if parts[0] == "assets" and len(parts) >= 2:
        return "asset"
    if parts[0] == "adapters" and len(parts) == 3 and parts[2] in (*ADAPTER_FILES, PATCH_FILE):
        return {"golden.safetensors": "golden", PATCH_FILE: "patch"}.get(parts[2], "adapter")
    return None


def _check_graphs(manifest: Manifest, where: str) -> None:
    if not manifest.graphs:
        raise _broken(where, "graphs is empty")
    used = [path for graph in manifest.graphs.values() for path in (graph.plain, graph.slots) if path is not None]
    _check_unique(where, "graph file", used)
    listed = {path for path, record in manifest.files.items() if record.role == "graph"}
    for path in sorted(listed ^ set(used)):
        place = "files but not in graphs" if path in listed else "graphs but not in files"
        raise _broken(where, f"graph file {path!r} is in {place}")
    if manifest.merged is not None:
        filled = [role for role, graph in manifest.graphs.items() if graph.slots is not None]
        taken = (manifest.slots, manifest.parameters, manifest.bottlenecks, manifest.branches, manifest.adapters)
        if filled or any(taken) or RESIDUAL_FILE in manifest.files:
            raise _broken(where, f"adapter {manifest.merged!r} is merged, so there can be no slots and no adapters")


def _check_slots(manifest: Manifest, where: str) -> None:
    _check_unique(where, "slot", (slot.site for slot in manifest.slots))
    _check_unique(where, "parameter slot", (parameter.parameter for parameter in manifest.parameters))
    modules = {module.path for module in manifest.base.modules}
    for slot in manifest.slots:
        if slot.site not in modules:
            raise _broken(where, f"slot {slot.site!r} is not a module of the base")
        _check_slot(slot, where)
        _check_roles(slot.site, slot.graphs, manifest, where)
    for parameter in manifest.parameters:
        if any(isinstance(axis, int) and axis <= 0 for axis in parameter.shape):
            raise _broken(where, f"parameter slot {parameter.parameter!r} has the shape {list(parameter.shape)}")
        _check_roles(parameter.parameter, parameter.graphs, manifest, where)
    _check_bottlenecks(manifest, where)
    _check_branches(manifest, where)
    for joined in manifest.joined:
        _check_joined(joined, manifest, where)


def _check_bottlenecks(manifest: Manifest, where: str) -> None:
    features = {module.path: module.out_features for module in manifest.base.modules}
    _check_unique(where, "bottleneck slot", (" ".join(map(str, (s.site, *s.kind))) for s in manifest.bottlenecks))
    for slot in manifest.bottlenecks:
        _check_choice(where, f"reads of bottleneck slot {slot.site!r}", slot.reads, BOTTLENECK_READS)
        _check_choice(where, f"activation of bottleneck slot {slot.site!r}", slot.activation, BOTTLENECK_ACTIVATIONS)
        problem = check_bottleneck_slot(slot, features)
        if problem is not None:
            raise _broken(where, problem)
        _check_roles(slot.site, slot.graphs, manifest, where)


def _check_branches(manifest: Manifest, where: str) -> None:
    modules = {module.path for module in manifest.base.modules}
    _check_unique(where, "branch slot", (slot.kind.prefix(slot.site) for slot in manifest.branches))
    for slot in manifest.branches:
        problem = check_branch_slot(slot, modules)
        if problem is not None:
            raise _broken(where, problem)
        _check_roles(slot.site, slot.graphs, manifest, where)


def _check_joined(joined: Joined, manifest: Manifest, where: str) -> None:
    what = f"joined modules {', '.join(joined.sites)}"
    slots = {slot.site: slot for slot in manifest.slots}
    if len(joined.sites) < 2 or len(set(joined.sites)) < len(joined.sites):
        raise _broken(where, f"{what}: there must be two or more, each once")
    for site in joined.sites:
        if site not in slots or joined.graph not in slots[site].graphs:
            raise _broken(where, f"{what}: {site!r} has no slot in graph {joined.graph!r}")
        if slots[site].inputs.keys() != joined.inputs.keys():
            raise _broken(where, f"{what}: terms {sorted(joined.inputs)}, slot {site!r} has other terms")
        if "input_gain" in joined.inputs:
            raise _broken(where, f"{what}: a product whose input is scaled is never joined")
        if slots[site].type != "linear" or slots[site].in_features != slots[joined.sites[0]].in_features:
            raise _broken(where, f"{what}: {site!r} is no linear layer of the same input")


def _check_roles(name: str, roles: tuple[str, ...], manifest: Manifest, where: str) -> None:
    if not roles:
        raise _broken(where, f"slot {name!r} is in no graph")
    for role in roles:
        if role not in manifest.graphs or manifest.graphs[role].slots is None:
            raise _broken(where, f"slot {name!r} names graph {role!r}, which has no slots")


def _check_slot(slot: Slot, where: str) -> None:
    _check_choice(where, f"type of slot {slot.site!r}", slot.type, MODULE_TYPES)
    for term in slot.inputs:
        _check_choice(where, f"term of slot {slot.site!r}", term, TERMS)
    if not slot.inputs or ("a" in slot.inputs) != ("b" in slot.inputs):
        raise _broken(where, f"slot {slot.site!r} has the terms {sorted(slot.inputs)}: a and b go together")
    if slot.type in ("norm", "other") and "a" in slot.inputs:
        raise _broken(where, f"slot {slot.site!r} is of type {slot.type!r}, which has no a and b")
    if slot.type not in INPUT_GAIN_TYPES and "input_gain" in slot.inputs:
        raise _broken(where, f"slot {slot.site!r} is of type {slot.type!r}, which has no input_gain")


def _check_inputs(manifest: Manifest, where: str) -> None:
    slots = [name for slot in manifest.slots for name in slot.inputs.values()]
    for role in manifest.graphs:
        found = [joined for joined in manifest.joined if joined.graph == role]
        _check_unique(where, f"joined module of graph {role!r}", (site for joined in found for site in joined.sites))
        slots += [name for joined in found for name in joined.inputs.values() if name not in slots]
    beside = [name for slot in manifest.bottlenecks for name in slot.inputs.values()]
    beside += [name for slot in manifest.branches for name in slot.inputs.values()]
    names = [*slots, *beside, *(parameter.input for parameter in manifest.parameters)]
    _check_unique(where, "adapter input", names)
    for name in names:
        if is_prefix_tensor(name):
            raise _broken(where, f"adapter input {name!r} is named like the tensors of a prefix")
    for role, graph in manifest.graphs.items():
        _check_unique(where, f"input of graph {role!r}", graph.inputs)
        for name in graph.inputs:
            if name in names:
                raise _broken(where, f"adapter input {name!r} is a data input of graph {role!r}")


def _check_cache(manifest: Manifest, where: str) -> None:
    """Check what the generation record says of a quantized cache: it needs a place for its scales."""
    record = manifest.generation or {}
    if record.keys().isdisjoint(("cache_dtype", "cache_scales")):
        return
    spec = from_mapping(DecoderSpec, record, f"{where}: generation", BundleError)
    quantized = spec.cache_dtype == "int8"
    if quantized != (spec.cache_scales is not None) or (quantized and not spec.shared_cache):
        shared = "true" if spec.shared_cache else "false"
        raise _broken(
            where,
            f"generation has cache_dtype {spec.cache_dtype!r} with cache_scales {spec.cache_scales} and shared_cache "
            f"{shared}: int8 goes with scales and a shared cache",
        )
    weights = manifest.files.get(WEIGHTS_FILE)
    start, length = spec.cache_scales or 0, 4 * len(spec.cache_names) * spec.cache_heads * spec.cache_head_dim
    if spec.cache_scales is not None and (weights is None or start < 0 or start % 4 or start + length > weights.size):
        raise _broken(where, f"generation.cache_scales is {start}: there are no {length} bytes of {WEIGHTS_FILE}")


def _check_figures(name: str, record: AdapterRecord, where: str) -> None:
    for field in ("parameters", "tolerance", "minimum_effect"):
        if (value := getattr(record, field)) <= 0:
            raise _broken(where, f"{field} of adapter {name!r} is {value}, must be above 0")
    if record.prefix_tokens < 0:
        raise _broken(where, f"prefix_tokens of adapter {name!r} is {record.prefix_tokens}, must be 0 or more")


def _check_adapters(manifest: Manifest, where: str) -> None:
    for name, record in manifest.adapters.items():
        check_adapter_name(name, manifest.adapters)
        for path in adapter_paths(name):
            if path not in manifest.files:
                raise _broken(where, f"adapter {name!r} has no file {path!r}")
        _check_figures(name, record, where)
    for path in manifest.files:
        parts = path.split("/")
        if parts[0] == "adapters" and parts[1] not in manifest.adapters:
            raise _broken(where, f"file {path!r} belongs to no adapter")
