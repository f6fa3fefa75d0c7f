"""Branches between arrays and a bundle's graph inputs: bound, read back, checked; see `slots.BranchSlot`.

Nothing here knows a form: a slot holds the shapes of what it takes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from edgeadapt.adapters.adapter import Branch, ResolvedAdapter
from edgeadapt.bundle.manifest import Manifest
from edgeadapt.errors import BundleError
from edgeadapt.slots import BranchKind, BranchSlot, branch_kind

Array = NDArray[Any]

_FIT_HINT = "check that the adapter was trained on this bundle's base"


def branch_inputs(manifest: Manifest) -> dict[str, str]:
    """Return the site of every graph input of a branch."""
    return {name: slot.site for slot in manifest.branches for name in slot.inputs.values()}


def bind_branches(resolved: ResolvedAdapter, manifest: Manifest) -> dict[str, Array]:
    """Return an adapter's branches by graph input.

    Raises:
        BundleError: the bundle's graph has no such branch at a module, a shape does not fit, or two share one.
    """
    slots = {(slot.site, slot.kind): slot for slot in manifest.branches}
    result: dict[str, Array] = {}
    for branch in resolved.branches:
        kind = branch_kind(branch.form, branch.settings)
        slot = slots.get((branch.site, kind))
        if slot is None:
            there = [_words(other.kind) for other in manifest.branches if other.site == branch.site]
            raise BundleError(
                f"adapter {resolved.name!r} has a network {_words(kind)} beside module {branch.site!r}, for which this "
                f"bundle has no slot (it has {', '.join(there) or 'none there'})",
                hint="export the bundle again together with this adapter, so that its graph has what it needs",
            )
        if any(name in result for name in slot.inputs.values()):
            raise BundleError(
                f"adapter {resolved.name!r} has two networks {_words(kind)} at {slot.site!r}", hint=_FIT_HINT
            )
        _check_shapes(resolved.name, slot, branch.tensors)
        result |= {slot.inputs[term]: value for term, value in branch.tensors.items()}
    return result


def read_branches(inputs: Mapping[str, Array], manifest: Manifest) -> tuple[Branch, ...]:
    """Return the branches that graph inputs stand for: the inverse of `bind_branches`, which checks them."""
    found = []
    for slot in manifest.branches:
        given = {term: inputs[input_] for term, input_ in slot.inputs.items() if input_ in inputs}
        if given:
            found.append(Branch(slot.site, slot.form, dict(slot.settings), given))
    return tuple(found)


def refuse_branches(parts: Sequence[Mapping[str, Array]], manifest: Manifest) -> None:
    """Refuse to blend adapters of which one has a branch.

    Raises:
        BundleError: naming the module.
    """
    beside = branch_inputs(manifest)
    for inputs in parts:
        for name in inputs:
            if name in beside:
                raise BundleError(
                    f"an adapter of the blend has a network of its own beside module {beside[name]!r}, which has no "
                    "weighted form",
                    hint="use that adapter alone, with weight 1",
                )


def check_branch_slot(slot: BranchSlot, modules: Collection[str]) -> str | None:
    """Return what is wrong with a branch's slot in a manifest, or None."""
    if slot.site not in modules:
        return f"branch slot {slot.site!r} is not a module of the base"
    if not slot.inputs or slot.inputs.keys() != slot.shapes.keys():
        return f"branch slot {slot.site!r} has inputs {sorted(slot.inputs)} and shapes for {sorted(slot.shapes)}"
    if any(isinstance(axis, int) and axis <= 0 for shape in slot.shapes.values() for axis in shape):
        return f"branch slot {slot.site!r} has an axis without length: {dict(slot.shapes)}"
    return None


def _check_shapes(adapter: str, slot: BranchSlot, tensors: Mapping[str, Array]) -> None:
    """Check that all terms are there, and that axes of one name have one length above 0."""
    if tensors.keys() != slot.inputs.keys():
        other = min(tensors.keys() ^ slot.inputs.keys())
        raise BundleError(
            f"adapter {adapter!r} has {sorted(tensors)} beside module {slot.site!r}, this bundle takes "
            f"{sorted(slot.inputs)} ({other!r} is too much or missing)",
            hint=_FIT_HINT,
        )
    lengths: dict[str, int] = {}
    for term, shape in sorted(slot.shapes.items()):
        value = tensors[term]
        fits = value.ndim == len(shape) and value.size > 0
        for axis, length in zip(shape, value.shape, strict=False):
            fits = fits and length == (lengths.setdefault(axis, length) if isinstance(axis, str) else axis)
        if not fits:
            raise BundleError(
                f"adapter {adapter!r}: {slot.inputs[term]!r} has the shape {list(value.shape)}, this base needs "
                f"{[(lengths.get(axis) or axis) if isinstance(axis, str) else axis for axis in shape]}",
                hint=_FIT_HINT,
            )


def _words(kind: BranchKind) -> str:
    settings = "".join(f", {name} {value}" for name, value in kind.settings)
    return f"({kind.form}{settings})"
