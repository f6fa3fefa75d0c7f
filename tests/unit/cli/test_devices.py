from __future__ import annotations

import json

import pytest

from edgeadapt import settings
from edgeadapt.device import read_device
from edgeadapt.fields import to_mapping
from edgeadapt.profiling import detect


@pytest.fixture
def quick(monkeypatch):
    """As long as measuring needs to run at all."""
    monkeypatch.setattr(detect, "_SECONDS", 0.0)
    monkeypatch.setattr(detect, "_FEWEST_RUNS", 2)


def test_all_devices_are_listed(invoke):
    table = invoke("devices")
    assert table.exit_code == 0
    assert table.stdout == ""
    for name in settings.names("devices"):
        assert name in table.stderr
    assert "17.1 GB/s" in table.stderr
    listed = json.loads(invoke("devices", "--json").stdout)
    assert listed == [json.loads(json.dumps(to_mapping(read_device(name)))) for name in settings.names("devices")]


def test_this_machine_is_written_once(invoke, quick, tmp_path):
    file = tmp_path / "mine.toml"
    made = invoke("devices", "detect", "-o", str(file), "--json", "--quiet")
    assert made.exit_code == 0, made.stderr
    device = read_device(file)
    assert json.loads(made.stdout) == json.loads(json.dumps(to_mapping(device)))
    assert device.measured
    assert device.name == "mine"
    before = file.read_bytes()
    again = invoke("devices", "detect", "-o", str(file))
    assert again.exit_code == 1
    assert f"{file} exists already" in again.stderr.replace("\n", "")
    assert file.read_bytes() == before
    assert invoke("devices", "detect", "-o", str(file), "--force", "--threads", "1", "--quiet").exit_code == 0
    assert read_device(file).threads == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


def test_without_a_file_it_is_told(invoke, quick):
    told = invoke("devices", "detect", "--quiet")
    assert told.exit_code == 0
    assert told.stdout.startswith("# ")
    assert "measured = true\n" in told.stdout


def test_a_file_of_another_kind_is_refused(invoke, tmp_path):
    refused = invoke("devices", "detect", "-o", str(tmp_path / "mine.json"))
    assert refused.exit_code == 2
    assert "does not end in .toml" in refused.stderr
    nowhere = invoke("devices", "detect", "-o", str(tmp_path / "missing" / "mine.toml"))
    assert nowhere.exit_code == 1
    assert "cannot write" in nowhere.stderr
    assert invoke("devices", "--json", "detect").exit_code == 2
