"""What `run` asks of a session, and where the answers go."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest


@dataclass(frozen=True)
class _Written:
    text: str
    token_ids: tuple[int, ...]
    adapter: str | dict[str, float] | None
    finish_reason: str = "length"


class _Session:
    """Remembers what it is asked."""

    has_encoder = False

    def __init__(self, calls: list[tuple], task: str) -> None:
        self.calls, self.adapter = calls, None
        self.spec = object() if task == "text-generation" else None
        self.bundle = SimpleNamespace(manifest=SimpleNamespace(task=task))

    def __enter__(self):
        return self

    def __exit__(self, *error: object) -> None:
        self.calls.append(("close",))

    def use(self, adapter) -> None:
        self.adapter = adapter

    def prepare(self) -> None:
        pass

    def generate(self, prompt, **options):
        self.calls.append(("generate", prompt, options))
        yield from ("Hel", "lo [b]", "")

    def complete(self, prompt, **options):
        self.calls.append(("complete", prompt, options))
        return _Written("Hello [b]", (5, 7), self.adapter)

    def run(self, arrays):
        self.calls.append(("run", sorted(arrays)))
        return {"logits": np.asarray(arrays["input_ids"], np.float32) * 2}


@pytest.fixture
def calls(replace) -> list[tuple]:
    found: list[tuple] = []

    def open_session(path, *, threads, provider):
        found.append(("open", path, threads, provider))
        return _Session(found, "text-generation" if path.suffix == ".writer" else "text-classification")

    def answer(session, *, texts, images, labels):
        found.append(("answer", texts, images, labels))
        return [{"label": "SPAM", "score": 0.75, "scores": {"SPAM": 0.75, "HAM": 0.25}} for _ in [*texts, *images]]

    replace("edgeadapt.runtime", open_session=open_session, answer=answer)
    return found


def test_text_streams_to_stdout(invoke, calls):
    result = invoke("run", "my bundle.writer", "--prompt", "Hi", "--adapter", "a", "--threads", 2)
    assert result.stdout == "Hello [b]\n"
    assert result.stderr.endswith("open bundle\n")
    assert calls == [("open", Path("my bundle.writer"), 2, "cpu"), ("generate", "Hi", {}), ("close",)]


def test_json_holds_the_new_text_and_its_tokens(invoke, calls):
    result = invoke(
        "run", "b.writer", "--prompt", "Hi", "--blend", "a=0.7,b=0.3", "--max-new-tokens", 9, "--temperature", 0.5,
        "--top-k", 4, "--top-p", 0.9, "--seed", 3, "--stop", "x", "--stop", "y", "--raw", "--lookup", 8,
        "--json", "--quiet",
    )  # fmt: skip
    assert json.loads(result.stdout) == {
        "text": "Hello [b]",
        "token_ids": [5, 7],
        "adapter": {"a": 0.7, "b": 0.3},
        "finish_reason": "length",
    }
    assert result.stderr == ""
    options = {
        "max_new_tokens": 9,
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.9,
        "seed": 3,
        "stop": ["x", "y"],
        "chat": False,
        "lookup": 8,
    }
    assert calls[1] == ("complete", "Hi", options)


def test_labels(invoke, calls):
    result = invoke("run", "b", "--text", "one", "--text", "two", "--quiet")
    assert result.stdout == "SPAM  0.7500\nSPAM  0.7500\n"
    assert calls[1] == ("answer", ["one", "two"], [], [])
    result = invoke("run", "b", "--image", "c at.png", "--label", "cat", "--json")
    assert calls[4] == ("answer", [], [Path("c at.png")], ["cat"])
    assert json.loads(result.stdout) == {
        "adapter": None,
        "answers": [{"image": "c at.png", "label": "SPAM", "score": 0.75, "scores": {"SPAM": 0.75, "HAM": 0.25}}],
    }


def test_arrays_in_and_out(invoke, calls, tmp_path):
    source, target = tmp_path / "in put.npz", tmp_path / "out.npz"
    np.savez(source, input_ids=np.arange(6).reshape(2, 3))
    result = invoke("run", "b", "--inputs", source, "--output", target, "--json", "--quiet")
    assert json.loads(result.stdout) == {
        "adapter": None,
        "output": str(target),
        "outputs": {"logits": {"dtype": "float32", "shape": [2, 3]}},
    }
    with np.load(target) as written:
        assert written.files == ["logits"]
        assert written["logits"].tolist() == [[0, 2, 4], [6, 8, 10]]
    first = target.read_bytes()
    plain = invoke("run", "b", "--inputs", source, "--output", target, "--quiet")
    assert plain.stdout == "logits  float32[2, 3]\n"
    assert target.read_bytes() == first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "error: cannot read {}: No such file or directory\nhint: check the path\n"),
        (b"not a zip", "error: {} is no .npz file of plain arrays: "),
        (b"PK\x03\x04broken", "error: {} is no .npz file of plain arrays: "),
        (b"", "error: {} is no .npz file of plain arrays: "),
    ],
)
def test_a_damaged_input_file_is_named(invoke, calls, tmp_path, content, message):
    source = tmp_path / "in.npz"
    if content is not None:
        source.write_bytes(content)
    result = invoke("run", "b", "--inputs", source, "--output", tmp_path / "out.npz", "--quiet")
    assert result.exit_code == 1
    assert result.stderr.startswith(message.format(source))
    assert not (tmp_path / "out.npz").exists()


def test_python_objects_are_not_loaded(invoke, calls, tmp_path):
    source = tmp_path / "in.npz"
    np.savez(source, input_ids=np.array([{}], dtype=object))
    result = invoke("run", "b", "--inputs", source, "--quiet")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {source} is no .npz file of plain arrays: Object arrays cannot be loaded")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["b", "--prompt", "p"],
            (
                "error: this bundle does not write text: its task is 'text-classification'\n"
                "hint: give --text, --image or --inputs\n"
            ),
        ),
        (
            ["b.writer", "--text", "t"],
            "error: this bundle writes text: its task is 'text-generation'\nhint: give --prompt or --inputs\n",
        ),
    ],
)
def test_an_input_that_the_model_cannot_answer_is_refused(invoke, calls, args, message):
    result = invoke("run", *args, "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", message)
    assert calls[-1] == ("close",)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--text", "t", "--seed", "1"], "--seed: only goes with --prompt"),
        (["--prompt", "p", "--output", "o.npz"], "--output: does not go with --prompt"),
        (["--text", "t", "--label", "x"], "--label: only goes with --image, without --output"),
        (["--prompt", "p", "--text", "t"], "too many; give one kind of input"),
        ([], "missing; give one kind of input"),
    ],
)
def test_flags_that_mean_nothing_are_refused(invoke, calls, args, message):
    result = invoke("run", "b", *args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert calls == []
