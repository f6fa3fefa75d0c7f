"""ONNX Runtime Web: WebAssembly (SIMD, threads) or WebGPU, in Chromium without a window or on a phone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeadapt.bundle import Bundle
from edgeadapt.device import Device
from edgeadapt.errors import ProfileError
from edgeadapt.profiling import phone
from edgeadapt.profiling.device_side import system
from edgeadapt.profiling.job import Models, Shapes
from edgeadapt.profiling.runtimes._javascript import external_files, write_graphs
from edgeadapt.profiling.transports import Transport
from edgeadapt.profiling.transports.phone import Phone
from edgeadapt.profiling.unpacked_products import SESSION_OPTION, unpack_products
from edgeadapt.profiling.web.chromium import Chromium, find_browser
from edgeadapt.profiling.web.memory import PageMemory
from edgeadapt.profiling.web.packages import PROVIDERS, runtime_files
from edgeadapt.profiling.web.server import Server

ENGINE = "onnxruntime_web"
INSTALL = "npm install --ignore-scripts onnxruntime-web"
KINDS = ("memory",)

_MOST_UNPACKED = 10**9
"""Bytes of float32 weights of one graph: WebAssembly has 4 GB, for two graphs and what opening them takes."""


def require(device: Device) -> None:
    """Check that there is a browser and the runtime's package.

    Raises:
        ProfileError: saying what is missing.
    """
    if device.provider not in PROVIDERS:
        raise ProfileError(
            f"ONNX Runtime Web does not run on {device.provider!r}",
            hint=f"give the device's file a provider of {' or '.join(PROVIDERS)}",
        )
    if device.transport not in ("local", "phone"):
        raise ProfileError(
            f"no browser can be started on {device.name!r}, which is reached by {device.transport}",
            hint="open the page on that device: edgeadapt profile BUNDLE --device phone",
        )
    if device.transport == "local":
        find_browser()
    runtime_files(device.provider)


def made_for(device: Device, shapes: Shapes) -> dict[str, Any]:  # noqa: ARG001 - any shape is taken
    """Return what the graphs depend on: which kernels the provider has."""
    return {"provider": device.provider}


def prepare(bundle: Bundle, device: Device, folder: Path, shapes: Shapes) -> Models:  # noqa: ARG001 - any shape is taken
    """Write the graphs as a browser opens them."""
    files, options = write_graphs(bundle, folder)
    settings = {"external_data": external_files(bundle), "provider": device.provider, "threads": device.threads}
    changes, notes = _unpacked(folder, files) if device.provider == "wasm" else ({}, ())
    return Models(files, options | settings | changes, notes=notes)


def _unpacked(folder: Path, files: Mapping[str, str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Have weights in codes unpacked once, while a graph is opened; return options for that, and what to tell.

    WebAssembly has no kernel for MatMulNBits: ONNX Runtime would unpack them in every run. WebGPU has one.
    """
    found = {path: unpack_products((folder / path).read_bytes(), path) for path in files.values()}
    products = max(each.products for each in found.values())
    left = max(each.left for each in found.values())
    size = max(each.float_bytes for each in found.values())
    if products and size <= _MOST_UNPACKED:
        for path, each in found.items():
            (folder / path).write_bytes(each.model)
        note = (
            f"{products} products with weights in codes were unpacked to float32 while the model was opened "
            f"({size / 1e6:.0f} MB in memory for each graph)"
        )
        return {"extra": SESSION_OPTION}, (note, *_slow(left))
    return {}, _slow(products + left)


def _slow(products: int) -> tuple[str, ...]:
    """Return a note on products that are unpacked in every run."""
    note = (
        f"{products} products with weights in codes (MatMulNBits) are unpacked anew in every run: they are too large "
        f"in float32 (more than {_MOST_UNPACKED / 1e9:.0f} GB), or of a form that cannot be unpacked before"
    )
    return (note,) if products else ()


def measure(folder: Path, transport: Transport, timeout_s: float | None, what: str) -> dict[str, Any]:
    """Return what a page measures; each call starts a browser of its own, or asks for a visit of a phone's.

    Raises:
        ProfileError: if the browser cannot be started or ends, the measurement fails there, or time is over.
    """
    if not isinstance(transport, Phone):
        return measure_in_browser(folder, what, timeout_s)
    if what == "memory":
        return {"memory": None, "notes": ["the browser of another device does not tell how much memory a page takes"]}
    if transport.announce is None:
        raise ProfileError("nobody is told where the page is", hint="use `edgeadapt profile BUNDLE --device phone`")
    return phone.measure(
        folder,
        transport.listen,
        transport.address,
        timeout_s,
        transport.announce,
        what=what,
        progress=transport.progress,
    )


def measure_in_browser(
    folder: Path, what: str, timeout_s: float | None, *, flags: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return what a page measures; `flags` are further ones for the browser.

    Raises:
        ProfileError: as `measure`.
    """
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    provider = job["options"]["provider"]
    gpu = provider == "webgpu"
    noise, use_of_system = system.NoiseMeter(), system.SystemMeter()
    with (
        Server(folder, runtime_files(provider), kind=what, title="edgeadapt profile") as server,
        Chromium(server.url, gpu=gpu, flags=flags) as browser,
    ):
        server.memory = PageMemory(browser.pid, gpu=gpu)
        found = server.visit.wait(timeout_s, where="the browser", watch=browser.check, progress=lambda _: None)
    facts = system.host_facts()
    # what Python's own process did is no news here, and to it the browser is one of the others
    unknown = {"involuntary_switches": None, "others_ratio": None}
    return {
        **found,
        "machine": facts["machine"],
        "host": {**facts, "gpu": found["host"]["gpu"], "versions": found["host"]["versions"]},
        "noise": {**noise.read(), **unknown},
        "system": use_of_system.read(),
    }
