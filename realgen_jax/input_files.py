"""Text and picture files as people have them.

realgen_jax and reward_bridge, which do not import each other, each have this file; a test compares
the two.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# What is decoded. Pillow knows more formats, but they are no photographs, or start other programs
# (EPS starts Ghostscript). It also says which suffixes the files of a format have.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
SYSTEM_FILES = ("thumbs.db", "desktop.ini")  # hidden files of Windows; others begin with a dot

# EXIF's orientation -> how to turn the picture upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_lines(file: Path) -> list[str]:
    """Read the lines of a UTF-8 file, without their ends and without byte order marks.

    Only a line feed ends a line, with or without a carriage return before it. (`str.splitlines`
    would also split at U+2028, form feeds and others, which occur inside prompts.) Raises
    ValueError naming the first line that is not UTF-8.
    """
    lines = []
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file}, line {number} is not UTF-8 (byte 0x{line[error.start]:02x}); save "
                    "the file as UTF-8"
                ) from None
            if "\0" in text:
                raise ValueError(
                    f"{file}, line {number} has a null character, as in UTF-16; save the file as "
                    "UTF-8"
                )
            lines.append(text.removesuffix("\n").removesuffix("\r"))
    return lines


def check_text(text: str, place: str) -> None:
    """Raise ValueError for half a surrogate pair, which neither tokenizers nor files take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place} has half of a surrogate pair, \\u{ord(text[error.start]):04x}, in {text!r}; "
            "write the whole character, or remove it"
        ) from None


def list_pictures(folder: Path, pattern: str) -> tuple[list[Path], list[Path]]:
    """Return the pictures in a folder, and its other files, both sorted.

    A picture is told by its suffix. pattern: "*", or "**/*" for subfolders too. Hidden files and
    folders are passed over, such as ._a.png and .DS_Store, which macOS leaves.
    """
    extensions = Image.registered_extensions()
    pictures = []
    others = []
    for file in sorted(folder.glob(pattern)):
        parts = file.relative_to(folder).parts
        is_hidden = any(part.startswith(".") for part in parts) or parts[-1].lower() in SYSTEM_FILES
        if is_hidden or file.is_dir():
            continue
        is_picture = extensions.get(file.suffix.lower()) in FORMATS
        (pictures if is_picture else others).append(file)
    return pictures, others


def read_image(data: bytes, formats: Sequence[str] = FORMATS) -> Image.Image:
    """Decode a picture file to 8-bit RGB: upright, on a white background, the first frame only.

    Raises ValueError for a file that cannot be decoded completely.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
        image.load()

        # Upright. Pillow's own function also writes the EXIF data anew, which fails if a tag that
        # has nothing to do with it is damaged.
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        if orientation in TURNS:
            image = image.transpose(TURNS[orientation])

        # 8 bits, opaque.
        if image.mode.startswith(("I", "F")):
            image = _eight_bits(image)
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"cannot identify it as one of {', '.join(formats)}") from None
    except Exception as error:  # for damaged files, Pillow raises errors of many types
        raise ValueError(str(error) or type(error).__name__) from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """16 bits per pixel -> 8. Raises ValueError for other ranges, whose white is unknown."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"has {8 * values.itemsize} bits per pixel; save it with 8 or 16")
    return Image.fromarray((values / 257 + 0.5).astype(np.uint8))
