from __future__ import annotations

import dataclasses

import pytest

from edgeadapt.bundle.bundle import open_bundle
from edgeadapt.errors import SessionError
from edgeadapt.runtime import open_session, opening


@pytest.mark.parametrize(
    ("wanted", "have", "opens"),
    [
        ("1.28.0", "1.28.0", True),
        ("1.28.0", "1.32.0.dev20260101", True),
        ("1.9.0", "1.28.0", True),
        ("1.28.0", "1.27.0", False),
        ("2.0.0", "1.32.0", False),
    ],
)
def test_a_bundle_says_which_runtime_it_needs(decoder, monkeypatch, wanted, have, opens):
    monkeypatch.setattr(opening, "version", lambda: have)
    bundle = open_bundle(decoder[0])
    asked = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, runtime={"min_version": wanted}))
    if opens:
        open_session(asked).close()
        return
    with pytest.raises(SessionError) as caught:
        open_session(asked)
    assert str(caught.value) == (
        f"bundle {bundle.manifest.name!r} needs ONNX Runtime {wanted}, this is {have}\n"
        f'Hint: pip install "onnxruntime>={wanted}"'
    )


def test_a_cache_in_int8_is_for_the_cpu(decoder, monkeypatch):
    monkeypatch.setattr(opening, "check_provider", lambda _provider: None)
    bundle = open_bundle(decoder[0])
    record = {**bundle.manifest.generation, "cache_dtype": "int8", "cache_scales": 0}
    int8 = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, generation=record))
    with pytest.raises(SessionError) as caught:
        open_session(int8, provider="cuda")
    assert str(caught.value) == (
        f"bundle {bundle.manifest.name!r} holds keys and values as int8, which is for the CPU, and the provider is "
        "'cuda'\nHint: export without --kv-cache int8 for a GPU"
    )
