from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edgeadapt import settings
from edgeadapt.device import Device, device_toml, read_device
from edgeadapt.errors import BundleError
from edgeadapt.profiling import detect, probe_graphs, wire
from edgeadapt.profiling.graph_file import read_graph
from edgeadapt.runtime import ort


@pytest.fixture
def machine(tmp_path):
    """Folders like /proc and /sys."""
    proc, sys = tmp_path / "proc", tmp_path / "sys"
    cpu = sys / "devices/system/cpu/cpu0"
    (cpu / "cache/index3").mkdir(parents=True)
    (cpu / "cpufreq").mkdir()
    proc.mkdir()
    (cpu / "cache/index3/size").write_text("2048K\n")
    (cpu / "cpufreq/cpuinfo_max_freq").write_text("2400000\n")
    (proc / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd asimddp\n")
    return proc, sys


def test_this_machine_is_of_a_machines_order(monkeypatch):
    monkeypatch.setattr(detect, "_SECONDS", 0.05)
    found = detect.detect_device("here").device
    assert 1e8 < found.memory_bandwidth_bytes_per_s < 1e13
    assert 1e8 < found.peak_flops_float32 < 1e15
    assert 1e8 < found.peak_ops_int8 < 1e16
    assert 1e-9 < found.operator_overhead_s < 1e-2
    assert found.memory_bytes > 1e8
    assert found.measured
    assert "threads on" in found.sources[0]


def test_what_linux_says_is_read(machine):
    proc, sys = machine
    assert detect.cpu_features(proc) == ("fp", "asimd", "asimddp")
    assert detect.last_level_cache_bytes(sys) == 2048 << 10
    assert detect._clock_hz(sys) == 2.4e9
    (proc / "cpuinfo").write_text("flags : fpu sse4_2 avx2 avx512_vnni amx_int8 nx\n")
    assert detect.cpu_features(proc) == ("sse4_2", "avx2", "avx512_vnni", "amx_int8")


def test_what_linux_does_not_say_is_left_out(tmp_path):
    assert detect.cpu_features(tmp_path) == ()
    assert detect.last_level_cache_bytes(tmp_path) is None
    assert detect._clock_hz(tmp_path) is None


def test_a_probe_computes_what_it_says(tmp_path):
    """A product that ONNX Runtime computes as numpy does is one whose operations are counted rightly."""
    rows = np.random.default_rng(1).standard_normal((3, probe_graphs.WIDTH), np.float32)
    weight = np.random.default_rng(0).standard_normal((probe_graphs.WIDTH, probe_graphs.WIDTH), np.float32)
    np.testing.assert_allclose(_run(tmp_path, probe_graphs.float32_product(), rows), rows @ weight, atol=1e-3)
    codes = np.random.default_rng(0).integers(0, 256, (probe_graphs.WIDTH, probe_graphs.WIDTH), np.uint8)
    expected = rows @ ((codes.astype(np.float32) - 128) * 0.01).T
    answer = _run(tmp_path, probe_graphs.int8_product(), rows)
    assert np.abs(answer - expected).max() < 0.02 * np.abs(expected).max()
    row = np.ones((1, probe_graphs.CHAIN_WIDTH), np.float32)
    np.testing.assert_allclose(_run(tmp_path, probe_graphs.chain(4), row), np.full_like(row, ((1.5 * 0.5) + 0.5) * 0.5))


def test_the_reader_reads_what_the_writer_wrote(tmp_path):
    (tmp_path / "g.onnx").write_bytes(probe_graphs.int8_product())
    graph = read_graph(tmp_path / "g.onnx")
    (node,) = graph.nodes
    assert (node.op_type, node.inputs, node.outputs) == ("MatMulNBits", ("x", "codes", "scales"), ("y",))
    assert node.attributes == {"K": 1024, "N": 1024, "bits": 8, "block_size": 32, "accuracy_level": 4}
    assert graph.stored["codes"].shape == (1024, 32, 32)
    assert graph.stored["scales"].size_bytes == 4 * 1024 * 32
    assert (graph.inputs, graph.outputs) == (("x",), ("y",))


@pytest.mark.parametrize("data", [b"\xff" * 12, b"\x0a\x05ab", b"\x3b", b"", b"\x08\x01"])
def test_what_is_no_graph_is_refused(tmp_path, data):
    (tmp_path / "g.onnx").write_bytes(data)
    with pytest.raises(BundleError, match="is not an ONNX graph"):
        read_graph(tmp_path / "g.onnx")


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**40, 2**63 - 1, -1, -(2**63)])
def test_whole_numbers_survive(value):
    ((number, read),) = wire.fields(memoryview(wire.message((3, value))), "here")
    assert (number, wire.signed(read)) == (3, value)


@pytest.mark.parametrize("name", settings.names("devices"))
def test_a_device_survives_its_file(tmp_path, name):
    device = read_device(name)
    (tmp_path / f"{name}.toml").write_text(device_toml(device))
    assert read_device(tmp_path / f"{name}.toml") == device


def test_every_field_survives_its_file(tmp_path):
    device = Device(
        name="all", title='a "quoted" \\ title', provider="cpu", runtime="onnxruntime", transport="ssh",
        address="me@here:22", listen="192.168.1.2", interpreter="/usr/bin/python3", threads=3, machine="aarch64",
        operating_system="Linux é", cores=4,
        cpu_features=("a", "b"), clock_hz=2.4e9, memory_bytes=5, memory_bandwidth_bytes_per_s=1.5e10,
        peak_flops_float32=2e11, peak_ops_int8=3e11, operator_overhead_s=1.25e-06, measured=True, thermal="fan",
        sources=("https://a.example/",),
    )  # fmt: skip
    assert all(getattr(device, field.name) != field.default for field in dataclasses.fields(Device))
    (tmp_path / "all.toml").write_text(device_toml(device), encoding="utf-8")
    assert read_device(tmp_path / "all.toml") == device


def _run(folder, model, values):
    (folder / "probe.onnx").write_bytes(model)
    binding = ort.Binding(ort.open_graph(folder / "probe.onnx", threads=1), {})
    binding.set_input(probe_graphs.INPUT, ort.Tensor(values))
    binding.allocate_output("y")
    return binding.run()["y"]
