"""An adapter's arrays to the tensors that a bundle keeps of it: the graphs' inputs, and what its texts begin with.

At a slot the graph computes y' = (W (x * input_gain) + b + (x A) B) * gain + offset; what is not bound keeps its
default, the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.adapters.adapter import ResolvedAdapter, SiteUpdate
from edgeadapt.bundle.bottlenecks import bind_bottlenecks, bottleneck_inputs, read_bottlenecks
from edgeadapt.bundle.branches import bind_branches, branch_inputs, read_branches
from edgeadapt.bundle.manifest import BaseModule, Manifest
from edgeadapt.bundle.prefix import check_prefix, is_prefix_tensor, prefix_of, prefix_tensors
from edgeadapt.errors import BundleError
from edgeadapt.slots import INPUT_GAIN_TYPES, ParameterSlot, Slot

Array = NDArray[Any]

_EXPORT_HINT = "export the bundle again together with this adapter, so that its graph gets what the adapter needs"
_FIT_HINT = "check that the adapter was trained on this bundle's base"


def bind(resolved: ResolvedAdapter, manifest: Manifest) -> dict[str, Array]:
    """Return the graph inputs that an adapter sets, float32 by input name, sorted; all others keep their defaults.

    The tensors of its prefix (see `bundle/prefix.py`) are among them.

    Raises:
        BundleError: if the bundle has no slot for something that the adapter changes, a shape does not fit, a value
            is not finite, or the adapter changes nothing.
    """
    return {name: _checked(resolved.name, name, value) for name, value in _placed(resolved, manifest).items()}


def _placed(resolved: ResolvedAdapter, manifest: Manifest) -> dict[str, Array]:
    """Return an adapter's arrays by graph input name, sorted: all checks of `bind` but those of values."""
    check_takes_adapters(manifest)
    slots = {slot.site: slot for slot in manifest.slots}
    modules = {module.path: module for module in manifest.base.modules}
    result: dict[str, Array] = {}
    for site, update in sorted(resolved.sites.items()):
        if site not in slots:
            raise _no_slot(resolved.name, "module", site, known=site in modules)
        _check_update(resolved.name, site, update, modules[site])
        result |= _bind_site(resolved.name, slots[site], update)
    result |= bind_bottlenecks(resolved, manifest)
    result |= bind_branches(resolved, manifest)
    result |= _bind_parameters(resolved, manifest, modules)
    if resolved.prefix is not None:
        check_prefix(resolved.name, resolved.prefix, manifest)
        result |= prefix_tensors(resolved.prefix)
    if not result:
        raise BundleError(f"adapter {resolved.name!r} changes nothing", hint="check that it was trained and saved")
    return dict(sorted(result.items()))


def check_takes_adapters(manifest: Manifest) -> None:
    """Refuse a merged bundle: its weights are of no base that an adapter was trained on, and it has no slots.

    Raises:
        BundleError: if an adapter was merged into it.
    """
    if manifest.merged is not None:
        raise BundleError(
            f"bundle {manifest.name!r} has no slots: adapter {manifest.merged!r} was merged into it",
            hint="export without --merge to get a bundle that takes adapters",
        )


def unbind(name: str, inputs: Mapping[str, Array], manifest: Manifest) -> ResolvedAdapter:
    """Return the adapter that graph inputs stand for: the inverse of `bind`. Shapes are checked by `bind`, not here.

    Raises:
        BundleError: if an input is not one that an adapter may set; one that is named like the app's own data would
            silently replace it.
    """
    sites: dict[str, dict[str, Array]] = {}
    replaced: dict[str, Array] = {}
    places = {input_: (slot.site, term) for slot in manifest.slots for term, input_ in slot.inputs.items()}
    parameters = {slot.input: slot.parameter for slot in manifest.parameters}
    beside = {**bottleneck_inputs(manifest), **branch_inputs(manifest)}
    for input_, value in inputs.items():
        if is_prefix_tensor(input_):
            continue
        if input_ in places:
            site, term = places[input_]
            sites.setdefault(site, {})[term] = value
        elif input_ in parameters:
            replaced[parameters[input_]] = value
        elif input_ in beside:
            continue
        else:
            raise _not_settable(name, input_, manifest)
    record = manifest.adapters.get(name)
    updates = {site: SiteUpdate(**terms) for site, terms in sites.items()}
    return ResolvedAdapter(
        *(name, "" if record is None else record.kind, updates, replaced),
        prefix=prefix_of(name, inputs),
        bottlenecks=read_bottlenecks(name, inputs, manifest),
        branches=read_branches(inputs, manifest),
    )


