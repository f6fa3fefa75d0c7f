"""Compare edgeadapt with onnxruntime-genai: same base, same LoRA, same threads, one interleaved run.

    python benchmarks/peer_genai.py --base SmolLM2-135M-Instruct.Q4_1.gguf --adapter ADAPTER_FOLDER \
        --env build/genai-env --work build/peer -o benchmarks/results/peer_genai.json

Builds what is missing: bundles (unless --bundle names them), an environment for onnxruntime-genai (its builder needs
transformers 5, which edgeadapt's exporter cannot live with), its models, and slots for the LoRA in its graphs. Each
side is a child process; the parent asks them in turn, 16 decoded tokens at a time, and rotates the order every round,
so that whatever else the machine does hits all of them. Speed is worth nothing without quality, so each side's logits
are compared with torch's in float32 too. A step that fails is recorded in the result, and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from statistics_of import ratio_summary, summary

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
GENAI = ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "transformers==5.23.0", "onnx==1.23.2", "onnx-ir==1.1.0")
TORCH = "torch==2.13.0"
PREFILL_TOKENS, PROMPT_TOKENS = 512, 128
CHUNKS, CHUNK_STEPS = 8, 16  # decoded tokens a round and side: 8 x 16, in turns
METRICS = ("decode_tokens_per_s", "prefill_tokens_per_s")


@dataclass
class Side:
    """One child process and its samples: by state ("base", "adapter") and metric."""

    name: str
    command: list[str]
    path: Path
    adapter: str | None
    process: subprocess.Popen[str] | None = None
    info: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    quality: dict[str, dict[str, Any]] = field(default_factory=dict)

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request, one answer; RuntimeError if the child reports or dies."""
        if self.process is None or self.process.stdin is None or self.process.stdout is None:
            raise RuntimeError(f"{self.name} was not started")
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"child ended with {self.process.poll()}"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


def main() -> None:
    """Build what is missing, measure, write the result."""
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    failures: list[dict[str, str]] = []
    sides = [*_edgeadapt_sides(args, failures), *_genai_sides(args, failures)]
    sides = [side for side in sides if _start(side, args.threads, failures)]
    if not sides:
        sys.exit(f"nothing to measure: {json.dumps(failures, indent=2)}")
    load_before = os.getloadavg()
    cells = [Cell(side, state) for side in sides for state in ("base", "adapter") if state == "base" or side.adapter]
    try:
        prompt = _prompt(sides, args)
        _measure_quality(cells, prompt[:PROMPT_TOKENS], args, failures)
        _measure_speed(cells, prompt, args.rounds, failures)
    finally:
        for side in sides:
            if side.process and side.process.stdin:
                side.process.stdin.close()
                side.process.wait(timeout=30)
    result = _result(sides, args, failures, load_before)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _print(result)


def _edgeadapt_sides(args: argparse.Namespace, failures: list[dict[str, str]]) -> list[Side]:
    given = dict(pair.split("=", 1) for pair in args.bundle)
    sides = []
    for scheme in args.scheme:
        bundle = Path(given[scheme]) if scheme in given else args.work / f"{scheme}.bundle"
        if not bundle.exists():
            export = [sys.executable, "-m", "edgeadapt", "export", str(args.adapter), "--base", args.base]
            if not _build(f"export {scheme}", [*export, "-o", str(bundle), "--quantize", scheme], failures):
                continue
        child = [sys.executable, str(HERE / "child_edgeadapt.py")]
        sides.append(Side(f"edgeadapt {scheme}", child, bundle, args.adapter.name))
    return sides


def _genai_sides(args: argparse.Namespace, failures: list[dict[str, str]]) -> list[Side]:
    python = _genai_python(args.env, failures)
    checkpoint = args.work / "checkpoint"
    if python is None:
        return []
    if not (checkpoint / "config.json").exists():
        script = [sys.executable, str(HERE / "save_checkpoint.py"), args.base, str(checkpoint)]
        if not _build("float32 checkpoint for genai's builder", script, failures):
            return []
    sides = []
    for scheme in args.scheme:
        folder = args.work / f"genai-{scheme}"
        builder = [str(python), "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-e", "cpu"]
        plain = [*builder, "-p", scheme, "-o", str(folder / "plain"), "-c", str(args.work / "cache")]
        if not (folder / "plain" / "genai_config.json").exists() and not _build(
            f"genai builder {scheme}", plain, failures
        ):
            continue
        adapter: str | None = args.adapter.name
        slots = [str(python), str(HERE / "genai_slots.py"), str(folder / "plain"), str(folder / "slots")]
        if not (folder / "slots" / f"{adapter}.onnx_adapter").exists() and not _build(
            f"genai slots {scheme}", [*slots, str(args.adapter)], failures
        ):
            adapter = None
        sides.append(Side(f"genai {scheme}", [str(python), str(HERE / "child_genai.py")], folder, adapter))
    return sides


