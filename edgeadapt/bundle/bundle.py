"""A bundle on disk, opened: the manifest is checked, every file is there, nothing else is read yet."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Thread

import numpy as np
from numpy.typing import NDArray

from edgeadapt.bundle.adapter_json import AdapterJson, read_adapter_json
from edgeadapt.bundle.assemble import assemble
from edgeadapt.bundle.bind import check_fit
from edgeadapt.bundle.golden import Golden, parse_golden
from edgeadapt.bundle.manifest import AdapterRecord, Manifest
from edgeadapt.bundle.names import MANIFEST_FILE
from edgeadapt.bundle.patch import Patch, parse_patch
from edgeadapt.bundle.prefix import check_prefix_tokens
from edgeadapt.bundle.recover import recover
from edgeadapt.bundle.residual import has_residual, with_residual
from edgeadapt.bundle.rules import RESIDUAL_FILE, parse_manifest, patch_path
from edgeadapt.bundle.stored import StoredTensors, with_scales
from edgeadapt.errors import BundleError, FileError
from edgeadapt.files import read_bytes
from edgeadapt.onnx_adapter import parse_onnx_adapter

_MAX_MANIFEST_BYTES = 2**26


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. What its methods return has been checked against the manifest's digests."""

    path: Path
    manifest: Manifest

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The adapters' names, sorted."""
        return tuple(sorted(self.manifest.adapters))

    @property
    def asset_names(self) -> tuple[str, ...]:
        """The names that `asset` takes, sorted."""
        return tuple(sorted(path.removeprefix("assets/") for path in self.manifest.files if path.startswith("assets/")))

    @property
    def labels(self) -> tuple[str, ...]:
        """The base's class names, by class index; empty where there are none."""
        return self.manifest.labels

    def labels_of(self, adapter: str | None) -> tuple[str, ...]:
        """Return the class names that an adapter's outputs stand for: its own, else the base's."""
        return (self.adapter_record(adapter).labels if adapter is not None else ()) or self.labels

    def adapter_record(self, name: str) -> AdapterRecord:
        """Return what the manifest says of an adapter.

        Raises:
            BundleError: if there is no such adapter, listing those that there are.
        """
        if name not in self.manifest.adapters:
            known = ", ".join(self.adapter_names) or "none"
            raise BundleError(f"{self.path} has no adapter {name!r}", hint=f"adapters of this bundle: {known}")
        return self.manifest.adapters[name]

    def file(self, path: str) -> Path:
        """Return where a file that the manifest lists lies.

        Raises:
            BundleError: if the manifest does not list it.
        """
        if path not in self.manifest.files:
            raise BundleError(f"{self.path} has no file {path!r}", hint="run `edgeadapt verify` on the bundle")
        return self.path / path

    def read(self, path: str) -> bytes:
        """Return the bytes of a listed file.

        Raises:
            BundleError: if it is not listed or its digest differs.
            FileError: if it cannot be read.
        """
        location = self.file(path)
        record = self.manifest.files[path]
        data = read_bytes(location, max_bytes=record.size)
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise _damaged(location)
        return data

    def asset(self, name: str) -> bytes:
        """Return a file of the base that travels with the bundle ("tokenizer.json").

        Raises:
            BundleError: if there is no such asset, listing those that there are, or it is damaged.
        """
        if f"assets/{name}" not in self.manifest.files:
            known = ", ".join(self.asset_names) or "none"
            raise BundleError(f"{self.path} has no asset {name!r}", hint=f"assets of this bundle: {known}")
        return self.read(f"assets/{name}")

    def adapter_tensors(self, name: str) -> dict[str, NDArray[np.float32]]:
        """Return what an adapter sets at each module: float32 arrays by input name, checked against the slots.

        Raises:
            BundleError: if there is no such adapter, or its file is damaged or sets something that it may not.
        """
        with self._stored_adapter(name) as tensors:
            return {key: tensors.float32(key) for key in tensors.values}

    def graph_tensors(self, name: str) -> dict[str, NDArray[np.float32]]:
        """Return what an adapter binds: float32 arrays by graph input, as `assemble` puts them together.

        Raises:
            BundleError: if there is no such adapter, or its file is damaged or sets something that it may not.
        """
        if has_residual(self.manifest):
            return assemble(self.repaired(self.adapter_tensors(name)), self.manifest)
        with self._stored_adapter(name) as tensors:
            return assemble(tensors.values, self.manifest, tensors.fill)

    def repaired(self, inputs: Mapping[str, NDArray[np.float32]]) -> Mapping[str, NDArray[np.float32]]:
        """Return the arrays of an adapter or a blend with the base's residual among them, if the bundle has one.

        Raises:
            BundleError: if the residual's file is damaged or sets something that it may not.
        """
        if not has_residual(self.manifest):
            return inputs
        with self._stored(RESIDUAL_FILE, "residual") as tensors:
            residual = {key: tensors.float32(key) for key in tensors.values}
        return with_residual(inputs, residual, self.manifest)

    def _stored_adapter(self, name: str) -> AbstractContextManager[StoredTensors]:
        self.adapter_record(name)
        return self._stored(f"adapters/{name}/adapter.onnx_adapter", name)

    @contextmanager
    def _stored(self, path: str, name: str) -> Iterator[StoredTensors]:
        """Give the tensors of an adapter's file, checked, while its digest is computed in another thread.

        What is made of them may leave the block only at its end: there the digest is known, and if it is wrong, that is
        the error, whatever else was found.
        """
        location = self.file(path)
        record = self.manifest.files[path]
        data = read_bytes(location, max_bytes=record.size)
        digests: list[str] = []
        hashing = Thread(target=lambda: digests.append(hashlib.sha256(data).hexdigest()))
        hashing.start()
        try:
            tensors = with_scales(parse_onnx_adapter(data, str(location)).tensors)
            check_fit(name, tensors.values, self.manifest)
            if path != RESIDUAL_FILE:
                check_prefix_tokens(name, tensors.values, self.manifest)
            yield tensors
        finally:
            hashing.join()
            if digests != [record.sha256]:
                raise _damaged(location)

    def adapter_json(self, name: str) -> AdapterJson:
        """Return an adapter's own record."""
        self.adapter_record(name)
        return read_adapter_json(self.file(f"adapters/{name}/adapter.json"))

    def has_patch(self, name: str) -> bool:
        """Return whether the bundle holds a patch for an adapter of this name, with which it can be promoted."""
        return patch_path(name) in self.manifest.files

    def require_patch(self, name: str) -> None:
        """Refuse an adapter that has no patch.

        Raises:
            BundleError: if there is no such adapter, or it has no patch.
        """
        if self.adapter_record(name).prefix_tokens:
            raise BundleError(
                f"adapter {name!r} begins texts with virtual tokens and changes no weight: there is nothing to promote",
                hint="use the adapter as it is; it runs in the plain graph",
            )
        if not self.has_patch(name):
            raise BundleError(
                f"adapter {name!r} has no patch: only an export with --patches makes one, from the float base",
                hint="export the bundle again with --patches, or use the adapter as it is",
            )

    def patch_bytes(self, name: str) -> bytes:
        """Return an adapter's patch as it lies in its file.

        Raises:
            BundleError: if there is no such adapter, it has no patch, or the file is damaged.
        """
        self.require_patch(name)
        return self.read(patch_path(name))

    def patch(self, name: str) -> Patch:
        """Return the header of an adapter's patch: what it changes, and how large it could be at best.

        Raises:
            BundleError: if there is no such adapter, it has no patch, or the patch is damaged.
        """
        return parse_patch(self.patch_bytes(name), str(self.path / patch_path(name)), self.manifest)[0]

    def golden(self, name: str) -> Golden:
        """Return an adapter's golden.

        Raises:
            BundleError: if there is no such adapter, or its golden is damaged.
        """
        self.adapter_record(name)
        path = f"adapters/{name}/golden.safetensors"
        return parse_golden(self.read(path), str(self.path / path))


