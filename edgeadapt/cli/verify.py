"""`edgeadapt verify`: is every byte and every golden output of a bundle what it was?"""

from __future__ import annotations

import typer

from edgeadapt.cli import output
from edgeadapt.cli.options import BundlePath, Json, Quiet
from edgeadapt.cli.progress import reporter


def verify(*, bundle: BundlePath, json: Json = False, quiet: Quiet = False) -> None:
    """Check a bundle's files against its manifest and its adapters against their goldens."""
    from edgeadapt.addition import verify_bundle

    with reporter(quiet=quiet) as progress:
        checks = [dict(check) for check in verify_bundle(bundle, progress=progress)]
    failed = [check for check in checks if not check["ok"]]
    if json:
        output.result_json({"ok": not failed, "checks": checks})
    elif not quiet:
        output.table("Checks", checks)
    if failed:
        names = ", ".join(str(check["check"]) for check in failed[:5])
        output.error(
            f"{bundle} is not what it was: {len(failed)} of {len(checks)} checks failed ({names})",
            "export the bundle again, or copy it again from where it came",
        )
        raise typer.Exit(1)
