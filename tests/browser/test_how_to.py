"""docs/how-to/profile-in-a-browser-or-phone.md names what there is."""

from __future__ import annotations

import re
from pathlib import Path

from edgeadapt.device import read_device
from edgeadapt.profiling import node_packages
from edgeadapt.profiling.web import chromium, packages


def test_the_page_names_packages_devices_and_variables_that_there_are(root: Path):
    text = (root / "docs" / "how-to" / "profile-in-a-browser-or-phone.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"(onnxruntime-\w+)@([\d.]+)", text)) == node_packages.VERSIONS
    devices = {name: read_device(name) for name in re.findall(r"--device ([\w-]+)", text)}
    assert set(devices) == {"cpu", "browser", "browser-webgpu", "phone"}
    assert {devices[name].runtime for name in ("browser", "browser-webgpu", "phone")} == {"web"}
    assert {devices[name].provider for name in ("browser", "browser-webgpu")} == set(packages.PROVIDERS)
    variables = {node_packages.MODULES_VARIABLE, chromium.BROWSER_VARIABLE}
    assert set(re.findall(r"EDGEADAPT_\w+", text)) == variables


def test_the_script_installs_the_versions_that_are_looked_for(root: Path):
    script = (root / "scripts" / "install-web-tools").read_text(encoding="utf-8")
    assert dict(re.findall(r"(onnxruntime-\w+)@([\d.]+)", script)) == node_packages.VERSIONS
