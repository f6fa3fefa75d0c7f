"""Faults for what writes files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgeadapt.errors import FileError

_OPERATIONS = (
    (Path, "mkdir"),
    (Path, "rename"),
    (Path, "replace"),
    (Path, "unlink"),
    (Path, "write_bytes"),
    (os, "fsync"),
    (shutil, "rmtree"),
)


@contextmanager
def _before_operation(number: int, happen: Callable[[], None], skip: tuple[str, ...] = ()) -> Iterator[None]:
    """Let something happen before the n-th file operation inside the block."""
    count = 0

    def wrap(original):
        def operation(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                happen()
            return original(*args, **kwargs)

        return operation

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in _OPERATIONS:
            if name not in skip:
                patch.setattr(owner, name, wrap(getattr(owner, name)))
        yield


@pytest.fixture
def interrupt_at() -> Callable[..., bool]:
    """Run something with an exception before its n-th file operation; True if it came to its end before."""

    def run(number: int, error: BaseException, action: Callable[[], object]) -> bool:
        def happen() -> None:
            raise error

        # rmtree(ignore_errors=True) swallows what is an Exception
        with _before_operation(number, happen, skip=("rmtree",) if isinstance(error, Exception) else ()):
            try:
                action()
            except FileError as known:
                assert known.__cause__ is error  # noqa: PT017 - the operating system's error, translated
                return False
            except type(error):
                assert not isinstance(error, OSError), "an error of the operating system came through untranslated"
                return False
        return True

    return run


@pytest.fixture
def kill_at() -> Callable[..., bool]:
    """Run something in a child that dies before its n-th file operation; True if it came to its end before."""

    def run(number: int, action: Callable[[], object]) -> bool:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with _before_operation(number, lambda: os._exit(9)):
                    action()
                status = 0
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9), status
        return status == 0

    return run
