"""Write docs/benchmarks.md and its picture from what lies in benchmarks/results: python benchmarks/page.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from bars import bars, percent
from figures import Figures, table
from more_sections import quality_section, sessions_section
from plot import Row, bar_chart
from shapes_page import shapes_section

HERE = Path(__file__).resolve().parent
RESULTS, DOCS = HERE / "results", HERE.parent / "docs"
MB = 1e6


def write() -> None:
    """Write the page and the picture."""
    result = json.loads((RESULTS / "peers.json").read_text(encoding="utf-8"))
    (DOCS / "benchmarks").mkdir(exist_ok=True)
    (DOCS / "benchmarks" / "decode.svg").write_text(picture(Figures(result)), encoding="utf-8")
    for path in sorted(RESULTS.glob("peers_*.json")):  # runs on other machines, whole, with nothing of this one
        other = json.loads(path.read_text(encoding="utf-8"))
        (DOCS / "benchmarks" / f"{path.stem}.md").write_text(own_run(other), encoding="utf-8")
    (DOCS / "benchmarks.md").write_text(text_of(result), encoding="utf-8")


def own_run(result: Mapping[str, Any]) -> str:
    """What one run says by itself."""
    figures = Figures(result)
    sections = [
        _head(figures).replace("# Benchmarks", f"# Benchmarks on another machine: {result['host']['cpu']}", 1),
        f"## Bars\n\n{_BARS}\n\n{table([_bar_row(bar) for bar in bars(figures, {})])}",
        f"## Speed and quality\n\n{_SPEED}\n\n{table(_speed_rows(figures))}",
        f"## Adapters swapped\n\n{_SWAPS}\n\n{table(_swap_rows(figures))}",
        f"## Promotion\n\n{_PROMOTION}\n\n{table(_promotion_rows(figures))}",
        f"## Load time and memory\n\n{_MEMORY}\n\n{table(_start_rows(figures))}",
        f"## Several processes\n\n{_SEVERAL}\n\n{table(_several_rows(figures))}",
        f"## What making the files costs\n\n{_MADE}\n\n{table(_made_rows(figures))}",
        f"## What failed\n\n{_failures(figures)}",
        f"## Noise\n\n{_noise(figures)}",
    ]
    return "\n\n".join(sections).rstrip() + "\n"


def text_of(result: Mapping[str, Any]) -> str:
    """The whole page."""
    figures, others = Figures(result), {}
    for path in RESULTS.glob("*.json"):
        others[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    sections = [
        _head(figures),
        f"## Bars\n\n{_BARS}\n\n{table([_bar_row(bar) for bar in bars(figures, others)])}",
        f"## Speed and quality\n\n![Decode speed](benchmarks/decode.svg)\n\n{_SPEED}\n\n{table(_speed_rows(figures))}",
        quality_section(others.get("int4_quality")),
        f"## Adapters swapped\n\n{_SWAPS}\n\n{table(_swap_rows(figures))}",
        f"## Promotion\n\n{_PROMOTION}\n\n{table(_promotion_rows(figures))}",
        f"## Load time and memory\n\n{_MEMORY}\n\n{table(_start_rows(figures))}",
        f"## Several processes\n\n{_SEVERAL}\n\n{table(_several_rows(figures))}",
        sessions_section(others.get("memory")),
        f"## What making the files costs\n\n{_MADE}\n\n{table(_made_rows(figures))}",
        shapes_section(others.get("shapes")),
        f"## What failed\n\n{_failures(figures)}",
        f"## Noise\n\n{_noise(figures)}",
        _more(),
    ]
    return "\n\n".join(sections).rstrip() + "\n"


def picture(figures: Figures) -> str:
    """Decode speed with and without an adapter, KL beside it."""
    rows = []
    for name, side in figures.sides.items():
        if side["adapter"] or side["note"]:
            continue
        adapted = figures.find(side["engine"], side["configuration"], "sql")
        pair = [figures.summary(own, "decode") if own else None for own in (name, adapted)]
        if any(pair):
            kl = figures.quality(name).get("mean_kl")
            note = "" if kl is None else f"KL {kl:.4f}" if kl < 0.1 else f"KL {kl:.2f}"
            spans = [(s["median"], s["quartile1"], s["quartile3"]) if s else None for s in pair]
            label = f"{side['label'].split(' (')[0]} {side['configuration']}"
            rows.append(Row(label, spans[0], spans[1], note))
    rows.sort(key=lambda row: -(row.base or row.adapter or (0,))[0])
    threads = figures.result["setting"]["threads"]
    return bar_chart(f"SmolLM2-135M, tokens per second, {threads} threads (medians, quartiles)", rows)


def _head(f: Figures) -> str:
    host, setting = f.result["host"], f.result["setting"]
    memory = f"{host['memory_bytes'] / 2**30:.0f} GiB" if host["memory_bytes"] else "unknown"
    used = f"{len(f.used)} quiet rounds" if f.only_quiet else f"{len(f.used)} rounds, **noisy ones among them**"
    sets, quick = ", ".join(host["instruction_sets"]), _QUICK if setting["quick"] else ""
    return f"""# Benchmarks

