"""The harness: rounds that survive a failing engine, noise, figures, bars, the page."""

from __future__ import annotations

import select
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ENGINE = """
import os
MODULES, VERSIONS, SWITCHES_AT_ONCE, WHOLE, EVERY = (), (), True, False, 1

class Engine:
    def __init__(self, configuration, folder, threads, adapters):
        self.calls = 0
        if configuration == "refuses":
            raise ValueError("no such model")
    def use(self, adapter):
        pass
    def forget(self, adapter):
        pass
    def prefill(self, ids, room):
        self.calls += 1
        return len(ids)
    def decode(self, count):
        if CONFIGURATION == "dies" and self.calls > 3:
            os._exit(7)
        return [0] * count
"""


def side(tmp_path: Path, configuration: str, **more: Any) -> Any:
    from child import load_engine
    from side import Side

    file = tmp_path / f"{configuration}.py"
    file.write_text(ENGINE + f"\nCONFIGURATION = {configuration!r}\n")
    return Side("fake", load_engine(file), configuration, Path(sys.executable), tmp_path, 1, **more)


def workload() -> Any:
    from workload import Workload

    return Workload(prompt=[1] * 128, long_prompt=[1] * 512, held_out={})


def test_rounds_go_on_without_an_engine_that_dies(tmp_path: Path) -> None:
    from measure import Cell, speed_rounds

    cells = [Cell(side(tmp_path, name)) for name in ("works", "dies")]
    failures: list[dict[str, str]] = []
    for cell in cells:
        cell.side.launch(tmp_path / "logs")
        cell.side.load()
    try:
        options = {
            "first": 1,
            "rounds": 3,
            "deadline": time.monotonic() + 60,
            "failures": failures,
            "say": lambda _: None,
        }
        noise = speed_rounds(cells, workload(), **options)
    finally:
        for cell in cells:
            cell.side.close()
    works, dies = cells
    assert len(noise) >= 3
    assert sorted(works.samples) == [row["round"] for row in noise]
    assert all(len(samples["decode_chunks_s"]) == 4 for samples in works.samples.values())
    assert dies.failed
    assert list(dies.samples) == [1]  # it died in round 2, of which nothing is kept
    (failure,) = failures
    assert (failure["side"], failure["step"]) == ("fake dies, base", "decode, round 2")
    assert failure["message"] == "ended with 7 during 'decode'"


def test_an_engine_that_cannot_load_says_why_and_is_ended(tmp_path: Path) -> None:
    from measure import start
    from side import SideError

    refuses = side(tmp_path, "refuses")
    with pytest.raises(SideError, match="ValueError: no such model"):
        start(refuses, workload(), tmp_path / "logs")
    refuses.close()
    assert refuses.process is None


def test_a_fresh_start_is_measured_from_outside(tmp_path: Path) -> None:
    from measure import several, start, swaps

    adapted = side(tmp_path, "works", adapter="a", adapters={"a": "x", "b": "y"})
    found = start(adapted, workload(), tmp_path / "logs")
    adapted.close()
    assert set(found["memory"]) == {"loaded", "used", "used another adapter"}
    for memory in found["memory"].values():
        assert 0 < memory["proportional_bytes"] <= memory["resident_bytes"] <= memory["peak_resident_bytes"]
        assert 0 < memory["anonymous_bytes"] <= memory["resident_bytes"]
    both = several([side(tmp_path, "works", note=f"A/A {i}") for i in range(2)], workload(), tmp_path / "logs")
    assert both > 0
    adapted.launch(tmp_path / "logs")
    adapted.load()
    timed = swaps(adapted, workload(), 2)
    adapted.close()
    assert {key: len(samples) for key, samples in timed.items()} == {
        "resident_ready_s": 2,
        "from_disk_ready_s": 2,
        "resident_first_token_s": 2,
        "from_disk_first_token_s": 2,
        "no_swap_first_token_s": 2,
    }


def test_what_pip_says_is_kept(tmp_path: Path) -> None:
    from environments import InstallError, ready_python

    python = tmp_path / "broken" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    missing = str(tmp_path / "no-such-package.whl")
    engine: Any = SimpleNamespace(LABEL="Broken", PACKAGES=((missing,),))
    with pytest.raises(InstallError, match="no-such-package"):
        ready_python(engine, "broken", tmp_path, lambda _: None)
    assert not (tmp_path / "broken" / "benchmark-packages").exists()


def proc(folder: Path, *, user: int, idle: int, steal: int, own: int, switches: int, waited_us: int) -> Path:
    """A /proc with one measured process, 42, whose name holds a bracket."""
    process = folder / "42" / "task" / "42"
    process.mkdir(parents=True, exist_ok=True)
    (folder / "pressure").mkdir(exist_ok=True)
    (folder / "stat").write_text(f"cpu  {user} 0 0 {idle} 0 0 0 {steal} 0 0\ncpu0 1 2 3\n")
    (folder / "42" / "stat").write_text(f"42 (a) b) S {' '.join(['0'] * 10)} {own} 0 0\n")
    (process / "status").write_text(f"Name:\tx\nnonvoluntary_ctxt_switches:\t{switches}\n")
    (folder / "pressure" / "cpu").write_text(
        f"some avg10=0.00 avg60=0.00 avg300=0.00 total={waited_us}\nfull total=0\n"
    )
    return folder


