"""AdapterHub itself on the base in torch: what its adapters do, read off its own forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeadapt.adapters.adapter import Adapter, Array, Effective
from edgeadapt.errors import AdapterError, MergeError
from edgeadapt.merging.adapterhub import NAME, hub_module, parts_of, running
from edgeadapt.merging.base_model import BaseModel
from edgeadapt.merging.hub_past import hub_past
from edgeadapt.merging.probe import NotAProductError, probe
from edgeadapt.merging.reference import bias_digests, check_untouched


class HubLibrary:
    """The library `adapters` at work on one base; see `edgeadapt.adapters.adapter.Library`."""

    def __init__(self, base: BaseModel) -> None:
        """Load nothing yet."""
        self._base = base

    def effective(self, adapter: Adapter) -> Mapping[str, Effective]:
        """Return every module of the base that computes something else with the adapter inside, by its path.

        Raises:
            AdapterError: if a layer's forward is no product.
            MergeError: if the library cannot load the adapter, did not load all of it, or cannot run it.
        """
        biases = bias_digests(self._base, self._base.modules)
        module = hub_module(self._base, adapter)
        names = parts_of(adapter)
        layers: dict[str, Any] = {
            path: layer
            for path in self._base.modules
            if any(name in getattr(layer := module.get_submodule(path), "loras", ()) for name in names)
        }
        with running(module):
            found = {path: self._read(path, layer, adapter) for path, layer in layers.items()}
        check_untouched(self._base, adapter, found, biases)
        return found

    def past(self, adapter: Adapter) -> tuple[tuple[Array, Array], ...]:
        """Return the key and value that the adapter puts before each layer's own, float32[heads, tokens, dim].

        Raises:
            AdapterError: if the base is no decoder-only language model, or its positions cannot be moved.
            MergeError: if the library cannot load the adapter, or the base with these keys is not what it computes.
        """
        return hub_past(self._base, adapter, alone=adapter.kind == "adapterhub_prefix")

    def _read(self, path: str, layer: Any, adapter: Adapter) -> Effective:
        try:
            now = probe(layer, self._base.modules[path], self._base.module.get_submodule(path))
            pair = _low_rank(layer.loras[NAME]) if NAME in layer.loras else None
        except NotAProductError:
            raise AdapterError(
                f"{adapter.kind} at module {path!r} depends on its input in another way than a product: its change is "
                "no weight",
                hint="train LoRA without gates",
            ) from None
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise MergeError(
                f"the library adapters cannot run adapter {adapter.name!r} at module {path!r}: "
                f"{type(error).__name__}: {reason}",
                hint="its methods do not all work in every model; train the adapter as LoRA",
            ) from error
        return Effective(now.weight, now.bias, pair)


def _low_rank(lora: Any) -> tuple[Array, Array] | None:
    """Return A[in, rank] and B[rank, out] of an adapter that scales outputs afterwards, None for others.

    Those that do not are found in the weight itself; these are only a hint, which is proven there.
    """
    if not getattr(lora, "use_dora", False):
        return None
    if hasattr(lora, "vera_B"):
        from adapters import ForwardContext

        shared = ForwardContext.get_context().shared_parameters[NAME]
        a, b = shared["lora_A"], lora.vera_B @ shared["lora_B"] @ lora.vera_D
    else:
        a, b = lora.lora_A, lora.lora_B
    return a.detach().T.float().numpy().copy(), (lora.scaling * b.detach().T.float()).numpy().copy()