Generated from `benchmarks/results/` by `scripts/benchmark` on {f.result["date"]}; nothing here is written by hand.

- **Machine**: {host["cpu"]}, {host["machine"]}, {host["cores"]} cores ({sets}; last-level cache
  {host["last_level_cache"]}), {memory} memory, GPU: {host["gpu"] or "none"}; {host["system"]}, Python {host["python"]}.
- **Work**: SmolLM2-135M-Instruct (the Q4_1 GGUF, dequantized to float32 for every other engine), LoRAs of rank 16 on
  every linear (210 modules), prompts of {setting["prompt_tokens"]} and {setting["long_prompt_tokens"]} tokens,
  {setting["new_tokens"]} new tokens, greedy, {setting["threads"]} threads.
- **How**: every engine in an environment and processes of its own, all alive, one asked at a time, 32 decoded tokens in
  turn, each once the last one's threads rest, the order drawn anew every round; all were
  started anew every few rounds. {used} are used.
  Figures are medians (quartiles); ratios are medians of paired rounds with a 95 % bootstrap interval. Engines run with
  their own defaults but for the number of threads.{quick}"""


def _bar_row(bar: Any) -> dict[str, str]:
    return {"what": bar.what, "bar": bar.bar, "stretch": bar.stretch, "measured": bar.shown, "": bar.verdict}


def _speed_rows(f: Figures) -> list[dict[str, str]]:
    rows = []
    for name, side in f.sides.items():
        if not side.get("rounds"):
            continue
        plain = f.find(side["engine"], side["configuration"].removesuffix("-qv8"))
        quality = f.quality(name)
        tax = f.tax(name, plain) if plain != name else None
        rows.append(
            {
                "engine": f"{side['label']} {side['configuration']}",
                "adapter": side["note"] or side["adapter"] or "none",
                "decode tok/s": _spread(f, name, "decode"),
                "adapter's cost": percent(tax),
                "prefill tok/s, 512": _spread(f, name, "prefill"),
                "TTFT ms, 128": _spread(f, name, "ttft_128", 1e3),
                "mean KL": _value(quality.get("mean_kl"), "{:.4f}"),
                "top-1": _value(quality.get("top1"), "{:.1%}"),
                "positions": _value(quality.get("positions") or None, "{}"),
                "greedy": _value(quality.get("greedy_same"), "{} of " + str(quality.get("greedy_steps"))),
            }
        )
    return rows


def _swap_rows(f: Figures) -> list[dict[str, str]]:
    rows = []
    for name, side in f.sides.items():
        if not side.get("swaps"):
            continue
        stay = f.swap(name, "no_swap_first_token_s")
        row = {"engine": f"{side['label']} {side['configuration']}"}
        for kind in ("resident", "from_disk"):
            first = f.swap(name, f"{kind}_first_token_s")
            more = None if first is None or stay is None else first - stay
            title = kind.replace("_", " ")
            row[f"{title}: ready ms"] = _value(f.swap(name, f"{kind}_ready_s"), "{:.3f}", 1e3)
            row[f"{title}: first token ms later"] = _value(more, "{:+.1f}", 1e3)
        row["16 tokens and first token, no swap, ms"] = _value(stay, "{:.1f}", 1e3)
        rows.append(row)
    return rows


def _promotion_rows(f: Figures) -> list[dict[str, str]]:
    rows = []
    for scheme in ("int8", "int4"):
        found = f.result.get("extras", {}).get(f"promotion_{scheme}")
        if not found:
            continue
        times, forms = found["token_times_s"], found["forms"]
        first = forms.index("promoted")
        spans = {
            "before": [time for time in times if time < 0],
            "during": [time for time, form in zip(times, forms, strict=True) if time >= 0 and form != "promoted"],
            "after": times[first:],
        }
        speeds = {
            f"tok/s {name}": "–" if len(span) < 2 else f"{(len(span) - 1) / (span[-1] - span[0]):.1f}"
            for name, span in spans.items()
        }
        rows.append(
            {
                "scheme": scheme,
                "call to ready s": f"{found['seconds']:.2f}",
                "call to first promoted token s": f"{times[first]:.2f}",
                "longest wait for a token ms": f"{max(b - a for a, b in pairwise(times)) * 1e3:.0f}",
                **speeds,
                "tokens as in slots": f"{found['same_as_slots']} of {found['tokens']}",
            }
        )
    return rows


def _start_rows(f: Figures) -> list[dict[str, str]]:
    rows = []
    for name, side in f.sides.items():
        if not side.get("starts") or side["note"]:
            continue
        made = f.made(side["engine"], side["configuration"]).get("bytes", {})
        row = {
            "engine": f"{side['label']} {side['configuration']}",
            "adapter": side["adapter"] or "none",
            "import s": _value(f.starts(name, "import_s"), "{:.2f}"),
            "load s": _value(f.starts(name, "load_s"), "{:.2f}"),
            "first prompt ms": _value(f.starts(name, "first_call_s"), "{:.0f}", 1e3),
        }
        for title, when, what in (
            ("RSS loaded", "loaded", "resident_bytes"),
            ("anonymous loaded", "loaded", "anonymous_bytes"),
            ("RSS used", "used", "resident_bytes"),
            ("anonymous used", "used", "anonymous_bytes"),
            ("RSS with another adapter", "used another adapter", "resident_bytes"),
            ("peak", "used", "peak_resident_bytes"),
        ):
            row[f"{title} MB"] = _value(f.starts(name, "memory", when, what), "{:.0f}", 1 / MB)
        row["base file MB"] = _value(made.get("base"), "{:.1f}", 1 / MB)
        row["adapter file MB"] = _value(made.get("adapter") or None, "{:.1f}", 1 / MB) if side["adapter"] else ""
        rows.append(row)
    return rows


def _several_rows(f: Figures) -> list[dict[str, str]]:
    rows = []
    for side in f.sides.values():
        for how, found in side.get("proportional_bytes_of_processes", {}).items():
            name = f"{side['label']} {side['configuration']}, adapter {side['adapter']}"
            row = {"engine": f"{name}, {how}" if how else name}
            rows.append(row | {f"{n} MB": _value(found.get(n), "{:.0f}", 1 / MB) for n in ("1", "2", "4")})
    return rows


def _made_rows(f: Figures) -> list[dict[str, str]]:
    return [
        {
            "files": name,
            "CPU s": _value(made["cpu_s"], "{:.0f}"),
            "s": _value(made["wall_s"], "{:.0f}"),
            "peak MB": _value(made["peak_bytes"], "{:.0f}", 1 / MB),
            "base MB": _value(made["bytes"].get("base"), "{:.1f}", 1 / MB),
            "adapter MB": _value(made["bytes"].get("adapter") or None, "{:.1f}", 1 / MB),
        }
        for name, made in f.result["made"].items()
    ]


def _failures(f: Figures) -> str:
    if not f.result["failures"]:
        return "Nothing: every engine was installed, made its files and ran to the end."
    lines = [f"- **{row['side']}**, {row['step']}: `{_one_line(row['message'])}`" for row in f.result["failures"]]
    return "\n".join(lines)


def _more() -> str:
    """Links to the pages on single questions."""
    pages = []
    for path in sorted((DOCS / "benchmarks").glob("*.md")):
        title = path.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")
        pages.append(f"- [{title}](benchmarks/{path.name})")
    pages.append("- How a run works, how to add an engine, and the traps: `benchmarks/README.md`")
    return "\n".join(["## More\n", *pages])


def _one_line(message: str) -> str:
    return " ".join(message.replace("`", "'").split())[-400:]


def _noise(f: Figures) -> str:
    control = f.ratio(f.find("edgeadapt", "int8", "A/A"), f.find("edgeadapt", "int8"), "decode")
    rows = [
        {
            "round": row["round"],
            "start": row.get("launch", 1),
            "s": f"{row['seconds']:.0f}",
            "other processes": f"{row['foreign_share']:.1%}",
            "stolen": f"{row['steal_share']:.2%}",
            "waiting for a core": _value(row["pressure_share"], "{:.1%}"),
            "involuntary switches": row["involuntary_switches"],
            "load average": f"{row['load_average']:.2f}",
            "": "noisy, repeated" if row["noisy"] else "",
        }
        for row in f.result.get("rounds", [])
    ]
    text, verdict = "not measured", "Without a control nothing is known about this run's bias."
    if control is not None:
        verdict = "A difference between two engines that is smaller than this interval says nothing."
        if control["low"] is not None and not control["low"] <= 1 <= control["high"]:
            verdict = (
                "**The control fails: the interval does not hold 1, so this run is biased by at least that much.**"
            )
        ends = "" if control["low"] is None else f" ({control['low']:.3f} to {control['high']:.3f})"
        text = f"{control['median']:.3f}{ends}"
    return f"""A/A control: a second process of the same bundle decodes {text} times as fast as the first.
{verdict}

