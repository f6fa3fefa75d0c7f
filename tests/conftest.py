"""What tests of every area share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.parity import Parity

ROOT = Path(__file__).parent.parent
# Before torch is imported: its threads sleep while they wait, which matters on machines with other work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A shell that starts the tests in the background ignores Ctrl-C for all its children; tests send it to theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-parity", action="store_true", help="write tests/parity.json (see tests/parity.py)")


@pytest.fixture(scope="session")
def parity(request: pytest.FixtureRequest) -> Iterator[Parity]:
    """Where comparisons with the library that saved an adapter are told."""
    from tests.parity import Parity  # not where no test needs it: it imports edgeadapt

    found = Parity(recording=request.config.getoption("--record-parity"))
    yield found
    if found.recording:
        found.write()


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def models() -> Path:
    """Where scripts/fetch-models puts the real models. Only tests marked slow may ask for it."""
    folder = Path(os.environ.get("EDGEADAPT_MODELS", ROOT / "models"))
    assert folder.is_dir(), f"{folder} is missing: run scripts/fetch-models, or leave out slow tests with -m 'not slow'"
    return folder
