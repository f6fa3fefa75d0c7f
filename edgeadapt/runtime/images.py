"""Pictures to `pixel_values`, as the base's preprocessor_config.json says. Needs pillow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeadapt.errors import SessionError

Array = NDArray[Any]
Picture = str | Path | NDArray[np.uint8]
"""A file, or uint8[height, width, 3] in red, green, blue."""

_PLAIN_SIZES = ("height", "width")
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")


def pixel_values(pictures: Sequence[Picture], config: Mapping[str, Any]) -> NDArray[np.float32]:
    """Return pictures as float32[batch, 3, height, width]: resized, cropped, rescaled and normalised.

    Args:
        pictures: files, or uint8[height, width, 3] arrays.
        config: the content of preprocessor_config.json.

    Raises:
        SessionError: if pillow is missing, a picture cannot be read, or the config asks for something unknown.
    """
    if not config:
        raise SessionError(
            "the bundle holds no assets/preprocessor_config.json, so it does not say how to prepare pictures",
            hint="give pixel_values as an array instead",
        )
    unknown = sorted(key for key, value in config.items() if key.startswith("do_") and value and key not in _STEPS)
    if unknown:
        raise SessionError(
            f"preprocessor_config.json asks for {unknown[0]!r}, which is not supported",
            hint="prepare the picture yourself and give pixel_values as an array",
        )
    return np.stack([_prepare(_open(picture), config) for picture in pictures])


def _open(picture: Picture) -> Any:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise SessionError(
            "pictures need pillow, which is not installed", hint='pip install "edgeadapt[images]"'
        ) from error
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise SessionError(
                f"a picture is {picture.dtype.name}{list(picture.shape)}", hint="give uint8[height, width, 3] or a file"
            )
        return Image.fromarray(picture)
    try:
        with Image.open(picture) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise SessionError(
            f"the picture {picture} could not be read: {error}", hint="give a PNG or JPEG file"
        ) from error


def _prepare(image: Any, config: Mapping[str, Any]) -> NDArray[np.float32]:
    crop = config.get("crop_size") if config.get("do_center_crop") else None
    if config.get("do_resize", True):
        size = config.get("size", 224)
        edge = size.get("shortest_edge") if isinstance(size, Mapping) else None
        if edge is not None and "crop_pct" in config and edge < 384:  # transformers' ConvNextImageProcessor
            image, crop = _resize_edge(image, int(edge / config["crop_pct"]), config), edge
        elif edge is not None and "crop_pct" in config:
            image = _resize(image, edge, edge, config)
        elif edge is not None:
            image = _resize_edge(image, edge, config)
        else:
            image = _resize(image, *_height_width(size), config)
    pixels = np.asarray(image, np.float32)
    if crop is not None:
        pixels = _center_crop(pixels, *_height_width(crop))
    return _normalise(pixels, config).transpose(2, 0, 1)


def _height_width(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and all(isinstance(size.get(key), int) for key in _PLAIN_SIZES):
        return size["height"], size["width"]
    raise SessionError(
        f"preprocessor_config.json gives the size {size!r}, which is not supported",
        hint="prepare the picture yourself and give pixel_values as an array",
    )


def _resize(image: Any, height: int, width: int, config: Mapping[str, Any]) -> Any:
    return image.resize((width, height), resample=config.get("resample", 2))


def _resize_edge(image: Any, edge: int, config: Mapping[str, Any]) -> Any:
    width, height = image.size
    if width <= height:
        return _resize(image, int(edge * height / width), edge, config)
    return _resize(image, edge, int(edge * width / height), config)


def _center_crop(pixels: Array, height: int, width: int) -> Array:
    """Cut float32[h, w, 3] to the middle, with zeros around it where it is too small."""
    short = [max(0, want - have) for want, have in zip((height, width), pixels.shape, strict=False)]
    if any(short):
        pixels = np.pad(pixels, [((need + 1) // 2, need // 2) for need in short] + [(0, 0)])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def _normalise(pixels: Array, config: Mapping[str, Any]) -> Array:
    if config.get("do_rescale", True):
        pixels = pixels * np.float32(config.get("rescale_factor", 1 / 255))
        if config.get("rescale_offset"):
            pixels = pixels - np.float32(1)
    if config.get("do_normalize", True):
        mean, std = (np.asarray(config.get(key, 0.5), np.float32) for key in ("image_mean", "image_std"))
        pixels = (pixels - mean) / std
        if config.get("include_top"):  # transformers' EfficientNetImageProcessor divides by the spread once more
            pixels = pixels / std
    return pixels.astype(np.float32)
