"""What an adapter costs as models grow: random weights with the shapes of real models.

    scripts/benchmark shapes                       SmolLM2-135M's, Qwen2.5-0.5B's and Llama-3.2-1B's shapes
    scripts/benchmark shapes --only Qwen2.5-0.5B

Random weights have the speed of trained ones, and no quality: none is measured here. Each shape is written as a Hugging
Face folder, exported by the program with a random LoRA of rank 16 on every linear, and decoded with and without it in
interleaved rounds. Results go to benchmarks/results/shapes.json; shapes that were measured before are kept.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import measure
import numpy as np
from child import load_engine
from cost_model import fit
from figures import Figures
from host import describe_host
from measure import Cell, attempt
from preparation import measured_run
from random_adapter import ATTENTION, MLP, module_shapes, write_random_adapter
from side import Side
from workload import LONG_PROMPT_TOKENS, PROMPT_TOKENS, REPOSITORY, Workload

HERE = Path(__file__).resolve().parent
RANK, LAUNCHES = 16, 2
NEEDED_PER_PARAMETER = 12.5
"""Bytes of memory that an export takes (3 x float32 at 0.5 B, and some); a shape with less of it free is not tried."""


@dataclass(frozen=True)
class Shape:
    """Sizes as in a Hugging Face config; head_dim is heads' width, bias says whether q, k and v have one."""

    name: str
    model_type: str
    layers: int
    hidden: int
    inner: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    bias: bool

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        family = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[self.model_type]
        return {
            "architectures": [family],
            "model_type": self.model_type,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "torch_dtype": "float16",
            "bos_token_id": 1,
            "eos_token_id": 2,
        }

    @property
    def parameters(self) -> int:
        """How many numbers the model has, the tied head counted once."""
        shapes = module_shapes(self.config)
        linears = sum(rows * columns for rows, columns in shapes.values())
        biases = sum(shapes[name][0] for name in ("q_proj", "k_proj", "v_proj")) if self.bias else 0
        return self.vocabulary * self.hidden + self.layers * (linears + biases + 2 * self.hidden) + self.hidden

    @property
    def adapter_parameters(self) -> int:
        """How many numbers a LoRA of RANK on every linear has."""
        return self.layers * sum(RANK * (rows + columns) for rows, columns in module_shapes(self.config).values())


SHAPES = (
    Shape("SmolLM2-135M", "llama", 30, 576, 1536, 9, 3, 64, 49152, bias=False),
    Shape("Qwen2.5-0.5B", "qwen2", 24, 896, 4864, 14, 2, 64, 151936, bias=True),
    Shape("Llama-3.2-1B", "llama", 16, 2048, 8192, 32, 8, 64, 128256, bias=False),
    Shape("Llama-3.2-3B", "llama", 28, 3072, 8192, 24, 8, 128, 128256, bias=False),
)


def main() -> None:
    """Export and measure each shape and scheme, fit the cost model, write the result."""
    args = _arguments()
    rows = []
    if args.output.exists():
        rows = json.loads(args.output.read_text(encoding="utf-8"))["rows"]
    for shape in (shape for shape in SHAPES if shape.name in args.only):
        for scheme in args.scheme:
            print(f"{shape.name} {scheme}: {shape.parameters / 1e6:.0f} M parameters", file=sys.stderr)
            row = _row(shape, scheme, args)
            rows = [old for old in rows if (old["shape"], old["scheme"]) != (shape.name, scheme)] + [row]
            _write(rows, args)
    print(json.dumps(_write(rows, args)["cost_model"], indent=1))


