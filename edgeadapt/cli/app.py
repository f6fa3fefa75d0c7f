"""The `edgeadapt` program: its commands, and the only place where an error stops."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import edgeadapt
from edgeadapt.cli import (
    add,
    blend,
    compare,
    convert,
    devices,
    enroll,
    export,
    inspect,
    interrupts,
    listing,
    output,
    predict,
    profile,
    remove,
    report,
    run,
    tune,
    verify,
)
from edgeadapt.errors import EdgeAdaptError

# Top-level modules that come with an extra, by the extra's name.
_EXTRAS = {
    "accelerate": "export",
    "gguf": "export",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxscript": "export",
    "optimum": "export",
    "peft": "export",
    "torch": "export",
    "transformers": "export",
    "PIL": "images",
}


class _Boundary(TyperGroup):
    """Turns what users can act on into a message and an exit status; bugs keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            with interrupts.instead_of_errors():
                return super().invoke(ctx)
        except EdgeAdaptError as error:
            output.error(error.message, error.hint)
            raise typer.Exit(1) from error
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing not in _EXTRAS:
                raise
            extra = f"edgeadapt[{_EXTRAS[missing]}]"
            output.error(f"this needs {missing}, which is not installed", f"pip install '{extra}'")
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            output.error("interrupted; nothing was left behind", None)
            raise typer.Exit(130) from error


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(edgeadapt.__version__)
        raise typer.Exit


app = typer.Typer(
    cls=_Boundary,
    help="Turn trained adapters into swappable, quantized ONNX bundles that run without torch.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _edgeadapt(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    """Turn trained adapters into swappable, quantized ONNX bundles that run without torch."""


app.command("inspect")(inspect.inspect)
app.command("export")(export.export)
app.command("add")(add.add)
app.command("blend")(blend.blend)
app.command("convert")(convert.convert)
app.command("enroll")(enroll.enroll)
app.command("remove")(remove.remove)
app.command("verify")(verify.verify)
app.command("run")(run.run)
app.command("profile")(profile.profile)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("predict")(predict.predict)
app.command("tune")(tune.tune)
app.add_typer(devices.app, name="devices")
app.command("list")(listing.listing)


def main() -> None:
    """Run the program with this process's arguments and leave with its exit status."""
    interrupts.watch()
    app(prog_name="edgeadapt")
