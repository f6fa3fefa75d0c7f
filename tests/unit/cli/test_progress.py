from __future__ import annotations

import re

import pytest

from edgeadapt.cli.progress import reporter


def _shown(text: str) -> list[str]:
    """Lines with their times taken out."""
    return [re.sub(r"^ +\d+\.\d s", "TIME", line.rstrip()) for line in text.splitlines()]


def test_finished_stages_are_lines_with_a_time(capsys):
    with reporter(quiet=False) as progress:
        with progress.stage("load [base]"):
            progress.advance(1, 2)
        with progress.stage("export"):
            with progress.stage("trace"):
                progress.note("the head [0, 1] is untied")
            progress.advance(2, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert _shown(err) == [
        "TIME  load [base]",
        "warning: the head [0, 1] is untied",
        "TIME    trace",
        "TIME  export",
    ]


def test_a_stage_that_fails_says_so(capsys):
    with pytest.raises(ValueError, match="no"), reporter(quiet=False) as progress, progress.stage("load"):
        raise ValueError("no")
    assert _shown(capsys.readouterr().err) == ["TIME  load  stopped"]


def test_quiet_shows_warnings_alone(capsys):
    with reporter(quiet=True) as progress, progress.stage("load"):
        progress.advance(1, 1)
        progress.note("careful")
    assert capsys.readouterr() == ("", "warning: careful\n")