def test_noise_is_what_others_used(tmp_path: Path) -> None:
    from noise import between, snapshot

    before = snapshot([42], proc(tmp_path, user=100, idle=100, steal=0, own=50, switches=3, waited_us=0))
    after = snapshot([42], proc(tmp_path, user=180, idle=220, steal=0, own=120, switches=8, waited_us=500_000))
    quiet = between(before, after, 1.0)
    # 200 ticks in all: 80 busy, of which 70 the measured process.
    assert (quiet.foreign_share, quiet.steal_share, quiet.pressure_share) == (0.05, 0.0, 0.5)
    assert (quiet.involuntary_switches, quiet.noisy) == (5, False)
    later = snapshot([42], proc(tmp_path, user=280, idle=300, steal=20, own=200, switches=8, waited_us=500_000))
    noisy = between(after, later, 1.0)
    assert (noisy.foreign_share, noisy.steal_share, noisy.noisy) == (0.1, 0.1, True)


def result() -> dict[str, Any]:
    """Three rounds and a noisy one in which everything is off."""

    def rounds(decode_s: float) -> dict[str, Any]:
        return {
            str(n): {"decode_s": decode_s * slow, "prefill_512_s": 0.4, "prefill_128_s": 0.1}
            for n, slow in ((1, 1), (2, 1.5), (3, 1), (4, 9 * decode_s))
        }

    def row(engine: str, configuration: str, adapter: str | None, decode_s: float, **more: Any) -> dict[str, Any]:
        return {"engine": engine, "label": engine, "configuration": configuration, "adapter": adapter, "note": "",
                "rounds": rounds(decode_s), **more}  # fmt: skip

    memory = {when: {"resident_bytes": size, "proportional_bytes": size, "peak_resident_bytes": size}
              for when, size in (("loaded", 150_000_000), ("used", 160_000_000))}  # fmt: skip
    quality = {"mean_kl": 0.005, "top1": 0.96, "positions": 384, "greedy_same": 128, "greedy_steps": 128}
    start = {"import_s": 0.2, "load_s": 0.4, "first_call_s": 0.1, "memory": memory}
    noise = {"steal_share": 0.0, "pressure_share": None, "involuntary_switches": 0, "load_average": 0.1, "seconds": 9}
    return {
        "date": "2026-01-31",
        "setting": {"threads": 2, "quick": False, "prompt_tokens": 128, "long_prompt_tokens": 512, "new_tokens": 128},
        "host": {"cpu": "A", "machine": "x", "cores": 2, "instruction_sets": ["avx2"], "last_level_cache": "1M",
                 "memory_bytes": 2**33, "gpu": None, "system": "S", "python": "3"},
        "made": {"edgeadapt int8": {"cpu_s": 90, "wall_s": 60, "peak_bytes": 2_000_000_000, "bytes": {"base": 1}}},
        "sides": {
            "edgeadapt int8, base": row("edgeadapt", "int8", None, 1.0, starts=[start], quality=quality),
            "edgeadapt int8, sql": row("edgeadapt", "int8", "sql", 1.25),
            "llamacpp Q8_0, sql": row("llamacpp", "Q8_0", "sql", 2.5),
        },
        "rounds": [
            {"round": n, "noisy": n == 4, "foreign_share": 0.3 if n == 4 else 0.0, **noise} for n in (1, 2, 3, 4)
        ],
        "failures": [{"side": "openvino", "step": "install", "message": "no `wheel`\nfound"}],
    }  # fmt: skip


def test_figures_are_of_quiet_rounds_and_a_cost_is_a_share_of_the_speed() -> None:
    from figures import Figures

    figures = Figures(result())
    plain, adapted = figures.find("edgeadapt", "int8"), figures.find("edgeadapt", "int8", "sql")
    assert plain is not None
    assert figures.rounds(plain, "decode") == {1: 128.0, 2: 128 / 1.5, 3: 128.0}
    tax = figures.tax(adapted, plain)
    assert tax is not None
    assert (tax["median"], tax["n"]) == (pytest.approx(0.2), 3)  # 1 - 1 / 1.25
    assert tax["low"] <= tax["median"] <= tax["high"]
    assert figures.find("edgeadapt", "int4") is None
    assert figures.tax(None, plain) is None


