"""NeMo's files are refused with the reason, and nothing of their pickles is run."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch

from edgeadapt.adapters import read_adapters
from edgeadapt.errors import AdapterError


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What save_adapters writes, with a class in the place of OmegaConf's that cannot be made again."""
    module = types.ModuleType("omegaconf")

    class DictConfig:
        """Stands for OmegaConf's."""

        def __reduce__(self) -> tuple[object, tuple[str]]:
            return DictConfig, ("x",)

    DictConfig.__module__, DictConfig.__qualname__ = "omegaconf", "DictConfig"
    module.DictConfig = DictConfig  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "omegaconf", module)
    folder = tmp_path / "speech"
    folder.mkdir()
    state = {f"adapter_layer.speech.module.{index}.weight": torch.zeros(4, 4) for index in (0, 1, 3)}
    torch.save({"encoder:speech": [state, state], "__cfg__": DictConfig()}, folder / "adapters.pt")
    monkeypatch.delitem(sys.modules, "omegaconf")
    return folder


def test_what_save_adapters_writes(saved: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        read_adapters(saved)
    assert (caught.value.message, caught.value.hint) == (
        (
            f"{saved}/adapters.pt is what NeMo's save_adapters writes: it does not say which modules the adapter "
            "changes, and its config can only be had by running the pickle"
        ),
        (
            "with NeMo at hand write a linear_adapter folder (docs/formats/adapter-folder.md): of each module with an "
            "adapter_layer, norm, down and up are its module.0, module.1 and module.3"
        ),
    )
    assert "omegaconf" not in sys.modules


def test_an_archive(tmp_path: Path) -> None:
    (tmp_path / "lora.nemo").write_bytes(b"")
    with pytest.raises(AdapterError) as caught:
        read_adapters(tmp_path)
    assert caught.value.message == (
        f"{tmp_path}/lora.nemo is an archive of NeMo, whose modules have other names than those of the base as others "
        "load it"
    )


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", {"weight": torch.zeros(2)}])
def test_other_files_are_not_taken_for_it(content: bytes | dict[str, torch.Tensor], tmp_path: Path) -> None:
    if isinstance(content, bytes):
        (tmp_path / "adapters.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "adapters.pt")
    with pytest.raises(AdapterError, match="holds no adapter"):
        read_adapters(tmp_path)
