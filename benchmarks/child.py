"""The line protocol of a measured child process: one JSON request per line in, one JSON answer per line out.

Only the standard library: every child imports this file, whatever its environment. A child hands `serve` one function
per verb; an exception becomes {"error": ...}, so that the parent records a failure instead of losing the run.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Verb = Callable[..., dict[str, Any]]


def serve(verbs: Mapping[str, Verb]) -> None:
    """Answer requests {"do": verb, **arguments} from stdin until it ends."""
    # Libraries print to stdout; answers go to a private copy of it.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        verb = request.pop("do")
        try:
            answer = verbs[verb](**request)
        except Exception as error:  # noqa: BLE001 - the parent records it
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def resident_bytes() -> int:
    """This process's resident memory now."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmRSS line")
