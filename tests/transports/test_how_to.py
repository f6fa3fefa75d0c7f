"""docs/how-to says what is true: its transport works as printed, and its messages are those of the code."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeadapt.device import Device, read_device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling import transports
from edgeadapt.profiling.transports import Completed, adb, ssh


def blocks(text: str, language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found
    return found


@pytest.fixture
def how_to(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The page; its transport is one of the package's for a while."""
    text = (root / "docs" / "how-to" / "add-a-transport.md").read_text(encoding="utf-8")
    (tmp_path / "kinds").mkdir()
    (tmp_path / "kinds" / "command.py").write_text(blocks(text, "python")[0])
    monkeypatch.setattr(transports, "__path__", [*transports.__path__, str(tmp_path / "kinds")])
    yield text
    sys.modules.pop("edgeadapt.profiling.transports.command", None)


def test_the_transport_of_the_page_works(how_to, tmp_path, files, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    device = Device("box", "a test", "cpu", transport="command", address="env", interpreter=sys.executable)
    with transports.connect(device) as transport:
        folder = transport.send(files)
        assert folder.startswith(f"{temporary}/edgeadapt-")
        with pytest.raises(ProfileError, match=r"hang.py took longer than 2 s on box \(env\)"):
            transport.run([transport.interpreter, "hang.py", "pids"], cwd=folder, timeout_s=2)
        done = transport.run([transport.interpreter, "-c", "print(2)"], cwd=folder)
    assert done == Completed(0, "2\n", "")
    assert list(temporary.iterdir()) == []
    with pytest.raises(ProfileError, match=r"box \(false\) runs no shell: it gave no reason"):
        transports.connect(Device("box", "a test", "cpu", transport="command", address="false"))


def test_the_device_file_of_the_page_is_one(how_to, tmp_path):
    (toml,) = blocks(how_to, "toml")
    path = tmp_path / "box.toml"
    path.write_text(toml)
    device = read_device(path)
    assert {name: getattr(device, name) for name in tomllib.loads(toml)} == tomllib.loads(toml)


def test_links_of_the_pages_lead_somewhere(root):
    pages = sorted((root / "docs" / "how-to").glob("*.md"))
    assert pages
    for page in pages:
        links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
        assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_messages_of_the_raspberry_pis_page_are_those_of_the_code(root):
    text = (root / "docs" / "how-to" / "profile-a-raspberry-pi.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*…[^|]*?) \|", text, re.MULTILINE)
    assert len(rows) == 8
    source = "".join(path.read_text(encoding="utf-8") for path in Path(next(iter(transports.__path__))).glob("*.py"))
    known = [message.format(where="…") for _, message, _ in (*ssh.FAILURES, *adb.FAILURES)]
    for row in rows:
        pieces = [
            piece.strip() for piece in row.replace("aarch64", "…").replace("armv7l", "…").split("…") if piece.strip()
        ]
        assert any(row in message for message in known) or all(piece in source for piece in pieces), row
