"""The bundle, format 1: what an app ships. docs/formats/bundle-1.md is the normative text."""

from edgeadapt.bundle.add import insert_adapter, remove_adapter
from edgeadapt.bundle.bind import bind, check_inputs, check_takes_adapters
from edgeadapt.bundle.blend import blend
from edgeadapt.bundle.bundle import Bundle, open_bundle
from edgeadapt.bundle.golden import Golden, check_golden, make_golden
from edgeadapt.bundle.patch import Change, PatchWriter
from edgeadapt.bundle.patch_files import patched_contents, patched_files, write_patch, write_patched
from edgeadapt.bundle.residual import has_residual, residual_file
from edgeadapt.bundle.rules import RESIDUAL_FILE
from edgeadapt.bundle.stored import as_stored
from edgeadapt.bundle.verify import Finding, verify_files
from edgeadapt.bundle.write import write_adapter, write_assets, write_manifest

__all__ = [
    "RESIDUAL_FILE",
    "Bundle",
    "Change",
    "Finding",
    "Golden",
    "PatchWriter",
    "as_stored",
    "bind",
    "blend",
    "check_golden",
    "check_inputs",
    "check_takes_adapters",
    "has_residual",
    "insert_adapter",
    "make_golden",
    "open_bundle",
    "patched_contents",
    "patched_files",
    "remove_adapter",
    "residual_file",
    "verify_files",
    "write_adapter",
    "write_assets",
    "write_manifest",
    "write_patch",
    "write_patched",
]
