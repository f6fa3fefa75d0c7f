"""What engines raise where a GPU was asked for and none answers."""

from __future__ import annotations


class NotStartedError(RuntimeError):
    """A provider that was asked for does not run; `hint` says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint
