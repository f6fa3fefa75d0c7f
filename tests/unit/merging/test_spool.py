"""Weights in a mapped file: the same numbers, and nothing left of the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgeadapt.errors import FileError
from edgeadapt.merging.spool import SMALLEST_BYTES, spool


class _Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(300, 64)
        self.turned = torch.nn.Parameter(torch.randn(80, 256).T)
        self.head = torch.nn.Linear(64, 300)
        self.head.weight = self.embedding.weight


def test_weights_keep_their_values_and_are_read_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = _Tied()
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    parameters = dict(module.named_parameters())
    small = module.head.bias.data_ptr()
    large = {name: value.data_ptr() for name, value in parameters.items() if value.nbytes >= SMALLEST_BYTES}
    assert set(large) == {"embedding.weight", "turned"}

    rest = spool(module, tmp_path)

    for _ in range(2):
        assert all(torch.equal(value, before[name]) for name, value in module.named_parameters())
        rest()
    assert list(tmp_path.iterdir()) == []
    assert {name: value is parameters[name] for name, value in module.named_parameters()} == dict.fromkeys(before, True)
    assert all(parameters[name].data_ptr() != address for name, address in large.items())
    assert module.head.bias.data_ptr() == small
    assert module.head.weight is module.embedding.weight


def test_what_rests_is_not_in_memory(tmp_path: Path) -> None:
    smaps = Path("/proc/self/smaps_rollup")
    if not smaps.exists():
        pytest.skip("needs Linux")

    def resident() -> int:
        return next(int(line.split()[1]) for line in smaps.read_text().splitlines() if line.startswith("Rss:"))

    module = torch.nn.Linear(4096, 4096)
    spool(module, tmp_path)
    at_rest = resident()
    total = module.weight.sum()
    assert resident() - at_rest > 50_000
    assert torch.isfinite(total)


def test_small_modules_stay_where_they_are(tmp_path: Path) -> None:
    module = torch.nn.Linear(4, 4)
    address = module.weight.data_ptr()
    spool(module, tmp_path)()
    assert module.weight.data_ptr() == address


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        spool(torch.nn.Linear(256, 256), tmp_path / "missing")
    assert str(caught.value).startswith(f"the base's weights cannot be written to a file in {tmp_path / 'missing'}: ")
    assert str(caught.value).endswith("\nHint: free some space on that disk")
