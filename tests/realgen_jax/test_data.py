"""Prompt files, their order, and the layout of a batch."""

import json

import numpy as np
import pytest

from realgen_jax.data import Layout, overlaps, prompt_batches, read_originals, read_prompts


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_both_forms(tmp_path):
    assert read_prompts(write(tmp_path / "a.txt", "one cat\n  zwei Häuser \n")) == [
        "one cat",
        "zwei Häuser",
    ]
    lines = '{"image": "x.png", "prompt": "one"}\n{"prompt": "two"}\n'
    assert read_prompts(write(tmp_path / "a.jsonl", lines)) == ["one", "two"]


def test_only_line_feeds_end_a_prompt(tmp_path):
    prompts = ["a cat,\u2028seen from above", "one\x0ctwo"]
    text = "\ufeff" + "\r\n".join(prompts) + "\r\n"
    assert read_prompts(write(tmp_path / "a.txt", text)) == prompts
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    assert read_prompts(write(tmp_path / "a.jsonl", "\ufeff" + "\n".join(lines))) == prompts


def test_prompts_in_two_files_are_counted_with_an_example():
    others = {"test": ["a dog", "A  Cat", "a cow"], "short": ["a hen"], "long": ["a cat"]}
    assert overlaps("train", ["a cat", "a cow", "snow"], others) == [
        "2 of the 3 prompts in test are also in train, such as 'A  Cat'",
        "1 of the 1 prompts in long are also in train, such as 'a cat'",
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "is empty"),
        ("a.txt", "one\n\nthree\n", "line 2 is blank"),
        ("a.txt", "one\rtwo\rthree\n", "line 1 has a carriage return inside"),
        ("a.jsonl", '{"prompt": "one"}\nnot json\n', "line 2 is not JSON"),
        ("a.jsonl", '{"text": "one"}\n', 'line 1 has no "prompt"'),
        ("a.jsonl", '{"prompt": 3}\n', 'line 1 has no "prompt"'),
        ("a.jsonl", '["one"]\n', 'line 1 has no "prompt"'),
        ("a.jsonl", '{"prompt": " "}\n', 'line 1 has no "prompt"'),
        ("a.jsonl", '{"prompt": "one \\ud83d"}\n', r"line 1 has half of a surrogate pair, \\ud83d"),
        ("a.jsonl", '{"prompt": "one", "category": "\\udc00"}\n', "line 1 has half of a surrogate"),
        ("a.jsonl", '{"prompt": "one", "id": 1' + 5000 * "0" + "}", "line 1 is not JSON"),
        ("a.csv", "one\n", "ends in '.csv'"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(write(tmp_path / name, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt does not exist"):
        read_prompts(tmp_path / "nowhere.txt")


def test_every_prompt_once_a_pass_in_a_new_order_each():
    batches = prompt_batches(12, 4, seed=3)
    passes = [np.concatenate([next(batches) for _ in range(3)]) for _ in range(3)]
    for rows in passes:
        assert sorted(rows) == list(range(12))
    assert len({tuple(rows) for rows in passes}) == 3
    again = prompt_batches(12, 4, seed=3)
    np.testing.assert_array_equal(next(again), passes[0][:4])
    assert not np.array_equal(next(prompt_batches(12, 4, seed=4)), passes[0][:4])


@pytest.mark.parametrize(("count", "groups"), [(5, 1), (1, 1), (1, 4), (3, 8), (7, 3)])
def test_batches_of_any_size_use_the_prompts_in_one_order(count, groups):
    batches = prompt_batches(count, groups, seed=3)
    rows = np.concatenate([next(batches) for _ in range(12)])
    pairs = prompt_batches(count, 2, seed=3)
    np.testing.assert_array_equal(rows, np.concatenate([next(pairs) for _ in range(6 * groups)]))


@pytest.mark.parametrize("groups", [1, 3, 16])
def test_the_position_can_be_saved_and_set(groups):
    batches = prompt_batches(10, groups, seed=0)
    for _ in range(5):
        next(batches)
    state = batches.get_state()
    want = [next(batches) for _ in range(8)]
    fresh = prompt_batches(10, groups, seed=0)
    fresh.set_state(state)
    np.testing.assert_array_equal([next(fresh) for _ in range(8)], want)


def test_layouts():
    recipe = Layout(calls=24, images=21, branches=3, group=21)
    recipe.check(parts=7)
    assert (recipe.slots, recipe.groups) == (7, 24)
    assert recipe.groups_of_slots(5).tolist() == [5] * 7

    # Several groups in a call
    many = Layout(calls=2, images=8, branches=2, group=4)
    assert many.groups_of_slots(0).tolist() == [0, 0, 1, 1]
    assert many.groups_of_slots(1).tolist() == [2, 2, 3, 3]

    # A group over several calls
    one_gpu = Layout(calls=14, images=3, branches=3, group=21)
    one_gpu.check(parts=1)
    assert one_gpu.groups == 2
    assert [int(one_gpu.groups_of_slots(c)[0]) for c in range(14)] == [0] * 7 + [1] * 7


@pytest.mark.parametrize(
    ("layout", "parts", "message"),
    [
        (
            Layout(calls=21, images=9, branches=3, group=21),
            1,
            "num_batches_per_epoch 21 x train_batch_size 9 cannot be divided into groups of "
            "num_image_per_prompt 21",
        ),
        (
            Layout(calls=24, images=21, branches=3, group=21),
            4,
            "train_batch_size 21 must be a multiple of branches x 4",
        ),
        (
            Layout(calls=2, images=42, branches=2, group=21),
            1,
            "branches 2 must divide num_image_per_prompt 21",
        ),
        (
            Layout(calls=2, images=8, branches=1, group=4, previews=4),
            1,
            "scout.previews is 4; expected more than num_image_per_prompt 4",
        ),
        (
            Layout(calls=2, images=8, branches=1, group=4, previews=7),
            1,
            "4 prompts an epoch with 7 previews each are not whole calls of train_batch_size 8",
        ),
        (
            Layout(calls=2, images=8, branches=2, group=4, previews=8),
            1,
            "selects single pictures, but config.sample.branches is 2; expected 1",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_named(layout, parts, message):
    with pytest.raises(ValueError, match=message):
        layout.check(parts)


def test_originals_are_those_of_json_lines_that_have_one(tmp_path):
    file = tmp_path / "rewritten.jsonl"
    file.write_text(
        '{"prompt": "a long cat", "original": " a cat "}\n{"prompt": "a dog"}\n'
        '{"prompt": "a long cat", "original": "cats"}\n'
    )
    assert read_originals(file) == ["a cat", "a dog", "cats"]
    assert read_prompts(file) == ["a long cat", "a dog", "a long cat"]
    file.write_text('{"prompt": "a cat", "original": 3}\n')
    with pytest.raises(ValueError, match='line 1 has 3 under "original"; expected a string'):
        read_originals(file)
    (tmp_path / "plain.txt").write_text("a cat\n")
    assert read_originals(tmp_path / "plain.txt") == ["a cat"]
