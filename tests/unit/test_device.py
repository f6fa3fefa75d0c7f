from __future__ import annotations

import platform

import pytest

from edgeadapt import settings
from edgeadapt.device import read_device, require_this_machine
from edgeadapt.errors import ProfileError, RecipeError


@pytest.mark.parametrize("name", settings.names("devices"))
def test_every_shipped_device_is_whole_and_sourced(name):
    device = read_device(name)
    assert device.name == name
    assert device.sources
    assert settings.summary(settings.find("devices", name))


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
    assert caught.value.hint == (
        f"did you mean 'raspberry-pi-5'? known: {', '.join(settings.names('devices'))}; "
        "or give the path of a .toml file"
    )


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
