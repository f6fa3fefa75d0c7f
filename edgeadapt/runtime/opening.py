"""Opening a bundle as a session."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from edgeadapt.bundle.bundle import Bundle, open_bundle
from edgeadapt.bundle.manifest import Manifest
from edgeadapt.errors import SessionError
from edgeadapt.runtime.ort import check_provider, version
from edgeadapt.runtime.prefixes import PrefixCache
from edgeadapt.runtime.prepacked import shares_weights
from edgeadapt.runtime.session import Session
from edgeadapt.runtime.threads import measured_threads


def open_session(
    bundle: Bundle | Path | str,
    *,
    threads: int | Literal["measure"] | None = None,
    provider: str = "cpu",
    keep_graphs: bool = True,
    share_weights: bool | None = None,
    prefix_cache_bytes: int = 0,
    promote_after: int | None = None,
    promoted_max_bytes: int | None = None,
) -> Session:
    """Return a session over a bundle. Graphs are opened when they are first needed.

    Args:
        bundle: a bundle's folder, or what `open_bundle` returned.
        threads: threads inside an operator, None for ONNX Runtime's own choice, one per core; "measure" opens the
            bundle with 1, 2, 4, ... and keeps the fewest that are fastest (a second or so for each).
        provider: "cpu" or "cuda"; "cuda" is an error where it cannot be used, never a silent run on the CPU.
        keep_graphs: keep the plain graph open while an adapter is active, and the slots graph while none is: a swap
            is then instant, at the price of the weights' memory twice. False opens one form at a time.
        share_weights: have all sessions on this device, of this process and others, use the same memory for weights.
            It takes a file of 2.3 times the weights' size in the user's cache (see `prepacked.py`), which is written
            when a graph is first opened. None asks the environment variable EDGEADAPT_SHARE_WEIGHTS (1 or 0), else
            False. Where the cache cannot be written, a warning says so and the session opens weights of its own.
        prefix_cache_bytes: keep keys and values of up to so many bytes of texts that were read or written, so that a
            prompt which begins like one of them, with the same adapter, is read from there on only. 0 keeps none: then
            equal calls do equal work, and memory is what it was after loading.
        promote_after: promote an adapter in the background (see `Session.promote`) once it has read and written so many
            tokens (samples, where the model reads none); None leaves it to `promote`.
        promoted_max_bytes: how much the weights files of promoted adapters may take in memory, None for two of them;
            what was not used for longest makes room.

    Raises:
        BundleError: if the folder is no bundle.
        SessionError: if an argument is wrong, the provider cannot be used here, or the bundle needs a later ONNX
            Runtime.
    """
    check_provider(provider)
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(Path(bundle))
    _check_version(opened.manifest)
    _check_cache(opened.manifest, provider)
    shared = shares_weights(share_weights, provider)
    prefixes = PrefixCache(prefix_cache_bytes)
    if threads == "measure":
        threads = measured_threads(
            lambda count: open_session(opened, threads=count, provider=provider, share_weights=shared)
        )
    return Session(
        opened,
        threads=threads,
        provider=provider,
        keep_graphs=keep_graphs,
        share_weights=shared,
        prefixes=prefixes if prefixes.max_bytes else None,
        promote_after=promote_after,
        promoted_max_bytes=promoted_max_bytes,
    )


def _check_version(manifest: Manifest) -> None:
    """Refuse a bundle whose graphs an older ONNX Runtime would refuse less clearly, or compute wrongly.

    Raises:
        SessionError: naming both versions.
    """
    wanted = str(manifest.runtime.get("min_version", "0"))
    if _numbers(version()) < _numbers(wanted):
        raise SessionError(
            f"bundle {manifest.name!r} needs ONNX Runtime {wanted}, this is {version()}",
            hint=f'pip install "onnxruntime>={wanted}"',
        )


def _check_cache(manifest: Manifest, provider: str) -> None:
    """Refuse a key-value cache in int8 on a GPU: nobody has compared its kernels.

    Raises:
        SessionError: naming the provider.
    """
    if provider != "cpu" and (manifest.generation or {}).get("cache_dtype") == "int8":
        raise SessionError(
            f"bundle {manifest.name!r} holds keys and values as int8, which is for the CPU, and the provider is "
            f"{provider!r}",
            hint="export without --kv-cache int8 for a GPU",
        )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])
