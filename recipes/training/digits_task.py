"""Pictures of digits, drawn with Pillow from a seed: three typefaces, turned, moved, coloured, noisy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

TRAIN_SEED, HELD_OUT_SEED = 31, 32
CANVAS = 96
# Segments of a seven-segment digit: top, upper left, upper right, middle, lower left, lower right, bottom.
SEGMENT_LINES = (
    ((0, 0), (1, 0)),
    ((0, 0), (0, 1)),
    ((1, 0), (1, 1)),
    ((0, 1), (1, 1)),
    ((0, 1), (0, 2)),
    ((1, 1), (1, 2)),
    ((0, 2), (1, 2)),
)
SEGMENTS = (
    "1110111",
    "0010010",
    "1011101",
    "1011011",
    "0111010",
    "1101011",
    "1101111",
    "1010010",
    "1111111",
    "1111011",
)
# ImageNet's channel means and standard deviations, which the base was trained with.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


def pictures(split: str, count: int, size: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Normalized pictures float32[count, 3, size, size] and their digits int64[count]; the same at every call."""
    rng = np.random.default_rng(TRAIN_SEED if split == "train" else HELD_OUT_SEED)
    digits = np.arange(count, dtype=np.int64) % 10
    images = np.stack([_picture(int(digit), size, rng) for digit in digits])
    normalized = (images - MEAN) / STD
    return np.ascontiguousarray(normalized.transpose(0, 3, 1, 2), dtype=np.float32), digits


def _picture(digit: int, size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """One picture float32[size, size, 3] in 0..1."""
    mask = _segment_mask(digit, rng) if rng.random() < 1 / 3 else _font_mask(digit, rng)
    turned = mask.rotate(float(rng.uniform(-20, 20)), resample=Image.Resampling.BILINEAR)
    shift = rng.integers(-8, 9, 2)
    moved = turned.transform(
        turned.size, Image.Transform.AFFINE, (1, rng.uniform(-0.2, 0.2), int(shift[0]), 0, 1, int(shift[1]))
    )
    soft = moved.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 1.5))))
    alpha = np.asarray(soft.resize((size, size), Image.Resampling.BILINEAR), np.float32)[..., None] / 255
    background, ink = rng.uniform(0, 1, 3), rng.uniform(0, 1, 3)
    if abs(float(background.mean() - ink.mean())) < 0.25:
        ink = (
            (ink + 0.5) % 1
            if abs(float((ink + 0.5).mean() % 1 - background.mean())) >= 0.25
            else 1 - background.round()
        )
    image = background * (1 - alpha) + ink * alpha + rng.normal(0, 0.06, (size, size, 3))
    return np.clip(image, 0, 1).astype(np.float32)


def _font_mask(digit: int, rng: np.random.Generator) -> Image.Image:
    """A digit in Pillow's own typeface (with a stroke of random width) or in its bitmap font, scaled up."""
    mask = Image.new("L", (CANVAS, CANVAS))
    if rng.random() < 0.25:
        small = Image.new("L", (6, 11))
        ImageDraw.Draw(small).text((0, 0), str(digit), fill=255, font=ImageFont.load_default_imagefont())
        width = int(rng.integers(30, 45))
        mask.paste(small.resize((width, width * 2), Image.Resampling.BILINEAR), (CANVAS // 2 - width // 2, 8))
        return mask
    font = ImageFont.load_default(float(rng.integers(50, 85)))
    middle = (CANVAS / 2, CANVAS / 2)
    ImageDraw.Draw(mask).text(
        middle, str(digit), fill=255, font=font, anchor="mm", stroke_width=int(rng.integers(0, 4))
    )
    return mask


def _segment_mask(digit: int, rng: np.random.Generator) -> Image.Image:
    """A seven-segment digit."""
    mask = Image.new("L", (CANVAS, CANVAS))
    draw = ImageDraw.Draw(mask)
    side, pen = int(rng.integers(22, 32)), int(rng.integers(3, 8))
    left, top = (CANVAS - side) // 2, CANVAS // 2 - side
    for on, line in zip(SEGMENTS[digit], SEGMENT_LINES, strict=True):
        if on == "1":
            draw.line([(left + x * side, top + y * side) for x, y in line], fill=255, width=pen)
    return mask