def check_inputs(name: str, inputs: Mapping[str, Array], manifest: Manifest) -> dict[str, Array]:
    """Return graph inputs as float32, sorted, after all checks of `bind`.

    Raises:
        BundleError: as `unbind` and `bind` do.
    """
    return bind(unbind(name, inputs, manifest), manifest)


def check_fit(name: str, inputs: Mapping[str, Array], manifest: Manifest) -> None:
    """Check names and shapes as `check_inputs` does, of arrays whose values were checked when their file was read.

    Args:
        name: the adapter's.
        inputs: arrays by graph input name, of any dtype.
        manifest: the bundle's.

    Raises:
        BundleError: as `unbind` and `bind` do.
    """
    _placed(unbind(name, inputs, manifest), manifest)


def _not_settable(name: str, input_: str, manifest: Manifest) -> BundleError:
    data = [role for role, graph in manifest.graphs.items() if input_ in graph.inputs]
    what = f"a data input of graph {data[0]!r}" if data else "no adapter input of this bundle"
    return BundleError(
        f"adapter {name!r} sets {input_!r}, which is {what}",
        hint="the adapter's file was tampered with or belongs to another bundle; remove it",
    )


def _no_slot(adapter: str, noun: str, name: str, *, known: bool) -> BundleError:
    if not known and noun == "module":
        return BundleError(f"adapter {adapter!r} changes module {name!r}, which the base does not have", hint=_FIT_HINT)
    return BundleError(
        f"adapter {adapter!r} changes {noun} {name!r}, for which this bundle has no slot", hint=_EXPORT_HINT
    )


def _bind_site(adapter: str, slot: Slot, update: SiteUpdate) -> dict[str, Array]:
    values = update.terms
    if not values:
        raise BundleError(f"adapter {adapter!r} names module {slot.site!r} but changes nothing there", hint=_FIT_HINT)
    for term in values:
        if term not in slot.inputs:
            what = f"{'a' if term in ('b', 'gain') else 'an'} {term}"
            raise BundleError(
                f"adapter {adapter!r} needs {what} at module {slot.site!r}, but this bundle's slot takes only "
                f"{', '.join(sorted(slot.inputs))}",
                hint=_EXPORT_HINT,
            )
    return {slot.inputs[term]: value for term, value in values.items()}


def _check_update(adapter: str, site: str, update: SiteUpdate, module: BaseModule) -> None:
    if (update.a is None) != (update.b is None):
        raise BundleError(f"adapter {adapter!r} has only half of the pair A, B at module {site!r}", hint=_FIT_HINT)
    out = _channels(module)
    if update.input_gain is not None and module.type not in INPUT_GAIN_TYPES:
        raise BundleError(
            f"adapter {adapter!r} has an input_gain at module {site!r} of type {module.type!r}", hint=_FIT_HINT
        )
    sizes = {"gain": out, "offset": out, "input_gain": module.in_features}
    for term, value in update.terms.items():
        if term in sizes:
            _check_shape(adapter, f"{term} of module {site!r}", value, (sizes[term],))
    if update.a is not None and update.b is not None:
        _check_low_rank(adapter, update.a, update.b, module)


def _check_low_rank(adapter: str, a: Array, b: Array, module: BaseModule) -> None:
    if module.type in ("norm", "other"):
        raise BundleError(
            f"adapter {adapter!r} has a low-rank term at module {module.path!r} of type {module.type!r}", hint=_FIT_HINT
        )
    out = _channels(module)
    rank = SiteUpdate(a=a, b=b).rank if b.ndim in (2, 4) else 0
    if rank == 0:
        raise BundleError(f"adapter {adapter!r} has rank 0 at module {module.path!r}", hint=_FIT_HINT)
    a_shape: tuple[int, ...] = (module.in_features, rank)
    b_shape: tuple[int, ...] = (rank, out)
    if module.type == "conv2d":
        a_shape, b_shape = (rank, module.in_features, *module.weight_shape[2:]), (out, rank, 1, 1)
    elif module.type == "embedding":
        a_shape = (module.weight_shape[0], rank)
    _check_shape(adapter, f"A of module {module.path!r}", a, a_shape)
    _check_shape(adapter, f"B of module {module.path!r}", b, b_shape)


