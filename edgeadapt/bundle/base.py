"""Which base a bundle was made from: its modules and their digest, and the way back to `TargetModule`s."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import cast

from edgeadapt.adapters.adapter import ModuleType, TargetModule
from edgeadapt.bundle.manifest import BaseModule, Manifest


def base_modules(modules: Mapping[str, TargetModule]) -> tuple[BaseModule, ...]:
    """Return the manifest's form of a base's modules, sorted by path."""
    return tuple(
        BaseModule(
            path=module.path,
            type=module.type,
            class_name=module.class_name,
            weight_shape=tuple(int(axis) for axis in module.weight_shape),
            in_features=int(module.in_features),
            out_features=int(module.out_features),
            has_bias=bool(module.has_bias),
            digest=module.digest,
            groups=int(module.groups),
        )
        for _, module in sorted(modules.items())
    )


def base_fingerprint(modules: Mapping[str, TargetModule] | Iterable[TargetModule | BaseModule]) -> str:
    r"""Return the SHA-256 over "path\0digest\n" of all modules, sorted by path, as 64 hex digits."""
    values = modules.values() if isinstance(modules, Mapping) else modules
    lines = sorted((module.path, module.digest) for module in values)
    return hashlib.sha256("".join(f"{path}\0{digest}\n" for path, digest in lines).encode()).hexdigest()


def target_modules(manifest: Manifest) -> dict[str, TargetModule]:
    """Return the base's modules as an adapter sees them; their values are not in a bundle, so `weight` is None."""
    return {
        module.path: TargetModule(
            path=module.path,
            type=cast(ModuleType, module.type),  # rules.py has checked it
            class_name=module.class_name,
            weight_shape=module.weight_shape,
            in_features=module.in_features,
            out_features=module.out_features,
            has_bias=module.has_bias,
            digest=module.digest,
            groups=module.groups,
        )
        for module in manifest.base.modules
    }
