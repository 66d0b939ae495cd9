"""Output files of rewritten prompts, which can be continued."""

import json

import jax
import pytest

from realgen_jax.rewriter.output import Output, plan_lines
from realgen_jax.rewriter.writer import Rewrite

MANIFEST = {"seed": 0, "keep": 0.25}


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(("keep", "kept"), [(0, 0), (0.25, 3), (1, 12)])
def test_the_share_of_lines_that_stay_is_exact(keep, kept):
    lines = plan_lines(6, 2, keep, jax.random.key(0))
    assert [(line.number, line.copy) for line in lines] == [
        (number, copy) for number in range(6) for copy in range(2)
    ]
    assert sum(not line.rewritten for line in lines) == kept


def test_which_lines_stay_depends_on_the_key():
    def chosen(seed):
        lines = plan_lines(40, 1, 0.5, jax.random.key(seed))
        return [line.number for line in lines if not line.rewritten]

    assert chosen(0) == chosen(0)
    assert chosen(0) != chosen(1)
    assert chosen(0) != list(range(20))


def test_an_unusable_rewrite_is_not_written(tmp_path):
    output = Output(tmp_path / "out.jsonl", MANIFEST, remake=False)
    lines = plan_lines(3, 1, 0, jax.random.key(0))
    output.add([Rewrite("a long ä", True), Rewrite("b\n\nb", False), Rewrite("", False)])
    output.finish(lines, ["a", "b", "c"], output.resume(2, 3))
    assert rows(output.file) == [
        {"prompt": "a long ä", "original": "a"},
        {"prompt": "b", "original": "b"},
        {"prompt": "c", "original": "c"},
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out.jsonl", "out.jsonl.manifest.json",
    ]  # fmt: skip


def test_an_interrupted_output_goes_on_after_its_last_whole_batch(tmp_path):
    def opened():
        return Output(tmp_path / "out.jsonl", MANIFEST, remake=False)

    rewrites = [Rewrite(f"r{i}", True) for i in range(5)]
    opened().add(rewrites[:2])
    opened().add(rewrites[2:4])
    part = tmp_path / "out.jsonl.part"
    part.write_bytes(part.read_bytes()[:-3])  # killed while it wrote
    assert opened().resume(2, 5) == rewrites[:2]
    assert opened().resume(2, 5) == rewrites[:2]  # the rest is gone
    opened().add(rewrites[2:4])
    opened().add(rewrites[4:])
    assert opened().resume(2, 5) == rewrites  # the last batch is smaller
    assert not opened().is_whole
    opened().finish(plan_lines(5, 1, 0, jax.random.key(0)), list("abcde"), rewrites)
    assert opened().is_whole


@pytest.mark.parametrize("whole", [True, False])
def test_an_output_of_other_settings_is_not_replaced(tmp_path, whole):
    file = tmp_path / "out.jsonl"
    output = Output(file, MANIFEST, remake=False)
    output.add([Rewrite("r", True)])
    if whole:
        output.finish(plan_lines(1, 1, 0, jax.random.key(0)), ["a"], [Rewrite("r", True)])
    other = {**MANIFEST, "seed": 1}
    message = (
        r"out\.jsonl was made with other settings: seed 0 then and 1 now; choose another --out"
    )
    with pytest.raises(FileExistsError, match=message):
        Output(file, other, remake=False)
    assert Output(file, MANIFEST, remake=False).is_whole == whole

    assert not Output(file, other, remake=True).is_whole
    assert Output(file, other, remake=False).resume(1, 2) == []


def test_a_file_of_unknown_origin_is_not_replaced(tmp_path):
    file = tmp_path / "out.jsonl"
    file.write_text("mine\n")
    with pytest.raises(FileExistsError, match=r"was made in an unknown way \(it has no manifest\)"):
        Output(file, MANIFEST, remake=False)
    (tmp_path / "out.jsonl.manifest.json").write_text("{")
    with pytest.raises(FileExistsError, match=r"in an unknown way \(.*manifest\.json is damaged\)"):
        Output(file, MANIFEST, remake=False)
    assert file.read_text() == "mine\n"
