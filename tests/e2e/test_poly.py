"""Poly as peft saves it: one file, an adapter for each of its tasks; against peft's own forward with task_ids."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeadapt.adapters import describe, read_adapters
from edgeadapt.errors import AdapterError
from edgeadapt.merging.load import load_base_model
from edgeadapt.merging.merge import check_merge, merge
from edgeadapt.pipeline import export_bundle
from edgeadapt.pipeline.inputs import resolve_on
from edgeadapt.recipe import Recipe
from edgeadapt.runtime import open_session
from tests.e2e.conftest import Tiny
from tests.e2e.peft_kinds import QVD, Case, save
from tests.e2e.reference import CLOSE, Arrays, base_model, case, error, forward
from tests.e2e.tiny import save_adapter
from tests.parity import Parity

GetTiny = Callable[[str], Tiny]
RANK, TASKS = 3, 3
POLY = Case("poly", lambda: peft.PolyConfig(r=RANK, n_tasks=TASKS, n_skills=4, target_modules=QVD), noise=0.4)
MHR = Case("poly", lambda: peft.PolyConfig(r=RANK, n_tasks=2, n_skills=3, n_splits=4, target_modules=QVD), noise=0.4)
ON_BERT = Case(
    "poly",
    lambda: peft.PolyConfig(r=RANK, n_tasks=1, target_modules=["query", "value"], modules_to_save=["classifier"]),
    "bert",
    noise=0.4,
)


def with_task(name: str, base: Path, adapter: Path, inputs: Arrays, task: int) -> np.ndarray:
    """Return the logits of the base with an adapter that peft itself has loaded, every row of one task."""
    rows = len(inputs["input_ids"])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(base_model(name, base), adapter).eval()
        tensors = {key: torch.from_numpy(value) for key, value in inputs.items()}
        return np.asarray(model.base_model(**tensors, task_ids=torch.full((rows,), task)).logits)


def test_every_task_is_an_adapter(tiny: GetTiny, tmp_path: Path, parity: Parity) -> None:
    """Beside a LoRA adapter, swapped, in a blend and for rows of one batch."""
    llama, inputs = tiny("llama"), case("llama")
    folders = {name: save(item, llama.base, tmp_path / name, 1) for name, item in (("poly", POLY), ("mhr", MHR))}
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    lora = save_adapter(base_model("llama", llama.base), config, tmp_path / "lora")
    recipe = Recipe(
        (*folders.values(), lora), str(llama.base), tmp_path / "out.bundle", task=llama.task, quantize="none"
    )
    bundle = export_bundle(recipe)
    tasks = {
        f"{name}-task{task}": (name, task) for name, count in (("poly", TASKS), ("mhr", 2)) for task in range(count)
    }
    assert set(bundle.adapter_names) == {*tasks, "lora"}
    plain = forward(base_model("llama", llama.base), inputs)
    found: dict[str | None, set[bytes]] = {}
    with open_session(bundle, threads=1) as session:
        for name in (None, *tasks, "lora", *reversed(tasks), None, "lora"):
            session.use(name)
            logits = session.run(inputs)["logits"]
            found.setdefault(name, set()).add(logits.tobytes())
            if name in tasks:
                folder, task = folders[tasks[name][0]], tasks[name][1]
                expected = with_task("llama", llama.base, folder, inputs, task)
                assert error(plain, expected, inputs) > 1e-2
                worst = error(expected, logits, inputs)
                parity.add(folder, "llama", adapter=folder.name, errors={"swapped": worst})
                assert worst < CLOSE
        assert all(len(runs) == 1 for runs in found.values())
        assert len(set.union(*found.values())) == len(found)
        mixed = session.run(inputs, adapters=["poly-task2", "mhr-task0"])["logits"]
        rows = [
            with_task("llama", llama.base, folders[name], {k: v[i : i + 1] for k, v in inputs.items()}, task)
            for i, (name, task) in enumerate((("poly", 2), ("mhr", 0)))
        ]
        assert error(np.concatenate(rows), mixed, inputs) < CLOSE
        session.lend("twin", bundle.adapter_tensors("poly-task1"))
        session.use({"poly-task1": 0.25, "twin": 0.75})
        expected = with_task("llama", llama.base, folders["poly"], inputs, 1)
        worst = error(expected, session.run(inputs)["logits"], inputs)
        parity.add(folders["poly"], "llama", adapter="poly", errors={"blended": worst})
        assert worst < CLOSE


def test_a_task_has_the_skills_rank(tiny: GetTiny, tmp_path: Path) -> None:
    llama = tiny("llama")
    base = load_base_model(llama.base, task=llama.task)
    for item in (POLY, MHR):
        for adapter in read_adapters(save(item, llama.base, tmp_path / "poly", 2)):
            assert describe(adapter)["task_id"] == adapter.task_id
            assert {update.rank for update in resolve_on(base, adapter).sites.values()} == {RANK}


def test_merged_and_with_a_head(tiny: GetTiny, tmp_path: Path, parity: Parity) -> None:
    """A single task keeps the folder's name."""
    for item, count in ((POLY, TASKS), (ON_BERT, 1)):
        model = tiny(item.model)
        base = load_base_model(model.base, task=model.task)
        folder = save(item, model.base, tmp_path / item.model, 3)
        adapters = read_adapters(folder)
        assert len(adapters) == count
        inputs = {key: torch.from_numpy(value) for key, value in case(item.model).items()}
        merged = merge(base, resolve_on(base, adapters[-1]))
        worst = check_merge(base, adapters[-1], merged, [inputs], 1e-4)
        parity.add(folder, item.model, adapter="poly", errors={"merged": worst})
        with torch.no_grad():
            logits = merged.module(**inputs).logits.numpy()
        expected = with_task(item.model, model.base, folder, case(item.model), count - 1)
        assert error(expected, logits, case(item.model)) < CLOSE
    assert adapters[0].name == "bert"


def _change(folder: Path, **entries: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def test_files_that_are_refused(tiny: GetTiny, tmp_path: Path) -> None:
    llama = tiny("llama")
    folder = save(POLY, llama.base, tmp_path / "a", 4)
    file = folder / "adapter_model.safetensors"
    router = "base_model.model.model.layers.0.mlp.down_proj.poly_router.module_logits"
    for tasks in (2, 10**9, "3"):
        _change(folder, n_tasks=tasks)
        with pytest.raises(AdapterError) as caught:
            read_adapters(folder)
        assert caught.value.message == f"tensor {router!r} in {file} is for 3 tasks, and n_tasks is {tasks!r}"
    _change(folder, n_tasks=3)
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if "router" not in key}, file)
    with pytest.raises(AdapterError) as caught:
        read_adapters(folder)
    assert caught.value.message == (
        f"{file} holds no poly_router.module_logits: nothing says how a task mixes the adapter's skills"
    )
    tensors[router][1, 2] = torch.nan
    save_file(tensors, file)
    with pytest.raises(AdapterError) as caught:
        resolve_on(load_base_model(llama.base, task=llama.task), read_adapters(folder)[0])
    assert caught.value.message == (
        f"adapter 'a-task0': tensor {router!r} in {file} holds values that are not finite: 1 of 12, the first at [1, 2]"
    )
