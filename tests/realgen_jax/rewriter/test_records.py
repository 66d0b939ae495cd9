"""rewrites.jsonl and the pictures beside it."""

import json

import numpy as np
import pytest
from PIL import Image

from realgen_jax.rewriter.records import FILE, keep_records, read_records


def keep(run, epoch, kind, *rewrites, pictures=0):
    count = len(rewrites)
    images = np.full((pictures, 3, 40, 60), 7, np.uint8)
    prompts = [f"p{i}" for i in range(count)]
    keep_records(
        run,
        epoch,
        kind,
        prompts,
        rewrites,
        [True] * count,
        np.arange(count, dtype=np.float32),
        images,
    )


def test_records_are_read_as_they_were_kept(tmp_path):
    keep(tmp_path, 0, "eval", "a", "b", pictures=1)
    first, second = read_records(tmp_path / FILE)
    assert (first.epoch, first.kind, first.prompt, first.rewrite) == (0, "eval", "p0", "a")
    assert (first.usable, first.reward, second.reward) == (True, 0.0, 1.0)
    assert second.picture is None
    picture = Image.open(tmp_path / first.picture)
    assert (picture.size, picture.getpixel((0, 0))) == ((60, 40), (7, 7, 7))


def test_a_resumed_run_replaces_what_it_repeats(tmp_path):
    for epoch in (0, 2, 4):
        keep(tmp_path, epoch, "eval", f"e{epoch}")
        keep(tmp_path, epoch, "train", f"t{epoch}")
    keep(tmp_path, 2, "eval", "again")
    keep(tmp_path, 2, "train", "t again")
    assert [record.rewrite for record in read_records(tmp_path / FILE)] == [
        "e0", "t0", "again", "t again",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change", [{"kind": "test"}, {"usable": 1}, {"reward": None}, {"epoch": "0"}, {"picture": 3}]
)
def test_a_wrong_line_is_named(tmp_path, change):
    keep(tmp_path, 0, "eval", "a", "b")
    file = tmp_path / FILE
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in [rows[0], rows[1] | change]))
    with pytest.raises(ValueError, match=r"rewrites\.jsonl, line 2, is no rewrite; expected"):
        read_records(file)


def test_there_may_be_none(tmp_path):
    assert read_records(tmp_path / FILE) == []