def _channels(module: BaseModule) -> int:
    """Return the length of a module's last (conv2d: second) output axis."""
    if module.type == "embedding":
        return module.weight_shape[1]
    return module.weight_shape[0] if module.type == "conv2d" else module.out_features


def _check_shape(adapter: str, what: str, value: Array, wanted: tuple[int, ...]) -> None:
    if value.shape != wanted:
        raise BundleError(
            f"adapter {adapter!r}: {what} has the shape {list(value.shape)}, this base needs {list(wanted)}",
            hint=_FIT_HINT,
        )


def _checked(adapter: str, name: str, value: Array) -> Array:
    if not np.isfinite(value).all():
        raise BundleError(
            f"adapter {adapter!r}: {name!r} holds NaN or infinite values", hint="the adapter is damaged; save it again"
        )
    with np.errstate(over="ignore"):  # what overflows is refused below
        result = np.ascontiguousarray(value, dtype=np.float32).reshape(value.shape)
    if result.dtype != value.dtype and not np.isfinite(result).all():
        raise BundleError(f"adapter {adapter!r}: {name!r} does not fit into float32", hint="the adapter is damaged")
    return result


def _bind_parameters(
    resolved: ResolvedAdapter, manifest: Manifest, modules: Mapping[str, BaseModule]
) -> dict[str, Array]:
    slots = {slot.parameter: slot for slot in manifest.parameters}
    axes: dict[str, tuple[int, str]] = {}
    result: dict[str, Array] = {}
    for parameter, value in sorted(resolved.replaced.items()):
        if parameter not in slots:
            raise _no_slot(resolved.name, "parameter", parameter, known=True)
        slot = slots[parameter]
        _check_parameter(resolved.name, slot, value, axes)
        result[slot.input] = value
    for slot in manifest.parameters:
        if slot.parameter not in resolved.replaced:
            _check_default(resolved.name, slot, axes, modules)
    return result


def _check_parameter(adapter: str, slot: ParameterSlot, value: Array, axes: dict[str, tuple[int, str]]) -> None:
    known = [axes[axis][0] if isinstance(axis, str) and axis in axes else axis for axis in slot.shape]
    fits = value.ndim == len(known) and value.size > 0
    fits = fits and all(isinstance(want, str) or want == have for want, have in zip(known, value.shape, strict=True))
    if not fits:
        sources = sorted({axes[axis][1] for axis in slot.shape if isinstance(axis, str) and axis in axes})
        because = f" (as {', '.join(sources)} has it)" if sources else ""
        raise BundleError(
            f"adapter {adapter!r}: parameter {slot.parameter!r} has the shape {list(value.shape)}, "
            f"this bundle needs {_show(known)}{because}",
            hint=_FIT_HINT,
        )
    for axis, size in zip(slot.shape, value.shape, strict=True):
        if isinstance(axis, str):
            axes.setdefault(axis, (int(size), slot.parameter))


def _check_default(
    adapter: str, slot: ParameterSlot, axes: Mapping[str, tuple[int, str]], modules: Mapping[str, BaseModule]
) -> None:
    """Refuse half a head: a parameter left at the base's value while a neighbour takes another size."""
    default = _default_shape(slot, modules)
    for index, axis in enumerate(slot.shape):
        if not isinstance(axis, str) or axis not in axes:
            continue
        size, source = axes[axis]
        if default is None or default[index] != size:
            raise BundleError(
                f"adapter {adapter!r} sets {source!r} with {axis} = {size}, but not {slot.parameter!r}, "
                f"which must have the same {axis}",
                hint="save both parameters with the adapter (modules_to_save)",
            )


def _default_shape(slot: ParameterSlot, modules: Mapping[str, BaseModule]) -> tuple[int, ...] | None:
    path, _, last = slot.parameter.rpartition(".")
    module = modules.get(path)
    if module is None:
        return None
    shape = module.weight_shape if last == "weight" else (_channels(module),)
    return shape if len(shape) == len(slot.shape) else None


def _show(shape: list[int | str]) -> str:
    return "[" + ", ".join(str(axis) for axis in shape) + "]"
