"""The measuring side of benchmarks/: its protocol and its arithmetic."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ENGINE = """
MODULES, VERSIONS, SWITCHES_AT_ONCE, WHOLE, EVERY = (), (), True, False, 1

class Engine:
    def __init__(self, configuration, folder, threads, adapters):
        self.adapters = adapters
    def use(self, adapter):
        if adapter is not None and adapter not in self.adapters:
            raise KeyError(adapter)
    def prefill(self, ids, room):
        print("a library prints this")
        return sum(ids)
    def decode(self, count):
        return list(range(count))
"""


def load(root: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, root / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_child_answers_each_line_and_survives_a_failure(root: Path, tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text(ENGINE)  # the name of a package, as engines/openvino.py has
    requests = [
        {"do": "load", "configuration": "c", "folder": "f", "threads": 1, "adapters": {"a": "x"}},
        {"do": "prefill", "adapter": "a", "ids": [1, 2], "room": 0},
        {"do": "prefill", "adapter": "b", "ids": [1, 2], "room": 0},
        {"do": "halve"},
        {"do": "decode", "adapter": None, "count": 2},
        {"do": "logits", "adapter": None, "ids": [1], "path": "p"},
    ]
    done = subprocess.run(
        [sys.executable, str(root / "benchmarks" / "child.py"), str(tmp_path / "numpy.py")],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        check=True,
    )
    loaded, read, unknown, halved, decoded, logits = (json.loads(line) for line in done.stdout.splitlines())
    assert {"import_s", "load_s", "versions"} == loaded.keys()
    assert read["token"] == 3
    assert unknown == {"error": "KeyError: 'b'"}
    assert halved == {"error": "KeyError: 'halve'"}
    assert decoded["tokens"] == [0, 0, 1]  # one untimed, two timed
    assert logits == {"error": "AttributeError: 'Engine' object has no attribute 'logits'"}  # numpy was found
    assert "a library prints this" in done.stderr


def test_ratios_are_of_pairs_not_of_medians(root: Path) -> None:
    statistics_of = load(root, "statistics_of")
    assert statistics_of.summary([3.0, 1.0, 8.0, 4.0, 2.0]) == {
        "median": 3.0,
        "quartile1": 2.0,
        "quartile3": 4.0,
        "min": 1.0,
        "max": 8.0,
        "n": 5,
    }
    # Both sides slow down together in round two: the ratio does not move. Round 4 has no partner.
    found = statistics_of.ratio({1: 4.0, 2: 2.0, 3: 8.0, 4: 9.0}, {1: 2.0, 2: 1.0, 3: 4.0})
    assert found == {"median": 2.0, "low": 2.0, "high": 2.0, "n": 3}
    assert statistics_of.ratio({1: 1.0}, {2: 1.0}) is None
    assert statistics_of.ratio({1: 3.0}, {1: 2.0}) == {"median": 1.5, "low": None, "high": None, "n": 1}


def test_the_bootstrap_interval_holds_the_median_and_grows_with_the_spread(root: Path) -> None:
    interval = load(root, "statistics_of").bootstrap_interval
    narrow, wide = interval([0.99, 1.0, 1.0, 1.0, 1.01]), interval([0.5, 0.8, 1.0, 1.2, 1.5])
    assert narrow[0] <= 1.0 <= narrow[1]
    assert wide[0] < narrow[0] <= narrow[1] < wide[1]
    assert interval([0.5, 0.8, 1.0, 1.2, 1.5]) == wide


def test_packed_adapters_compute_what_the_separate_ones_do(root: Path) -> None:
    slots = load(root, "genai_slots")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 8)).astype(np.float32)
    downs = [rng.normal(size=(8, 2)).astype(np.float32) for _ in range(3)]
    ups = [rng.normal(size=(2, out)).astype(np.float32) for out in (8, 4, 4)]
    packed = (x @ np.concatenate(downs, axis=1)) @ slots._block_diagonal(ups)
    separate = np.concatenate([x @ a @ b for a, b in zip(downs, ups, strict=True)], axis=1)
    np.testing.assert_allclose(packed, separate, rtol=0, atol=1e-5)  # float32 sums of 8 products


def test_agreement_is_zero_kl_for_equal_logits_and_known_for_known_ones(root: Path) -> None:
    agreement = load(root, "agreement").agreement
    even, sure = np.log(np.array([[0.5, 0.5]], np.float32)), np.log(np.array([[0.25, 0.75]], np.float32))
    assert agreement(even, even + 3) == {"mean_kl": 0.0, "max_kl": 0.0, "top1": 1.0, "positions": 1}
    # 0.5 ln(0.5 / 0.25) + 0.5 ln(0.5 / 0.75)
    np.testing.assert_allclose(agreement(even, sure)["mean_kl"], 0.143841, atol=1e-6)
    assert agreement(even, sure)["top1"] == 0.0
    with pytest.raises(ValueError, match=r"logits \[1, 2\] cannot be compared with the reference's \[2, 2\]"):
        agreement(np.zeros((2, 2), np.float32), even)
