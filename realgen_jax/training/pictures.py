"""Grids of pictures with captions."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_TILE = 192  # minimum length in pixels of a picture's shorter side in a grid
GAP = 8  # pixels between pictures
FONT_PIXELS = 13
LINE_PIXELS = 17  # height of a caption line
MAX_LINES = 8  # maximum lines per caption


def picture_grid(rows: Sequence[np.ndarray], captions: Sequence[Sequence[str]]) -> Image.Image:
    """Draw pictures in rows, each above its caption.

    Args:
      rows: uint8 [n, 3, h, w] for each row, all with the same h and w. Small pictures are enlarged.
      captions: n captions for each row; long lines wrap.
    """
    height, width = rows[0].shape[2:]
    scale = max(1, -(-MIN_TILE // min(height, width)))
    tile_size = (width * scale, height * scale)

    # Wrap the captions; the longest one decides the height of its row.
    font = ImageFont.load_default(size=FONT_PIXELS)
    characters = max(8, int(tile_size[0] / font.getlength("n")))
    wrapped = []
    row_heights = []
    for texts in captions:
        lines = [wrap_caption(text, characters) for text in texts]
        most_lines = max((len(caption) for caption in lines), default=0)
        wrapped.append(lines)
        row_heights.append(tile_size[1] + LINE_PIXELS * most_lines + 2 * GAP)

    columns = max(len(row) for row in rows)
    grid_size = (columns * (tile_size[0] + GAP) + GAP, sum(row_heights) + GAP)
    grid = Image.new("RGB", grid_size, "white")
    draw = ImageDraw.Draw(grid)

    # Draw row by row, from the top.
    y = GAP
    for pictures, texts, row_height in zip(rows, wrapped, row_heights, strict=True):
        x = GAP
        for pixels, lines in zip(pictures, texts, strict=True):
            tile = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
            grid.paste(tile.resize(tile_size, Image.Resampling.BICUBIC), (x, y))
            for number, line in enumerate(lines):
                line_y = y + tile_size[1] + GAP // 2 + LINE_PIXELS * number
                draw.text((x, line_y), line, fill="black", font=font)
            x += tile_size[0] + GAP
        y += row_height
    return grid


def wrap_caption(text: str, characters: int) -> list[str]:
    """Wrap a caption to lines of at most `characters` (or one longer word); keep the first 8."""
    lines = []
    for paragraph in text.split("\n"):
        wrapped = textwrap.wrap(
            paragraph, characters, break_long_words=False, break_on_hyphens=False
        )
        lines.extend(wrapped or [""])
    return lines[:MAX_LINES]


def break_rows(
    rows: Sequence[np.ndarray], captions: Sequence[Sequence[str]], columns: int
) -> tuple[list[np.ndarray], list[Sequence[str]]]:
    """Break long rows after `columns` pictures; the parts of each break stay below each other."""
    short_rows = []
    short_captions = []
    for first in range(0, len(rows[0]), columns):
        part = slice(first, first + columns)
        short_rows.extend(row[part] for row in rows)
        short_captions.extend(texts[part] for texts in captions)
    return short_rows, short_captions
