from __future__ import annotations

import platform
import re

import pytest

from edgeadapt import settings
from edgeadapt.device import read_device, require_this_machine
from edgeadapt.errors import ProfileError, RecipeError


@pytest.mark.parametrize("name", settings.names("devices"))
def test_every_shipped_device_is_whole_and_sourced(name):
    device = read_device(name)
    assert device.name == name
    assert device.sources
    assert all(re.fullmatch(r"https://[\w.-]+/\S*", source) for source in device.sources)
    assert not device.measured, "what ships is what makers say"
    assert settings.summary(settings.find("devices", name))


def test_at_least_twelve_devices_ship():
    assert len(settings.names("devices")) >= 12


def test_a_bandwidth_is_memory_width_times_rate():
    """The figures that are computed, again: bits of width / 8 x transfers a second."""
    expected = {
        "raspberry-pi-4": 32 / 8 * 3200e6,
        "raspberry-pi-5": 32 / 8 * 4267e6,
        "jetson-orin-nano": 128 / 8 * 6400e6,
        "pixel-7a": 64 / 8 * 6400e6,
        "galaxy-s24": 64 / 8 * 9600e6,
        "iphone-15-pro": 64 / 8 * 6400e6,
        "laptop-7840u": 128 / 8 * 5600e6,
        "macbook-air-m2": 128 / 8 * 6400e6,
    }
    for name, bandwidth in expected.items():
        assert read_device(name).memory_bandwidth_bytes_per_s == pytest.approx(bandwidth, rel=0.03), name


@pytest.mark.parametrize(
    ("name", "cores", "clock_hz", "float32", "int8"),
    [
        ("raspberry-pi-4", 4, 1.8e9, 8, None),
        ("raspberry-pi-5", 4, 2.4e9, 16, 64),
        ("jetson-orin-nano", 6, 1.7e9, 16, 64),
        ("laptop-7840u", 8, 3.3e9, 32, 128),
    ],
)
def test_a_rate_is_cores_times_clock_times_operations_a_cycle(name, cores, clock_hz, float32, int8):
    device = read_device(name)
    assert device.peak_flops_float32 == pytest.approx(cores * clock_hz * float32)
    assert device.peak_ops_int8 == (None if int8 is None else pytest.approx(cores * clock_hz * int8))


def test_the_cpu_is_always_this_machine():
    require_this_machine(read_device("cpu"))


def test_a_device_of_another_architecture_is_refused():
    with pytest.raises(ProfileError) as caught:
        require_this_machine(read_device("raspberry-pi-5"), "x86_64")
    assert caught.value.message == "device 'raspberry-pi-5' is an aarch64 machine, and this one is x86_64"
    assert caught.value.hint == (
        "run `edgeadapt profile` on the raspberry-pi-5 itself, or use --device cpu for this machine"
    )
    require_this_machine(read_device("raspberry-pi-5"), "aarch64")


def test_an_unknown_device_is_refused():
    with pytest.raises(RecipeError) as caught:
        read_device("rasberry-pi-5")
    assert caught.value.message == "unknown device 'rasberry-pi-5'"
    known = ", ".join(settings.names("devices"))
    assert caught.value.hint == f"did you mean 'raspberry-pi-5'? known: {known}; or give the path of a .toml file"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('title = "t"\nprovider = "cpu"\nfans = 2\n', "unknown field fans"),
        ('title = "t"\nprovider = "cpu"\nname = "x"\n', "unknown field name"),
        ('title = "t"\n', "field provider is missing"),
        (
            'title = "t"\nprovider = "npu"\n',
            "field provider must be one of 'cpu', 'cuda', 'tensorrt', 'wasm', 'webgpu', got the string 'npu'",
        ),
        ('title = "t"\nprovider = "cpu"\nthreads = 0\n', "field threads must be at least 1, got 0"),
        (
            'title = "t"\nprovider = "cpu"\noperator_overhead_s = 2.0\n',
            "field operator_overhead_s must be above 0 and below 1, got 2.0",
        ),
        ('title = "t"\nprovider = "cpu"\nthreads = 1.5\n', "field threads must be an integer, got the number 1.5"),
    ],
)
def test_wrong_fields_are_refused(tmp_path, text, message):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_device(file)
    assert caught.value.message == f"{file}: {message}"


def test_a_device_of_ones_own(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(f'title = "mine"\nprovider = "cpu"\nmachine = "{platform.machine()}"\nthreads = 1\n')
    device = read_device(file)
    assert (device.name, device.threads) == ("mine", 1)
    require_this_machine(device)
