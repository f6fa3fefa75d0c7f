"""`edgeadapt run`: a bundle at work, on text to continue, text or images to judge, or arrays."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeadapt.cli import output as out
from edgeadapt.cli.options import BundlePath, Json, Quiet, Threads, read_blend
from edgeadapt.cli.progress import reporter

if TYPE_CHECKING:
    from edgeadapt.runtime import Session

_READS = "What it reads (one of these)"
_WRITES = "How text is written"


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
    )
    if prompt is None and options:
        flag = "--" + next(iter(options)).replace("_", "-")
        raise typer.BadParameter("only goes with --prompt", param_hint=flag)
    if prompt is not None and output is not None:
        raise typer.BadParameter("does not go with --prompt", param_hint="--output")

    from edgeadapt.device import read_device, require_this_machine
    from edgeadapt.runtime import open_session

    target = read_device(device)
    require_this_machine(target)
    with reporter(quiet=quiet) as progress, progress.stage("open bundle"):
        session = open_session(bundle, threads=threads or target.threads, provider=target.provider)
        session.use(wanted)
        session.prepare()
    with session:
        if prompt is not None:
            _write_text(session, prompt, options, as_json=json)


def _write_text(session: Session, prompt: str, options: dict[str, Any], *, as_json: bool) -> None:
    """Write the model's answer: as it comes for people, whole for programs."""
    if as_json:
        from edgeadapt.fields import to_mapping

        out.result_json(to_mapping(session.complete(prompt, **options)))
        return
    for piece in session.generate(prompt, **options):
        out.result(piece, newline=False)
    out.result("")


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _check_one(flags: dict[str, Any]) -> None:
    given = [flag for flag, value in flags.items() if value]
    names = ", ".join(flags)
    if len(given) != 1:
        problem = "missing" if not given else "too many"
        raise typer.BadParameter(f"{problem}; give one kind of input", param_hint=names)
