"""A head that nobody trained gives no answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from edgeadapt.errors import SessionError
from edgeadapt.runtime.tasks import answer


def _session(adapter: str | None) -> Any:
    manifest = SimpleNamespace(task="text-classification", extra={"untrained": ["classifier.weight"]})
    return SimpleNamespace(bundle=SimpleNamespace(manifest=manifest), adapter=adapter, adapters=("a", "b"))


def test_the_base_without_a_head_is_refused() -> None:
    with pytest.raises(SessionError) as error:
        answer(_session(None), texts=["hello"])
    assert str(error.value) == (
        "the base of this bundle has no trained head (classifier.weight), so it has no answers of its own\n"
        "Hint: choose an adapter: a, b"
    )
