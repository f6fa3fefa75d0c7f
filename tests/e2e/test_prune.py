"""Pruning and int8 adapters through a whole export of a tiny decoder."""

from __future__ import annotations

import numpy as np

from edgeadapt.addition import verify_bundle
from edgeadapt.bundle import open_bundle
from edgeadapt.runtime import open_session
from tests.e2e.conftest import Exported

DTYPES = ("int8", "float32")
ADAPTERS = ("adapter0", "adapter1")
IDS = {"input_ids": np.array([[5, 9, 2, 7, 3]])}


def test_a_pruned_bundle_keeps_its_budget_and_says_what_is_gone(exported: Exported) -> None:
    whole, cut = (open_bundle(exported("llama", quantize="none", **more)) for more in ({}, {"prune_kl": 0.02}))
    assert verify_bundle(cut.path) == []
    for name in ADAPTERS:
        record, before = cut.manifest.adapters[name], whole.manifest.adapters[name]
        assert before.pruned is None
        assert record.pruned is not None
        assert record.pruned == cut.adapter_json(name).record.pruned
        assert 0 < record.pruned.kl <= record.pruned.max_kl == 0.02
        assert record.pruned.parameters_before == before.parameters
        assert record.pruned.parameters == record.parameters < before.parameters
        assert record.pruned.ranks < record.pruned.ranks_before
        sizes = [b.manifest.files[f"adapters/{name}/adapter.onnx_adapter"].size for b in (whole, cut)]
        assert sizes[1] < sizes[0]
    # what the quality table says of the pruned adapter is against the whole one in torch
    rows = {row["adapter"]: row["mean_kl"] for row in cut.manifest.quality}
    for name in ADAPTERS:
        pruned = cut.manifest.adapters[name].pruned
        assert pruned is not None
        np.testing.assert_allclose(rows[name], pruned.kl, rtol=0.01)


def test_int8_adapters_are_nearly_the_float32_ones(exported: Exported) -> None:
    bundles = {dtype: open_bundle(exported("llama", quantize="none", adapter_dtype=dtype)) for dtype in DTYPES}
    assert verify_bundle(bundles["int8"].path) == []
    tensors = {dtype: bundle.adapter_tensors("adapter0") for dtype, bundle in bundles.items()}
    for name, exact in tensors["float32"].items():
        error = np.abs(tensors["int8"][name] - exact).max() / np.abs(exact).max()
        assert 0 < error <= 0.501 / 127
    outputs = {}
    for dtype, bundle in bundles.items():
        assert bundle.manifest.adapter_dtype == dtype
        with open_session(bundle, threads=1) as session:
            for adapter in (None, "adapter0"):
                session.use(adapter)
                outputs[dtype, adapter] = session.run(IDS)["logits"]
    effect = np.abs(outputs["float32", "adapter0"] - outputs["float32", None]).mean()
    change = np.abs(outputs["int8", "adapter0"] - outputs["float32", "adapter0"]).mean()
    assert 0 < change < 0.1 * effect  # on random weights, where nothing is robust
