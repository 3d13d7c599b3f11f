"""A sheet of two images side by side: bicubic upsampling and gsr's."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw, ImageFont

from gsr.io.image import on_white, to_rgb


def layout(width: int, height: int) -> tuple[tuple[int, int], int, int, int]:
    """Return the size of a sheet with two images, of its text, of the gap and the label band."""
    text = max(12, round(height / 28))
    gap, band = max(2, text // 3), math.ceil(1.6 * text)
    return (2 * width + gap, band + height), text, gap, band


def side_by_side(image: Image.Image, large: Image.Image) -> Image.Image:
    """Draw the small image, upsampled bicubically, beside the large one, under labels."""
    width, height = large.size
    size, text, gap, band = layout(width, height)
    bicubic = to_rgb(on_white(image)).resize(large.size, Image.Resampling.BICUBIC)
    sheet = Image.new("RGB", size, "white")
    sheet.paste(bicubic, (0, band))
    sheet.paste(to_rgb(on_white(large)), (width + gap, band))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(text)
    for left, label in ((0, "bicubic"), (width + gap, "gsr")):
        draw.text((left + text // 2, band // 2), label, "black", font, anchor="lm")
    return sheet
