"""Atomic writes, digests, locks and JSON lines."""

import hashlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from filelock import Timeout
from PIL import Image

from realgen_jax import files
from realgen_jax.files import (
    append,
    content_digest,
    drop_incomplete_line,
    file_lock,
    read_jsonl,
    sampled_digest,
    sha256_file,
    whole_folder,
    write_image,
    write_whole,
)
from realgen_jax.nn.stored import write_tensors
from realgen_jax.training.tensorboard import Board
from tests.helpers.faults import changed as changed_file
from tests.helpers.faults import full_disk


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    file = tmp_path / "a.txt"
    write_whole(file, "one\nHäuser\n")
    assert file.read_bytes() == "one\nHäuser\n".encode()
    write_whole(file, b"\x00\xff")
    assert file.read_bytes() == b"\x00\xff"
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_is_replaced_only_without_an_error(tmp_path):
    folder = tmp_path / "lora"
    with whole_folder(folder) as part:
        (part / "a").write_text("old")
    with pytest.raises(IsADirectoryError), whole_folder(folder) as part:
        part.write_text("not a folder")
    assert (folder / "a").read_text() == "old"
    assert list(tmp_path.rglob("*")) == [folder, folder / "a"]
    (tmp_path / "lora.part").mkdir()
    (tmp_path / "lora.part" / "rest").write_text("left by a crash")
    with whole_folder(folder) as part:
        (part / "b").write_text("new")
    assert list(tmp_path.rglob("*")) == [folder, folder / "b"]


def write_lora(folder):
    with whole_folder(folder) as part:
        tensors = {"a": np.random.rand(9000)}
        write_tensors(part / "lora.safetensors", tensors, tensors.items(), {})


def write_figures(folder):
    board = Board(folder, None)
    try:
        for epoch in range(200):
            board.scalars({"a": 1.0, "b": 2.0}, epoch)
    finally:
        board.close()


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
WRITERS = {
    "text": (lambda file: write_whole(file, "x" * 9000), "text"),
    "a line": (lambda file: append(file, "x" * 9000), "line"),
    "a picture": (lambda file: write_image(file, Image.fromarray(NOISE)), "picture.png"),
    "a LoRA": (write_lora, "lora"),
    "figures": (write_figures, "tensorboard"),
    "a picture for TensorBoard": (
        lambda folder: Board(folder, None).picture("a", NOISE, 1),
        "tensorboard",
    ),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_an_error_that_names_what_was_written(tmp_path, kind):
    write, name = WRITERS[kind]
    message = rf"/{name}.* could not be written: .*File too large"
    with pytest.raises(OSError, match=message), full_disk():
        write(tmp_path / name)
    assert not list(tmp_path.glob("*.part"))


def test_a_full_disk_keeps_what_was_exported_before(tmp_path):
    file = tmp_path / "file"
    write_whole(file, "old")
    folder = tmp_path / "lora"
    with whole_folder(folder) as part:
        tensors = {"a": np.zeros(3)}
        write_tensors(part / "lora.safetensors", tensors, tensors.items(), {})
    before = (folder / "lora.safetensors").read_bytes()

    with full_disk():
        with pytest.raises(OSError, match="file could not be written"):
            write_whole(file, "x" * 9000)
        with pytest.raises(OSError, match=r"lora.* could not be written"):
            write_lora(folder)
    assert file.read_text() == "old"
    assert (folder / "lora.safetensors").read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [file, folder]


def test_a_crash_between_the_two_renames_loses_nothing(tmp_path):
    folder = tmp_path / "lora"
    (tmp_path / "lora.old").mkdir()
    (tmp_path / "lora.old" / "a").write_text("old")
    with pytest.raises(RuntimeError), whole_folder(folder):
        raise RuntimeError("the next export fails")
    assert list(tmp_path.rglob("*")) == [folder, folder / "a"]


def test_digests(tmp_path, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    assert sha256_file(file) == hashlib.sha256(b"abc").hexdigest()
    assert sampled_digest(file) == hashlib.sha256(b"weights 3abc").digest()

    # Every byte counts.
    content = bytearray(5 << 20)
    digests = set()
    for position in (0, 3_000_001, -1):
        content[position] = 1
        file.write_bytes(content)
        digests.add(sampled_digest(file))
    assert len(digests) == 3

    # Of a large file, the size and the blocks count.
    monkeypatch.setattr(files, "WHOLE_BYTES", 1 << 20)
    first = sampled_digest(file)
    content[-1] = 2
    file.write_bytes(content)
    changed = sampled_digest(file)
    file.write_bytes(content[:-1])
    assert len({first, changed, sampled_digest(file)}) == 3


def test_content_counts_wherever_it_is(tmp_path):
    folder = tmp_path / "model"
    (folder / "vae").mkdir(parents=True)
    (folder / "a.txt").write_text("one")
    (folder / "vae" / "b").write_text("two")
    first = content_digest([folder])
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    (copy / ".cache").mkdir()
    (copy / ".cache" / "c").write_text("state of a download")
    assert content_digest([copy]) == first

    # A file's name counts inside a folder, but not alone.
    (copy / "a.txt").rename(copy / "z.txt")
    assert content_digest([copy]) != first
    assert content_digest([copy / "z.txt"]) == content_digest([folder / "a.txt"])
    with changed_file(folder / "vae" / "b"):
        assert content_digest([folder]) != first
    assert content_digest([folder]) == first
    with pytest.raises(FileNotFoundError, match="nowhere"):
        content_digest([tmp_path / "nowhere"])


def test_a_lock_ends_with_its_process(tmp_path):
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from realgen_jax.files import file_lock\n"
        "with file_lock(Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    file = tmp_path / "lock"
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(file)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(Timeout), file_lock(file, timeout=0):
        pass
    other.kill()
    other.wait()
    with file_lock(file, timeout=0):
        pass


def test_json_lines_tolerate_a_last_line_cut_by_a_crash(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert read_jsonl(file) == []
    drop_incomplete_line(file)
    assert not file.exists()

    file.write_text('{"a": 1}\n{"a": 2}\n{"a": ')
    assert read_jsonl(file) == [{"a": 1}, {"a": 2}]
    drop_incomplete_line(file)
    assert file.read_text() == '{"a": 1}\n{"a": 2}\n'
    drop_incomplete_line(file)
    assert read_jsonl(file) == [{"a": 1}, {"a": 2}]

    file.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2 is not JSON"):
        read_jsonl(file)