{table(rows)}"""


def _spread(f: Figures, side: str, metric: str, scale: float = 1) -> str:
    found = f.summary(side, metric)
    if found is None:
        return "–"
    digits = 0 if found["median"] * scale >= 200 else 1
    median, first, third = (f"{found[key] * scale:.{digits}f}" for key in ("median", "quartile1", "quartile3"))
    return f"{median} ({first}–{third})"


def _value(value: Any, form: str, scale: float = 1) -> str:
    return "–" if value is None else form.format(value if scale == 1 else value * scale)


_QUICK = "\n- **This was a quick run**: few repetitions, for a look, not for the record."
_BARS = """What the project set out to reach, and what this run shows. An adapter's cost is 1 − tok/s with it / tok/s
without it."""
_SPEED = """KL (nats) and top-1 are against PEFT in torch, float32, teacher-forced on held-out text (prose; with an
adapter its task's chats too); *greedy* is how many of 128 free-running tokens are PEFT's before the first other one.
OpenVINO GenAI gives no logits: KL without an adapter is OpenVINO's own from the same file, top-1 with an adapter is of
tokens asked one by one. llama.cpp's Q4_1 is the very file that the reference was dequantized from, which flatters its
KL. ONNX Runtime GenAI's adapter is its graph edited by hand (`benchmarks/genai_slots.py`): it has no route of its own
to a float LoRA that can be swapped. edgeadapt's int4 with two adapters is calibrated on Python's help topics and on
training examples of the adapters' tasks (`benchmarks/calibration_texts.py`); none of the measured texts are among them.
The other engines' int4 is what their own tools make."""
_SWAPS = """*ready*: from the call to when the next prompt may be read, where the engine switches in a call of its own.
*first token later*: how much longer a prompt of 16 tokens takes to its first token with a swap before it than without.
*from disk*: the adapter was dropped before. optimum swaps whole models: resident is both in memory, from disk
a load."""
_PROMOTION = """A prompt of 128 tokens and 32 tokens in slots, then `session.promote` with an empty cache, while
decoding goes on. The promoted form is rounded with the adapter in it, so its tokens may differ from those in slots."""
_MEMORY = """Medians of fresh processes, files in the page cache; memory from `/proc/PID/smaps_rollup`, read by the
parent. RSS counts pages of mapped files too, which processes share; *anonymous* are a process's own. *loaded*: before
the first token; *used*: after two prompts of 128 tokens and 16 decoded."""
_SEVERAL = """The sum of the proportional memory (PSS) of 1, 2 and 4 processes that hold the same model with an adapter
and have used it."""
_MADE = """From the base to files that the engine opens, with two adapters of rank 16: the whole process tree's CPU
seconds and the largest process's peak memory. edgeadapt's export includes its comparison with torch, its quality
table and patches for both adapters (the bar above is an export without patches). The adapters' training, the float32
checkpoint that the peers start from, and building llama.cpp are not counted."""
if __name__ == "__main__":
    write()