def _write(rows: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    order = [shape.name for shape in SHAPES]
    rows.sort(key=lambda row: (order.index(row["shape"]), row["scheme"]))
    points = [point for row in rows for point in row["points"]]
    result = {
        "schema": "edgeadapt.benchmark/2",
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "host": describe_host(),
        "setting": {"threads": args.threads, "rank": RANK, **measure.prompt_lengths()},
        "rows": rows,
        "cost_model": fit(points) if len(points) > 3 else None,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _row(shape: Shape, scheme: str, args: argparse.Namespace) -> dict[str, Any]:
    row: dict[str, Any] = {
        "shape": shape.name,
        "scheme": scheme,
        "parameters": shape.parameters,
        "adapter_parameters": shape.adapter_parameters,
        "sizes": asdict(shape),
        "export": None,
        "tax": None,
        "points": [],
        "failures": [],
    }
    available = _available_bytes()
    if available < NEEDED_PER_PARAMETER * shape.parameters:
        needed = NEEDED_PER_PARAMETER * shape.parameters / 1e9
        message = f"{available / 1e9:.1f} GB of memory are free, about {needed:.0f} GB are needed"
        row["failures"].append({"side": shape.name, "step": "export", "message": message})
        return row
    base, adapter = write_model(shape, args.work)
    folder = args.work / f"{shape.name}-{scheme}"
    command = [sys.executable, "-m", "edgeadapt", "export", str(adapter), "--name", "random", "--base", str(base)]
    command += ["-o", str(folder / "model.bundle"), "--quantize", scheme, "--force", "--json", "--quiet"]
    if not (args.reuse and (folder / "export.json").exists()):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        status, cost, _, told = measured_run(command)
        if status:
            row["failures"].append({"side": shape.name, "step": "export", "message": told[-2000:]})
            return row
        (folder / "export.json").write_text(json.dumps(cost), encoding="utf-8")
    row["export"] = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    weights = folder / "model.bundle" / "graph"
    row["weights_bytes"] = sum(file.stat().st_size for file in weights.iterdir() if file.suffix != ".onnx")
    _speed(row, shape, folder, adapter, args)
    if not args.keep:
        shutil.rmtree(folder / "model.bundle")
    return row


def _speed(row: dict[str, Any], shape: Shape, folder: Path, adapter: Path, args: argparse.Namespace) -> None:
    """Fill in rounds, tax, prefill, and a point of the cost model with and without the adapter."""
    module = load_engine(HERE / "engines" / "edgeadapt.py")
    common = ("edgeadapt", module, f"{shape.name}-{row['scheme']}", Path(sys.executable), folder, args.threads)
    sides = [Side(*common), Side(*common, adapter="random", adapters={"random": str(adapter)})]
    failures: measure.Failures = row["failures"]
    ids = np.random.default_rng(0).integers(3, shape.vocabulary, LONG_PROMPT_TOKENS).tolist()
    workload = Workload(ids[:PROMPT_TOKENS], ids, {})
    cells = [Cell(side) for side in sides]
    noise: list[dict[str, Any]] = []
    deadline = time.monotonic() + 60 * args.minutes
    for launch in range(LAUNCHES):  # how fast a process is differs from start to start
        try:
            for cell in cells:
                started = attempt(
                    cell.side, "start", failures, partial(measure.start, cell.side, workload, args.work / "logs")
                )
                cell.failed = cell.failed or started is None
            settings = {"first": len(noise) + 1, "rounds": math.ceil(args.rounds / LAUNCHES), "deadline": deadline}
            noise += measure.speed_rounds(cells, workload, failures=failures, say=_say, **settings)
            if launch == 0:
                alive = [cell.side for cell in cells if not cell.failed]
                row["memory"] = {side.name: measure.memory_of(side.pid()) for side in alive}
        finally:
            for side in sides:
                side.close()
    described = {
        cell.side.name: {
            "engine": "edgeadapt",
            "configuration": cell.side.configuration,
            "adapter": cell.side.adapter,
            "note": "",
            "rounds": {str(number): samples for number, samples in cell.samples.items()},
        }
        for cell in cells
    }
    row["sides"], row["rounds"] = described, noise
    f = Figures({"sides": described, "rounds": noise, "setting": measure.prompt_lengths(), "made": {}})
    plain, adapted = f.find("edgeadapt", sides[0].configuration), f.find("edgeadapt", sides[0].configuration, "random")
    row["tax"] = f.tax(adapted, plain) if plain and adapted else None
    for form, name in (("plain", plain), ("slots", adapted)):
        decode, prefill = (f.summary(name, metric) if name else None for metric in ("decode", "prefill"))
        row[form] = {"decode": decode, "prefill": prefill}
        if decode is not None:
            row["points"].append(_point(row, shape, folder, form, 1 / float(decode["median"])))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _point(row: dict[str, Any], shape: Shape, folder: Path, form: str, seconds: float) -> dict[str, Any]:
    extra = shape.adapter_parameters if form == "slots" else 0
    return {
        "name": f"{shape.name} {row['scheme']} {form}",
        "seconds": seconds,
        "nodes": _node_count(folder / "model.bundle" / "graph", form),
        "bytes": row["weights_bytes"] + 4 * extra,
        "flops": 2 * (shape.parameters + extra),
    }


def _node_count(folder: Path, form: str) -> int:
    import onnx

    (file,) = folder.glob(f"*.{form}.onnx")
    return len(onnx.load(str(file), load_external_data=False).graph.node)


def write_model(shape: Shape, work: Path) -> tuple[Path, Path]:
    """The Hugging Face folder and the adapter, made if they are not there."""
    base, adapter = work / shape.name, work / f"{shape.name}-random"
    if not (base / "config.json").exists():
        from safetensors.numpy import save_file

        shutil.rmtree(base, ignore_errors=True)
        base.mkdir(parents=True)
        save_file(_tensors(shape), base / "model.safetensors", metadata={"format": "pt"})
        (base / "config.json").write_text(json.dumps(shape.config, indent=1), encoding="utf-8")
    if not (adapter / "adapter_config.json").exists():
        shutil.rmtree(adapter, ignore_errors=True)
        write_random_adapter(adapter, base, rank=RANK, modules=(*ATTENTION, *MLP), base_name=shape.name)
    return base, adapter


def _tensors(shape: Shape) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)

    def weight(rows: int, columns: int) -> np.ndarray[Any, Any]:
        drawn = rng.standard_normal((rows, columns), dtype=np.float32)
        return (drawn * np.float32(1 / math.sqrt(columns))).astype(np.float16)

    found = {"model.embed_tokens.weight": weight(shape.vocabulary, shape.hidden)}
    found["model.norm.weight"] = np.ones(shape.hidden, np.float16)
    for layer in range(shape.layers):
        start = f"model.layers.{layer}"
        for name, (rows, columns) in module_shapes(shape.config).items():
            path = f"{start}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}"
            found[f"{path}.weight"] = weight(rows, columns)
            if shape.bias and name in {"q_proj", "k_proj", "v_proj"}:
                found[f"{path}.bias"] = np.zeros(rows, np.float16)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{start}.{name}.weight"] = np.ones(shape.hidden, np.float16)
    return found


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--only", nargs="+", choices=names, default=names[:3], help="default: all but the largest")
    parser.add_argument("--scheme", nargs="+", default=["int8", "int4"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6, help="quiet rounds wanted, per shape and scheme")
    parser.add_argument("--minutes", type=float, default=3, help="no new round after so long, per shape and scheme")
    parser.add_argument("--reuse", action="store_true", help="take bundles as they are, even if code changed since")
    parser.add_argument("--keep", action="store_true", help="keep the bundles")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "shapes", help="models and bundles go here")
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results" / "shapes.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
