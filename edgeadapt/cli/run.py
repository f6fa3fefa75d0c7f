"""`edgeadapt run`: a bundle at work, on text to continue, text or images to judge, or arrays."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeadapt.cli import output as out
from edgeadapt.cli.arrays import read_arrays, write_arrays
from edgeadapt.cli.options import BundlePath, Json, Quiet, Threads, read_blend
from edgeadapt.cli.progress import reporter
from edgeadapt.errors import SessionError

if TYPE_CHECKING:
    from edgeadapt.runtime import Session


def run(
    *,
    bundle: BundlePath,
    adapter: Annotated[str | None, typer.Option("--adapter", metavar="NAME", help="Use this adapter.")] = None,
    blend: Annotated[
        str | None, typer.Option("--blend", metavar="A=0.7,B=0.3", help="Use a weighted sum of adapters.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Text that the model answers or continues.")] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", help="A text to judge; may be given several times.")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", metavar="FILE", help="A picture to judge; several times too.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option("--label", help="What --image is compared with, for models like CLIP.")
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option("--inputs", metavar="FILE.npz", help="Arrays by the graph's input names.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE.npz", help="Write the model's outputs by their names.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, show_default="128")] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 takes the likeliest token.", show_default="0")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="0 for all tokens.", show_default="0")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, show_default="1")] = None,
    seed: Annotated[int | None, typer.Option(min=0, show_default="0")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="Text that ends the answer; several times too.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="The prompt as a user's message, or as it is.", show_default="as trained"),
    ] = None,
    lookup: Annotated[
        int | None,
        typer.Option(min=0, show_default="0", help="Guess up to N tokens from earlier text and check them at once."),
    ] = None,
    threads: Threads = None,
    device: Annotated[str, typer.Option("--device", metavar="DEVICE", help="See `edgeadapt list devices`.")] = "cpu",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a bundle. Without --adapter and --blend it is the bare base."""
    if adapter is not None and blend is not None:
        raise typer.BadParameter("give one of them", param_hint="--adapter and --blend")
    wanted = adapter if blend is None else read_blend(blend)
    _check_one({"--prompt": prompt, "--text": text, "--image": image, "--inputs": inputs})
    options = _given(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop or None,
        chat=chat,
        lookup=lookup,
    )
    _check_fit(options, prompt=prompt, inputs=inputs, image=image, label=label, output=output)

    from edgeadapt.device import read_device, require_this_machine
    from edgeadapt.runtime import open_session

    target = read_device(device)
    require_this_machine(target)
    with reporter(quiet=quiet) as progress, progress.stage("open bundle"):
        session = open_session(bundle, threads=threads or target.threads, provider=target.provider)
        session.use(wanted)
        session.prepare()
    with session:
        _check_task(session, prompt=prompt, judges=bool(text or image) and output is None)
        if prompt is not None:
            _write_text(session, prompt, options, as_json=json)
        elif inputs is not None:
            _run_arrays(session, read_arrays(inputs), options, output, as_json=json)
        elif output is not None:
            from edgeadapt.runtime.tasks import image_inputs, text_inputs

            arrays = text_inputs(session, text)[0] if text else image_inputs(session, image or [])
            _run_arrays(session, arrays, {}, output, as_json=json)
        else:
            _answer(session, text or [], image or [], label or [], as_json=json)


def _write_text(session: Session, prompt: Any, options: dict[str, Any], *, as_json: bool) -> None:
    """Write the model's answer: as it comes for people, whole for programs."""
    if as_json:
        from edgeadapt.fields import to_mapping

        out.result_json(to_mapping(session.complete(prompt, **options)))
        return
    for piece in session.generate(prompt, **options):
        out.result(piece, newline=False)
    out.result("")


def _answer(session: Session, texts: list[str], images: list[Path], labels: list[str], *, as_json: bool) -> None:
    """Write one answer per text or picture: a line each for people."""
    from edgeadapt.runtime import answer

    answers = answer(session, texts=texts, images=images, labels=labels)
    if as_json:
        sources = [{"text": text} for text in texts] or [{"image": str(path)} for path in images]
        rows = [{**source, **found} for source, found in zip(sources, answers, strict=True)]
        out.result_json({"adapter": session.adapter, "answers": rows})
        return
    for found in answers:
        out.result(_line(found))


def _line(answer: dict[str, Any]) -> str:
    """Return an answer as one line of text."""
    if "label" in answer:
        return f"{answer['label']}  {answer['score']:.4f}"
    if "tokens" in answer:
        return "  ".join(f"{token['text']}/{token['label']}" for token in answer["tokens"])
    if "embedding" in answer:
        return " ".join(f"{value:.6g}" for value in answer["embedding"])
    return f"{answer['value']:.6g}"


def _run_arrays(
    session: Session, arrays: dict[str, Any], options: dict[str, Any], output: Path | None, *, as_json: bool
) -> None:
    """Run the model on arrays; an encoder's inputs alone make a sequence-to-sequence model write."""
    writes = session.has_encoder and "decoder_input_ids" not in arrays
    if writes and output is None:
        _write_text(session, arrays, options, as_json=as_json)
        return
    if options:
        flag = "--" + next(iter(options)).replace("_", "-")
        raise typer.BadParameter("only goes with models that write text", param_hint=flag)
    outputs = session.run(arrays)
    if output is not None:
        write_arrays(output, outputs)
    shapes = {name: {"dtype": value.dtype.name, "shape": list(value.shape)} for name, value in outputs.items()}
    if as_json:
        written = None if output is None else str(output)
        out.result_json({"adapter": session.adapter, "output": written, "outputs": shapes})
        return
    for name, value in shapes.items():
        out.result(f"{name}  {value['dtype']}{value['shape']}")


def _check_task(session: Session, *, prompt: str | None, judges: bool) -> None:
    """Refuse an input that this model cannot answer, in the words of the command line."""
    writes = session.spec is not None
    task = session.bundle.manifest.task
    if prompt is not None and not writes:
        raise SessionError(
            f"this bundle does not write text: its task is {task!r}", hint="give --text, --image or --inputs"
        )
    if judges and writes:
        raise SessionError(f"this bundle writes text: its task is {task!r}", hint="give --prompt or --inputs")


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _check_one(flags: dict[str, Any]) -> None:
    given = [flag for flag, value in flags.items() if value]
    if len(given) != 1:
        problem = "too many" if given else "missing"
        raise typer.BadParameter(f"{problem}; give one kind of input", param_hint=", ".join(flags))


def _check_fit(options: dict[str, Any], *, prompt: Any, inputs: Any, image: Any, label: Any, output: Any) -> None:
    """Refuse flags that mean nothing beside the kind of input."""
    if options and prompt is None and inputs is None:
        flag = "--" + next(iter(options)).replace("_", "-")
        raise typer.BadParameter("only goes with --prompt", param_hint=flag)
    if output is not None and prompt is not None:
        raise typer.BadParameter("does not go with --prompt", param_hint="--output")
    if label and (not image or output is not None):
        raise typer.BadParameter("only goes with --image, without --output", param_hint="--label")
