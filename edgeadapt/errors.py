"""Errors that a user can act on. Every one says what happened and what to do next."""

from __future__ import annotations

from typing import Any


class EdgeAdaptError(Exception):
    """A known failure: `message` says what happened and where, `hint` the next step.

    The command line prints both and exits with 1. Anything that is not an
    `EdgeAdaptError` is a bug and keeps its traceback.
    """

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nHint: {self.hint}"


class AdapterError(EdgeAdaptError):
    """An adapter's files are damaged, incomplete, unknown, or do not fit the base."""


class BaseModelError(EdgeAdaptError):
    """The base model cannot be found, loaded, or is not the one an adapter was trained on."""


class MergeError(EdgeAdaptError):
    """A merge is impossible, or did not reproduce the unmerged forward."""


class ExportError(EdgeAdaptError):
    """A model could not be turned into a graph that equals the original."""


class QuantizeError(EdgeAdaptError):
    """A quantization is impossible, finds nothing to do, or failed the quality gate."""


class BundleError(EdgeAdaptError):
    """A bundle is damaged, of another format, or does not accept an adapter."""


class SessionError(EdgeAdaptError):
    """A run of a bundle was asked for something that it cannot do."""


class ProfileError(EdgeAdaptError):
    """A device or a runtime is missing, or a measurement failed."""


class UnfinishedError(ProfileError):
    """A measurement that ended early. `partial` holds the samples until then, marked with what ended it.

    Its keys are those of samples, some missing; `partial` in it is the error's message.
    """

    def __init__(self, message: str, *, hint: str, partial: dict[str, Any]) -> None:
        super().__init__(message, hint=hint)
        self.partial = {**partial, "partial": message} if partial else {}


class RecipeError(EdgeAdaptError):
    """A recipe, device or other settings file holds an unknown or wrong field."""


class FileError(EdgeAdaptError):
    """A file or folder cannot be read or written."""
