"""ONNX Runtime in Python, as `edgeadapt.runtime` uses it."""

from __future__ import annotations

from pathlib import Path

from edgeadapt.errors import ProfileError, SessionError
from edgeadapt.runtime import Session, ort
from edgeadapt.runtime import open_session as _open_session


def require(provider: str) -> None:
    """Check that `provider` can be used here, as far as that can be known before a graph is opened.

    Raises:
        ProfileError: saying what is missing.
    """
    try:
        ort.check_provider(provider)
    except SessionError as error:
        raise ProfileError(error.message, hint=error.hint) from error


def open_session(bundle: Path, *, threads: int, provider: str) -> Session:
    """Return a session over a bundle."""
    return _open_session(bundle, threads=threads, provider=provider)


def version() -> str:
    """Return ONNX Runtime's version."""
    return ort.version()
