"""What a session must know of a bundle's decoder, read from the manifest."""

from __future__ import annotations

from edgeadapt.bundle.manifest import Manifest
from edgeadapt.decoder_spec import DecoderSpec
from edgeadapt.errors import SessionError
from edgeadapt.fields import from_mapping


def decoder_spec(manifest: Manifest) -> DecoderSpec | None:
    """Return the decoder's record, or None for a single-pass model.

    Raises:
        SessionError: if the manifest's record and its graphs do not go together.
    """
    if "decoder" not in manifest.graphs:
        return None
    if manifest.generation is None:
        raise SessionError(
            f"bundle {manifest.name!r} has a decoder graph but no generation record in manifest.json",
            hint="export the bundle again",
        )
    return from_mapping(DecoderSpec, manifest.generation, "manifest.json: generation", SessionError)