def _genai_python(env: Path, failures: list[dict[str, str]]) -> Path | None:
    python = env / "bin" / "python"
    check = [str(python), "-c", "import onnxruntime_genai, transformers, torch"]
    if python.exists() and subprocess.run(check, capture_output=True, check=False).returncode == 0:
        return python
    venv.create(env, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    # torch first and alone: the resolver must not pull another build of it in.
    installed = _build(f"pip install {TORCH}", [*pip, TORCH], failures) and _build(
        "pip install onnxruntime-genai", [*pip, TORCH, *GENAI, "safetensors"], failures
    )
    return python if installed else None


def _build(what: str, command: list[str], failures: list[dict[str, str]]) -> bool:
    print(f"{what} ...", file=sys.stderr)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        failures.append({"step": what, "exit": str(done.returncode), "message": done.stderr.strip()[-2000:]})
        print(f"failed: {what}\n{done.stderr[-2000:]}", file=sys.stderr)
    return done.returncode == 0


def _start(side: Side, threads: int, failures: list[dict[str, str]]) -> bool:
    side.process = subprocess.Popen(side.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        side.info = side.ask(do="load", path=str(side.path), threads=threads, adapter=side.adapter)
    except RuntimeError as error:
        failures.append({"step": f"load {side.name}", "message": str(error)})
        side.process.kill()
        return False
    return True


def _prompt(sides: list[Side], args: argparse.Namespace) -> list[int]:
    """PREFILL_TOKENS token ids of real text: the descriptions of recipes/data."""
    from tokenizers import Tokenizer

    rows = (REPOSITORY / "recipes" / "data" / "debian-section.test.jsonl").read_text(encoding="utf-8").splitlines()
    text = "\n".join(json.loads(row)["text"] for row in rows)
    paths = [args.work / "checkpoint" / "tokenizer.json", *(p for s in sides for p in s.path.rglob("tokenizer.json"))]
    tokenizer = Tokenizer.from_file(str(next(path for path in paths if path.exists())))
    return list(tokenizer.encode(text, add_special_tokens=False).ids[:PREFILL_TOKENS])


def _measure_quality(
    cells: list[Cell], prompt: list[int], args: argparse.Namespace, failures: list[dict[str, str]]
) -> None:
    folder, ids = args.work / f"reference-{args.adapter.name}", args.work / "prompt.json"
    ids.write_text(json.dumps(prompt), encoding="utf-8")
    script = [sys.executable, str(HERE / "reference_logits.py"), args.base, str(args.adapter), str(ids), str(folder)]
    if not _build("float32 reference", script, failures):
        return
    for cell in cells:
        cell.quality(prompt, folder / f"{cell.state}.npy", failures)


def _measure_speed(cells: list[Cell], prompt: list[int], rounds: int, failures: list[dict[str, str]]) -> None:
    for number in range(-1, rounds):  # round -1 warms up and is not kept
        turn = cells[number % len(cells) :] + cells[: number % len(cells)]
        for cell in turn:
            cell.prefill(prompt, 1, failures, keep=number >= 0)
        for cell in turn:
            cell.prefill(prompt[:PROMPT_TOKENS], CHUNKS * (CHUNK_STEPS + 1) + 1, failures, keep=False)
        for _ in range(CHUNKS):
            for cell in turn:
                cell.decode(failures, keep=number >= 0)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)


@dataclass
class Cell:
    """One side in one state, which takes its turn with the others; out of the game after its first failure."""

    side: Side
    state: str
    failed: bool = False

    def prefill(self, prompt: list[int], room: int, failures: list[dict[str, str]], *, keep: bool) -> None:
        """Read a prompt; afterwards the side can decode `room` - 1 tokens in this state."""
        answer = self._ask(failures, do="prefill", active=self.state == "adapter", prompt=prompt, room=room)
        if answer:
            self.side.tokens[self.state] = [answer["token"]]
            if keep:
                self._keep("prefill_tokens_per_s", len(prompt) / answer["prefill_s"])

    def decode(self, failures: list[dict[str, str]], *, keep: bool) -> None:
        """Decode one chunk."""
        answer = self._ask(failures, do="decode", active=self.state == "adapter", steps=CHUNK_STEPS)
        if answer:
            self.side.tokens[self.state] += answer["tokens"]
            if keep:
                self._keep("decode_tokens_per_s", CHUNK_STEPS / answer["decode_s"])

    def quality(self, prompt: list[int], reference: Path, failures: list[dict[str, str]]) -> None:
        """Compare logits with the reference's."""
        request = {"active": self.state == "adapter", "prompt": prompt, "reference": str(reference)}
        answer = self._ask(failures, do="quality", **request)
        if answer:
            self.side.quality[self.state] = answer

    def _keep(self, metric: str, value: float) -> None:
        self.side.samples.setdefault(self.state, {}).setdefault(metric, []).append(value)

    def _ask(self, failures: list[dict[str, str]], **request: Any) -> dict[str, Any] | None:
        if self.failed:
            return None
        try:
            return self.side.ask(**request)
        except RuntimeError as error:
            self.failed = True
            self.side.samples.pop(self.state, None)
            failures.append({"step": f"{request['do']} {self.side.name}, {self.state}", "message": str(error)})
            return None


def _result(
    sides: list[Side], args: argparse.Namespace, failures: list[dict[str, str]], load_before: tuple[float, ...]
) -> dict[str, Any]:
    by_name = {side.name: side for side in sides}
    ratios: dict[str, Any] = {}
    for side in sides:
        if {"base", "adapter"} <= side.samples.keys():
            for metric in METRICS:
                # tax = time with the adapter / time without - 1
                ratio = ratio_summary(side.samples["base"][metric], side.samples["adapter"][metric])
                ratios[f"{side.name}: time with adapter / base, {metric.split('_')[0]}"] = ratio
    for scheme in args.scheme:
        ours, theirs = by_name.get(f"edgeadapt {scheme}"), by_name.get(f"genai {scheme}")
        for state in ("base", "adapter"):
            if ours and theirs and state in ours.samples and state in theirs.samples:
                for metric in METRICS:
                    ratio = ratio_summary(ours.samples[state][metric], theirs.samples[state][metric])
                    ratios[f"edgeadapt {scheme} / genai {scheme}, {state}, {metric}"] = ratio
    return {
        "schema": "edgeadapt.benchmark/1",
        "benchmark": "peer_genai",
        "host": {**_host(), "load_average_before": load_before[0], "load_average_after": os.getloadavg()[0]},
        "setting": {
            "threads": args.threads,
            "rounds": args.rounds,
            "adapter": args.adapter.name,
            "prefill_tokens": PREFILL_TOKENS,
            "prompt_tokens": PROMPT_TOKENS,
            "decode_chunks_per_round": CHUNKS,
            "decode_steps_per_chunk": CHUNK_STEPS,
        },
        "sides": {
            side.name: {
                "info": side.info,
                "states": {
                    state: {metric: summary(values) for metric, values in metrics.items()}
                    | {"samples": metrics, "greedy_tokens": side.tokens[state], "quality": side.quality.get(state)}
                    for state, metrics in side.samples.items()
                },
            }
            for side in sides
        },
        "ratios": ratios,
        "failures": failures,
    }


def _host() -> dict[str, Any]:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return {"machine": platform.machine(), "cpu": names[0] if names else None, "cores": os.cpu_count()}


def _cell(figures: dict[str, Any], metric: str) -> str:
    return "{median:6.1f} ({quartile1:.1f}-{quartile3:.1f})".format(**figures[metric])


def _print(result: dict[str, Any]) -> None:
    for name, side in result["sides"].items():
        for state, figures in side["states"].items():
            cells = [_cell(figures, metric) for metric in METRICS]
            quality = figures["quality"] or {"mean_kl": float("nan"), "top1": float("nan")}
            print(
                f"{name:16} {state:8} decode {cells[0]} tok/s  prefill {cells[1]} tok/s  "
                f"KL {quality['mean_kl']:.4f}  top-1 {quality['top1']:.1%}"
            )
    for name, ratio in result["ratios"].items():
        print(f"{name}: {ratio['median']:.3f} ({ratio['quartile1']:.3f}-{ratio['quartile3']:.3f})")
    for failure in result["failures"]:
        print(f"FAILED {failure['step']}: {failure['message'][-300:]}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="the base, as for `edgeadapt export`")
    parser.add_argument("--adapter", type=Path, required=True, help="a PEFT LoRA folder")
    parser.add_argument("--env", type=Path, required=True, help="environment of onnxruntime-genai; made if missing")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is built; reused if present")
    parser.add_argument("--bundle", action="append", default=[], metavar="SCHEME=PATH", help="a bundle made before")
    parser.add_argument("--scheme", action="append", choices=["int4", "int8"], help="default: both")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results" / "peer_genai.json")
    args = parser.parse_args()
    args.scheme = args.scheme or ["int4", "int8"]
    return args


if __name__ == "__main__":
    main()
