"""Second moments of what linear modules see."""

from __future__ import annotations

import numpy as np
import torch

from edgeadapt.export.activations import collect_moments
from edgeadapt.merging.load import base_from_module


class _Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(4, 3)
        self.two = torch.nn.Linear(4, 2)
        self.last = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = self.one(x), self.two(x)
        return self.last(one) + two


def test_moments_are_of_unit_vectors_and_shared_by_modules_with_one_input() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4) * torch.tensor([[1.0], [50.0], [1.0], [2.0], [3.0]])
    base = base_from_module(_Net(), name="net", example_inputs={"x": x}, dynamic_axes={"x": {0: "batch"}})

    moments = collect_moments(base, [{"x": x}, {"x": 7 * x}])

    unit = (x / x.norm(dim=1, keepdim=True)).numpy()
    np.testing.assert_allclose(moments["one"], unit.T @ unit / 5, rtol=1e-5, atol=1e-7)
    assert moments["one"] is moments["two"]
    assert set(moments) == {"one", "two", "last"}
