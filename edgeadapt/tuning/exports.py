"""Candidates as bundles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeadapt.bundle import Bundle, open_bundle
from edgeadapt.errors import EdgeAdaptError, RecipeError
from edgeadapt.progress import Progress
from edgeadapt.tuning.candidates import Candidate
from edgeadapt.tuning.choose import Trial


@dataclass
class Exports:
    """Exports candidates; what fails is kept as a trial."""

    folder: Path
    progress: Progress

    def __post_init__(self) -> None:
        self.failed: list[Trial] = []

    def bundles(self, wanted: Sequence[Candidate]) -> list[tuple[Candidate, Path]]:
        """Return the candidates that are bundles now.

        Raises:
            RecipeError: if the recipe's base is not the bundles'.
        """
        found: list[tuple[Candidate, Path]] = []
        for candidate in wanted:
            path = candidate.bundle or self._export(candidate)
            if path is None:
                continue
            if found:
                check_alike(open_bundle(path), open_bundle(found[0][1]), None)
            found.append((candidate, path))
        return found

    def _export(self, candidate: Candidate) -> Path | None:
        from edgeadapt.pipeline import export_bundle

        assert candidate.recipe is not None
        path = self.folder / candidate.slug / candidate.recipe.output.name
        try:
            with self.progress.stage(f"export {candidate.label}"):
                export_bundle(replace(candidate.recipe, output=path), self.progress)
        except EdgeAdaptError as error:
            self.progress.note(f"{candidate.label}: {error.message}")
            self.failed.append(Trial(candidate.label, "none", None, {}, failure=error.message))
            return None
        return path


def check_alike(bundle: Bundle, first: Bundle, active: str | None) -> None:
    """Refuse a bundle that is not of the same base as the first, or has not the adapter.

    A merged one's base has other weights, so of it only the base's modules are compared.
    """
    if _base_of(bundle, first) != _base_of(first, bundle):
        raise RecipeError(
            f"{bundle.path} and {first.path} are not of one base: {bundle.manifest.base.name} and "
            f"{first.manifest.base.name}",
            hint="tune bundles of one base",
        )
    if active is not None and bundle.manifest.merged != active:
        bundle.adapter_record(active)


def _base_of(bundle: Bundle, other: Bundle) -> Any:
    """Return what tells a bundle's base from another one's."""
    base = bundle.manifest.base
    if bundle.manifest.merged is None and other.manifest.merged is None:
        return base.fingerprint
    return base.name, base.model_type, [(module.path, module.weight_shape) for module in base.modules]
