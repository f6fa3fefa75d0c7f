"""Pictures are prepared exactly as transformers prepares them."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
from PIL import Image

from edgeadapt.errors import SessionError
from edgeadapt.runtime.images import pixel_values


def _picture(height, width):
    """Smooth, so that a shift by half a pixel shows, with some noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11)], axis=-1)
    return (127 + 100 * waves + rng.integers(-20, 20, (height, width, 3))).clip(0, 255).astype(np.uint8)


def _processors():
    from transformers import (
        BitImageProcessor,
        CLIPImageProcessor,
        ConvNextImageProcessor,
        EfficientNetImageProcessor,
        ViTImageProcessor,
    )

    return {
        "vit": ViTImageProcessor(size={"height": 32, "width": 24}),
        "vit-bicubic": ViTImageProcessor(size={"height": 32, "width": 32}, resample=3, image_mean=[0.1, 0.2, 0.3]),
        "clip": CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}),
        "bit": BitImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 32, "width": 32}),
        "resnet": ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875),
        "resnet-large": ConvNextImageProcessor(size={"shortest_edge": 384}, crop_pct=1.0),
        "efficientnet": EfficientNetImageProcessor(size={"height": 32, "width": 32}),
        "no-steps": ViTImageProcessor(do_resize=False, do_rescale=False, do_normalize=False),
    }


@pytest.mark.parametrize("shape", [(40, 60), (61, 37), (20, 20)])
@pytest.mark.parametrize("kind", sorted(_processors()))
def test_equal_to_transformers(kind, shape):
    processor = _processors()[kind]
    picture = _picture(*shape)
    expected = processor(Image.fromarray(picture), return_tensors="np")["pixel_values"]
    found = pixel_values([picture], processor.to_dict())
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_files_of_any_mode_are_read(tmp_path):
    picture = _picture(16, 16)
    config = {"do_resize": False, "do_normalize": False}
    Image.fromarray(picture).save(tmp_path / "a picture.png")
    expected = pixel_values([picture], config)
    assert pixel_values([tmp_path / "a picture.png"], config).tobytes() == expected.tobytes()
    Image.fromarray(picture).convert("L").save(tmp_path / "grey.png")
    grey = pixel_values([str(tmp_path / "grey.png")], config)
    assert grey.shape == (1, 3, 16, 16)
    assert (grey[0, 0] == grey[0, 1]).all()


def test_what_is_no_picture_is_refused(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(b"no")
    with pytest.raises(SessionError) as caught:
        pixel_values([path], {"size": 8})
    assert str(caught.value) == (
        f"the picture {path} could not be read: cannot identify image file {str(path)!r}\nHint: give a PNG or JPEG file"
    )
    with pytest.raises(SessionError) as caught:
        pixel_values([np.zeros((4, 4), np.uint8)], {"size": 8})
    assert str(caught.value) == "a picture is uint8[4, 4]\nHint: give uint8[height, width, 3] or a file"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {},
            (
                "the bundle holds no assets/preprocessor_config.json, so it does not say how to prepare pictures\n"
                "Hint: give pixel_values as an array instead"
            ),
        ),
        (
            {"do_pad": True},
            (
                "preprocessor_config.json asks for 'do_pad', which is not supported\n"
                "Hint: prepare the picture yourself and give pixel_values as an array"
            ),
        ),
        (
            {"size": {"longest_edge": 8}},
            (
                "preprocessor_config.json gives the size {'longest_edge': 8}, which is not supported\n"
                "Hint: prepare the picture yourself and give pixel_values as an array"
            ),
        ),
    ],
)
def test_what_a_config_may_not_ask(config, message):
    with pytest.raises(SessionError) as caught:
        pixel_values([_picture(8, 8)], config)
    assert str(caught.value) == message


def test_without_pillow_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args):
        if name == "PIL":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SessionError) as caught:
        pixel_values(["x.png"], {"size": 8})
    assert str(caught.value) == 'pictures need pillow, which is not installed\nHint: pip install "edgeadapt[images]"'