def open_bundle(path: Path | str, *, check_files: bool = True) -> Bundle:
    """Return the bundle at `path`: its manifest valid, every file that it lists there with the right size.

    Digests are checked when a file is read, and all at once by `verify_files`. A change of the bundle that a killed
    process left half done is undone or completed first.

    Args:
        path: the bundle's folder.
        check_files: look at every listed file; `verify` does without, to report all that is wrong at once.

    Raises:
        BundleError: if it is no bundle, of another format, or damaged.
        FileError: if it cannot be read.
    """
    folder = Path(path)
    manifest = _read_manifest(folder)
    recover(folder, manifest)
    if check_files:
        for file in sorted(manifest.files):
            if (problem := file_problem(folder, file, manifest)) is not None:
                raise BundleError(f"{folder}: {file} {problem}", hint="run `edgeadapt verify`, or export it again")
    return Bundle(folder, manifest)


def _damaged(location: Path) -> BundleError:
    return BundleError(
        f"{location} is damaged: its SHA-256 is not the manifest's", hint="export the bundle or copy it again"
    )


def file_problem(folder: Path, path: str, manifest: Manifest) -> str | None:
    """Return what is wrong with a listed file's place and size, or None."""
    inner = PurePosixPath(path)
    for part in reversed(inner.parents[:-1]):
        if (folder / part).is_symlink():
            return f"lies behind the symbolic link {part}"
    try:
        status = (folder / path).lstat()
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be looked at: {error.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return "is a symbolic link" if stat.S_ISLNK(status.st_mode) else "is not a plain file"
    size = manifest.files[path].size
    return None if status.st_size == size else f"has {status.st_size} bytes, the manifest says {size}"


def _read_manifest(folder: Path) -> Manifest:
    if not folder.exists():
        raise BundleError(f"{folder} does not exist", hint="check the path; `edgeadapt export` makes bundles")
    if not folder.is_dir():
        raise BundleError(f"{folder} is a file, not a bundle folder", hint="give the folder that export wrote")
    path = folder / MANIFEST_FILE
    if not path.exists():
        what = "an export that did not finish" if ".tmp-" in folder.name else "not a bundle"
        raise BundleError(f"{folder} has no {MANIFEST_FILE}: it is {what}", hint="`edgeadapt export` makes bundles")
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{path} is not a plain file", hint="copy the bundle with its real files")
    try:
        return parse_manifest(read_bytes(path, max_bytes=_MAX_MANIFEST_BYTES), str(path))
    except FileError as error:
        raise BundleError(error.message, hint=error.hint) from error
