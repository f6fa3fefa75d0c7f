"""`edgeadapt verify`: is every byte and every golden output of a bundle what it was?"""

from __future__ import annotations

import typer

from edgeadapt.cli import output
from edgeadapt.cli.options import BundlePath, Json, Quiet
from edgeadapt.cli.progress import reporter


def verify(*, bundle: BundlePath, json: Json = False, quiet: Quiet = False) -> None:
    """Check a bundle's files against its manifest and its adapters against their goldens."""
    from edgeadapt.addition import verify_bundle
    from edgeadapt.fields import to_mapping

    with reporter(quiet=quiet) as progress:
        findings = [to_mapping(finding) for finding in verify_bundle(bundle, progress=progress)]
    if json:
        output.result_json({"ok": not findings, "findings": findings})
    elif not quiet:
        output.table("Findings", findings)
        if not findings:
            output.text(f"{bundle} is what it was: every file and every golden output agrees")
    if findings:
        first = findings[0]
        more = f", and {len(findings) - 1} more" if len(findings) > 1 else ""
        output.error(
            f"{bundle} is not what it was: {first['path']}: {first['problem']}{more}",
            "export the bundle again, or copy it again from where it came",
        )
        raise typer.Exit(1)