def test_every_bar_is_there_met_missed_or_not_measured() -> None:
    from bars import bars
    from figures import Figures

    found = {bar.what: bar for bar in bars(Figures(result()), {})}
    tax = found["Adapter tax, decode, slots, r=16 all-linear, int8"]
    assert (tax.verdict, tax.shown) == ("**missed**", "20.0% (20.0% to 20.0%)")
    faster = found["Decode with a LoRA in slots, int8 / llama.cpp Q8_0 with the same LoRA"]
    assert (faster.verdict, faster.shown) == ("met", "2.00 × (2.00 to 2.00)")
    assert found["Load, warm file cache, int8"].verdict == "**missed**"
    assert found["RSS after load, int8"].verdict == "met"
    assert found["Tax when promoted, int4"].verdict == "not measured"
    empty = Figures({"sides": {}, "made": {}, "setting": result()["setting"]})
    assert {bar.verdict for bar in bars(empty, {})} == {"not measured"}
    assert len(bars(empty, {})) == len(found)


def test_the_page_shows_failures_and_leaves_out_noisy_rounds() -> None:
    from figures import Figures
    from page import picture, text_of

    text = text_of(result())
    assert "- **openvino**, install: `no 'wheel' found`" in text
    assert "3 quiet rounds are used" in text
    assert "noisy, repeated" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) < 400
    drawn = picture(Figures(result()))
    assert "edgeadapt int8" in drawn
    assert "KL 0.0050" in drawn


def test_the_cost_model_finds_what_made_the_times() -> None:
    from cost_model import fit

    points = [
        {"name": f"{n} {b}", "nodes": n, "bytes": b, "flops": f, "seconds": n * 2e-6 + b / 1e10}
        for n, b, f in ((500, 1e8, 3e8), (700, 9e7, 3e8), (400, 1e9, 1e9), (450, 5e8, 9e8), (800, 2e8, 2e8))
    ]
    found = fit(points)
    assert found["us_per_node"] == pytest.approx(2.0)
    assert found["bytes_per_s"] == pytest.approx(1e10)
    assert found["max_error"] < 1e-9
    worse = fit([{**point, "seconds": point["seconds"] * (1.1 if i else 0.9)} for i, point in enumerate(points)])
    assert 0.01 < worse["mean_error"] <= worse["max_error"] < 0.2


def test_a_random_adapter_is_one_that_edgeadapt_reads(tmp_path: Path) -> None:
    import json

    from random_adapter import write_random_adapter

    from edgeadapt import read_adapters

    config = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
              "intermediate_size": 12}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    target = tmp_path / "a"
    write_random_adapter(target, tmp_path, rank=2, modules=("q_proj", "v_proj", "down_proj"), base_name="x/y")
    (adapter,) = read_adapters(target)
    assert adapter.name == "a"
    assert len(adapter.tensors) == 2 * 3 * 2


def test_every_engine_has_what_the_harness_asks_for(root: Path) -> None:
    from child import load_engine

    before = set(sys.modules)
    engines = {path.stem: load_engine(path) for path in (root / "benchmarks" / "engines").glob("*.py")}
    assert {"edgeadapt", "genai", "llamacpp", "openvino", "optimum", "peft"} <= engines.keys()
    for engine in engines.values():
        for name in ("LABEL", "PACKAGES", "MODULES", "VERSIONS", "SWITCHES_AT_ONCE", "EVERY", "prepare", "files"):
            assert hasattr(engine, name), (engine, name)
        assert engine.CONFIGURATIONS
        asked = "generate" if engine.WHOLE else "decode"
        assert all(hasattr(engine.Engine, name) for name in ("use", "forget", "prefill", asked, "logits"))
    # The parent reads them in its own environment: nothing of an engine's may be imported.
    heavy = {"onnxruntime_genai", "openvino_genai", "llama_cpp", "optimum"}
    assert not heavy & (set(sys.modules) - before)


def test_engines_are_chosen_with_their_configurations(capsys: pytest.CaptureFixture[str]) -> None:
    from bench import _arguments

    assert _arguments(["--engines", "peft,edgeadapt:int8,edgeadapt:int4"]).engines == {
        "peft": [],
        "edgeadapt": ["int8", "int4"],
    }
    for words, message in (
        ("onnx", "unknown engine 'onnx'; known: edgeadapt, genai, llamacpp, openvino, optimum, peft"),
        ("genai:q4", "genai has no configuration 'q4'; known: int8, int4"),
    ):
        with pytest.raises(SystemExit):
            _arguments(["--engines", words])
        assert message in capsys.readouterr().err


SPINS = """
import sys, time
sys.stdin.readline()
end = time.monotonic() + 0.3
while time.monotonic() < end:
    pass
print("done", flush=True)
sys.stdin.readline()
"""


def test_a_process_is_waited_for_while_a_thread_spins() -> None:
    from side import settle

    process = subprocess.Popen([sys.executable, "-c", SPINS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "R":
        time.sleep(0.001)
    settle(process.pid)
    assert select.select([process.stdout], [], [], 0)[0]  # it has come to its end, before settle came back
    process.stdin.close()
    process.wait()
    process.stdout.close()
