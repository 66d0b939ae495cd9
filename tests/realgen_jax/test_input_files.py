"""Text and picture files as people have them, read by both packages in the same way."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from realgen_jax import input_files
from realgen_jax.input_files import list_pictures, read_image, read_lines
from tests.helpers.goldens import ROOT

RAMP = (np.indices((8, 12)).sum(0) * 12).astype(np.uint8)
RGB = np.stack([RAMP, 255 - RAMP, RAMP // 2 + 60], -1)


def test_both_packages_have_the_same_reader():
    copy = ROOT / "reward_bridge" / "input_files.py"
    assert copy.read_text() == (ROOT / "realgen_jax" / "input_files.py").read_text()


# -- Text


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"", []),
        (b"a\nb", ["a", "b"]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"\xef\xbb\xbfa\n", ["a"]),
        (b"a\n\xef\xbb\xbfb\n", ["a", "b"]),  # two files with byte order marks, joined
        ("a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\n".encode(), ["a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"]),
        (b"a\n\nb\n", ["a", "", "b"]),
    ],
)
def test_only_line_feeds_end_lines(tmp_path, content, lines):
    (tmp_path / "a.txt").write_bytes(content)
    assert read_lines(tmp_path / "a.txt") == lines


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("ok\ncafé\n".encode("cp1252"), r"a\.txt, line 2 is not UTF-8 \(byte 0xe9\); save the"),
        ("a cat\n".encode("utf-16"), r"a\.txt, line 1 is not UTF-8 \(byte 0xff\)"),
        ("a cat\n".encode("utf-16-be"), r"a\.txt, line 1 has a null character, as in UTF-16"),
    ],
)
def test_other_encodings_are_named_with_their_line(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_lines(tmp_path / "a.txt")


# -- Pictures


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels_of(data):
    return np.asarray(read_image(data))


def test_16_bits_become_8():
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    grey = np.stack([RAMP] * 3, -1)
    for data in (encoded(deep, "PNG"), encoded(deep, "TIFF"), encoded(deep, "PPM")):
        np.testing.assert_array_equal(pixels_of(data), grey)


def test_what_is_transparent_is_white():
    """However a file says so: by an alpha channel, a palette, or a transparent colour."""
    alpha = np.full(RAMP.shape, 255, np.uint8)
    alpha[:, 6:] = 0
    rgba = Image.fromarray(np.dstack([np.zeros_like(RGB), alpha]))
    halves = np.repeat(alpha[..., None] ^ 255, 3, -1)
    palette = Image.fromarray(alpha).convert("P")
    files = [
        encoded(rgba, "PNG"),
        encoded(rgba, "WEBP", lossless=True),
        encoded(rgba.convert("LA"), "PNG"),
        encoded(rgba.quantize(), "PNG"),
        encoded(Image.fromarray(alpha ^ 255), "PNG", transparency=255),
        encoded(palette, "GIF", transparency=0),
    ]
    for data in files[:4]:
        np.testing.assert_array_equal(pixels_of(data), halves)
    np.testing.assert_array_equal(pixels_of(files[4]), halves)
    assert (pixels_of(files[5]) == 255).all()  # black is transparent, the rest is white


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "YCbCr"])
def test_other_modes_are_converted(mode):
    image = Image.fromarray(RGB).convert(mode)
    want = np.asarray(image.convert("RGB")).astype(int)
    data = encoded(image, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    assert np.abs(pixels_of(data) - want).max() <= 2


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_counts(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(pixels_of(data).astype(int) - np.asarray(frames[0])).max() <= 2


def jpeg_with_exif(orientation):
    """A JPEG with an orientation, and an x resolution of -1/0, which Pillow cannot write."""
    data = encoded(Image.fromarray(RGB), "JPEG", quality=95)
    entries = struct.pack("<HHII", 0x112, 3, 1, orientation) + struct.pack(
        "<HHII", 0x11A, 10, 1, 50
    )
    tiff = b"II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    tiff = tiff.ljust(50, b"\0") + struct.pack("<ii", -1, 0)
    payload = b"Exif\0\0" + tiff
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + data[2:]


def test_a_picture_is_turned_though_its_exif_data_is_damaged():
    upright = pixels_of(jpeg_with_exif(1))
    assert np.abs(upright.astype(int) - RGB).mean() < 3
    turns = {3: np.rot90(upright, 2), 6: np.rot90(upright, -1), 8: np.rot90(upright)}
    turns |= {2: upright[:, ::-1], 4: upright[::-1]}
    turns |= {5: upright.swapaxes(0, 1), 7: np.rot90(upright, 2).swapaxes(0, 1)}
    for orientation, want in turns.items():
        np.testing.assert_array_equal(pixels_of(jpeg_with_exif(orientation)), want)


PNG = encoded(Image.fromarray(RGB), "PNG")
FLOATS = encoded(Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF")
LARGE = encoded(Image.fromarray(RAMP.astype(np.int32) << 16), "TIFF")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot identify it as one of AVIF, BMP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),
        (PNG[:-30], "truncated|broken"),
        (encoded(Image.fromarray(RGB), "JPEG")[:-20], "truncated"),
        (FLOATS, "has 32 bits per pixel; save it with 8 or 16"),
        (LARGE, "has 32 bits per pixel; save it with 8 or 16"),
    ],
)
def test_what_cannot_be_read_is_said(data, message):
    with pytest.raises(ValueError, match=message):
        read_image(data)


def test_a_picture_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ValueError, match=r"96 pixels\) exceeds limit of 40"):
        read_image(PNG)


def test_pictures_are_listed_by_pillows_suffixes_and_hidden_files_are_passed_over(tmp_path):
    pictures = ["a.png", "b.JPEG", "c.avif", "d.jfif", "e.tif", "sub/f.webp"]
    others = ["g.heic", "h.eps", "notes.txt"]
    hidden = ["._a.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".cache/i.png"]
    for name in [*pictures, *others, *hidden]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    found = list_pictures(tmp_path, "**/*")
    assert found == tuple([tmp_path / name for name in names] for names in (pictures, others))
    assert tmp_path / "sub" / "f.webp" not in list_pictures(tmp_path, "*")[0]
    assert list_pictures(tmp_path / "nowhere", "*") == ([], [])


def test_every_format_is_known_to_pillow():
    Image.init()
    assert set(input_files.FORMATS) <= set(Image.OPEN)
