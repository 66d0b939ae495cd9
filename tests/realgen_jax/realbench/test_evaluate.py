"""RealBench's pictures and scores: what is made, found, stored and counted."""

import csv
import json
import logging
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from PIL import Image
from rich.console import Console

from realgen_jax.files import content_digest
from realgen_jax.nn.lora import LoraConfig
from realgen_jax.realbench.entries import read_entries
from realgen_jax.realbench.evaluate import evaluate_entries
from realgen_jax.realbench.pictures import prepare_folder
from realgen_jax.realbench.prompts import read_sets
from realgen_jax.realbench.report import write_scores
from realgen_jax.realbench.scores import ScoreStore
from realgen_jax.text_cache import TextCache
from realgen_jax.training.scoring import ScoringError
from tests.helpers import golden_config
from tests.helpers.found_pictures import found_folder
from tests.helpers.models import fresh_adapters, golden_model

torch = pytest.importorskip("torch")

from reward_bridge.bridge import RewardBridge  # noqa: E402
from reward_bridge.digests import score_keys  # noqa: E402
from reward_bridge.reward import RewardError  # noqa: E402
from reward_bridge.rewards import make_reward  # noqa: E402

SHORT = ["a boat", "a street at night", "three lemons"]
LONG = [
    "a boat",
    "a street at night, wet asphalt",
    "three yellow lemons on a table",
]  # the first one is the same


@pytest.fixture(scope="module", autouse=True)
def compiled(cache):
    """What is compiled here is kept: many evaluations are the same program."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(cache / "xla"), 0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """The golden pipeline on three scenes of 2 pictures: config, random embeddings, two LoRAs."""
    root, config = tmp_path_factory.mktemp("setting"), golden_config.get_config().unlock()
    files = {"short": root / "short.jsonl", "long": root / "long.jsonl"}
    for file, prompts in zip(files.values(), (SHORT, LONG), strict=True):
        lines = [
            json.dumps({"prompt": p, "category": c}) for p, c in zip(prompts, "aab", strict=True)
        ]
        file.write_text("\n".join(lines))
    config.evaluate.prompts = ConfigDict({name: str(file) for name, file in files.items()})
    config.evaluate.images_per_prompt, config.evaluate.batch_size = 2, 4
    config.evaluate.scores = ("embedded_detector", "jpeg_compressibility")
    config.evaluate.sample.num_steps, config.mesh.data = 2, 1
    model, rng = golden_model(), np.random.default_rng(0)
    (root / "text").mkdir()
    cache = TextCache(root / "text", list(dict.fromkeys([*SHORT, *LONG])))
    arrays = {}
    cond = model.family.cond_shapes(model.config, len(cache.prompts), 16, np.float32)
    for name in ("t5", "clip"):
        arrays[name] = rng.normal(size=getattr(cond, name).shape).astype(np.float32)
    cache.write(0, arrays)
    for seed in range(2):
        own, adapters = fresh_adapters(model, LoraConfig(2, 4.0), jax.random.key(seed))
        adapters = jax.tree.map(lambda a: a + 0.1, adapters)
        own.trainable.save(own, root / f"lora_{seed}", adapters)
    return SimpleNamespace(config=config, cache=cache, root=root)


def run(
    setting,
    folder,
    *,
    seed=0,
    remake=False,
    entries=None,
    rewards=make_reward,
    rewrite=None,
    only_short=False,
    **changes,
):
    """An evaluation in `folder`; changes are keys of the config with __ for the dots.

    The base alone by default. rewards: (name, device, options) -> a reward. rewrite: (rewriter,
    prompts, folder) -> texts. only_short: leave out the long prompts.
    """
    config = setting.config.copy_and_resolve_references()
    config.update_from_flattened_dict(
        {key.replace("__", "."): value for key, value in changes.items()}
    )
    named = {"loras": [], "models": [], "pictures": [], "photographs": None, "base": True}
    devices = dict.fromkeys(config.evaluate.scores, "cpu")

    def open_scorer():
        loaded = {name: rewards(name, "cpu", {}) for name in devices}
        reward = config.reward
        limits = {"deadline": reward.deadline, "retries": reward.retries}
        return RewardBridge(loaded, devices, batch_size=reward.batch_size, **limits)

    return evaluate_entries(
        config,
        read_entries(config.pretrained, **named | (entries or {})),
        read_sets(config.evaluate.prompts)[: 1 if only_short else None],
        folder,
        seed=seed,
        remake=remake,
        score_keys=score_keys(config.reward, list(config.evaluate.scores), {}, content_digest),
        open_scorer=open_scorer,
        encode=lambda prompts, model: setting.cache,
        rewrite=rewrite,
        console=Console(),
    )


def pictures(folder, entry="base"):
    """{set/file: bytes}."""
    root = folder / "evaluation" / entry
    return {
        file.relative_to(root).as_posix(): file.read_bytes() for file in sorted(root.rglob("*.png"))
    }


def pixels(folder, entry="base"):
    root = folder / "evaluation" / entry
    return {
        name: np.asarray(Image.open(root / name)).astype(int) for name in pictures(folder, entry)
    }


def apart(one, other):
    """The largest difference in levels, and the largest mean difference of a picture."""
    assert one.keys() == other.keys()
    gaps = [np.abs(one[name] - other[name]) for name in one]
    return max(gap.max() for gap in gaps), max(gap.mean() for gap in gaps)


@pytest.fixture(scope="module")
def whole(setting, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run(setting, folder)


def test_a_picture_comes_from_seed_line_and_copy_alone(whole, setting, tmp_path):
    folder, found = whole
    first = pictures(folder)
    names = [f"{line:05}{copy}.png" for line in range(3) for copy in ("", "_1")]
    assert sorted(first) == sorted(f"{name}/{file}" for name in ("short", "long") for file in names)
    assert len(set(first.values())) == 10  # line 0 has one prompt in both sets, and one noise
    assert first["short/00000.png"] == first["long/00000.png"]
    assert first["short/00000_1.png"] == first["long/00000_1.png"]
    run(setting, tmp_path / "again")
    assert pictures(tmp_path / "again") == first
    run(setting, tmp_path / "other", evaluate__images_per_prompt=1)  # in other batches
    other = pixels(tmp_path / "other")
    assert len(other) == 6
    assert (
        apart(other, {name: values for name, values in pixels(folder).items() if name in other})[0]
        <= 1
    )
    run(setting, tmp_path / "seed", seed=1)
    assert not set(pictures(tmp_path / "seed").values()) & set(first.values())
    assert [(one.entry, one.set, one.line, one.copy) for one in found.pictures] == [
        ("base", name, line, copy)
        for name in ("short", "long")
        for line in range(3)
        for copy in range(2)
    ]
    assert all((one.width, one.height) == (64, 64) for one in found.pictures)


@pytest.mark.slow
def test_eight_devices_make_what_one_does(whole, setting, tmp_path):
    run(setting, tmp_path / "eight", mesh__data=4, mesh__fsdp=2)
    assert apart(pixels(tmp_path / "eight"), pixels(whole[0]))[0] <= 1


def test_what_is_finished_is_not_made_again(setting, tmp_path):
    before = run(setting, tmp_path)
    first, kept = (
        pictures(tmp_path),
        (tmp_path / "evaluation" / "base" / "short" / "scores.jsonl").read_text(),
    )
    times = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.png")}
    gone = tmp_path / "evaluation" / "base" / "short" / "00001.png"
    gone.unlink()
    after = run(setting, tmp_path)
    assert pictures(tmp_path) == first  # the one that was lost has the same bytes
    assert {file for file, time in times.items() if file.stat().st_mtime_ns != time} == {gone}
    assert after.pictures == before.pictures
    assert (tmp_path / "evaluation" / "base" / "short" / "scores.jsonl").read_text() == kept


def test_pictures_that_were_made_with_something_else_are_not_taken(setting, tmp_path):
    run(setting, tmp_path)
    first = pictures(tmp_path)
    expected = (
        r"base/short were made with other settings: guidance 3\.5 then and 2\.0 now; "
        r".*--config\.run_name.*--remake"
    )
    with pytest.raises(ValueError, match=expected):
        run(setting, tmp_path, evaluate__sample__guidance_scale=2.0)
    assert pictures(tmp_path) == first
    run(setting, tmp_path, evaluate__sample__guidance_scale=2.0, remake=True)
    assert not set(pictures(tmp_path).values()) & set(first.values())
    with pytest.raises(ValueError, match=r"seed 0 then and 1 now"):
        run(setting, tmp_path, evaluate__sample__guidance_scale=2.0, seed=1)


def test_older_pictures_are_square_and_of_first_order(tmp_path):
    (tmp_path / "00000.png").touch()
    (tmp_path / "manifest.json").write_text(json.dumps({"seed": 0, "resolution": 64, "steps": 2}))
    now = {"seed": 0, "width": 64, "height": 64, "steps": 2, "tuned_steps": 2, "solver": "euler"}
    prepare_folder(tmp_path, now, remake=False)
    with pytest.raises(ValueError, match=r"other settings: solver 'euler' then and 'dpm2' now;"):
        prepare_folder(tmp_path, {**now, "solver": "dpm2"}, remake=False)


@pytest.mark.slow
def test_a_tuned_transformer_may_take_the_first_steps_alone(whole, setting, tmp_path):
    """The base model takes the second of two steps. It and an unchanged copy make its pictures."""
    model = golden_model()
    weights = model.trainable.init(model, jax.random.key(0))
    for name, factor in (("copy", 1.0), ("tuned", 1.1)):
        own = jax.tree.map(lambda leaf, factor=factor: factor * leaf, weights)
        model.trainable.save(model, setting.root / name, own)
    models = [str(setting.root / name) for name in ("copy", "tuned")]
    entries = {"models": models, "base": False}

    half = {"evaluate__sample__tuned_share": 0.5}
    run(setting, tmp_path / "half", entries=entries, **half)
    run(setting, tmp_path / "all", entries=entries)
    base = pixels(whole[0])
    assert apart(pixels(tmp_path / "half", "copy"), base)[0] <= 1
    hybrid = pixels(tmp_path / "half", "tuned")
    assert apart(hybrid, base)[0] > 1
    assert apart(hybrid, pixels(tmp_path / "all", "tuned"))[0] > 1
    with pytest.raises(ValueError, match="tuned_steps 2 then and 1 now"):
        run(setting, tmp_path / "all", entries=entries, **half)


@pytest.mark.parametrize("content", [None, '{"seed": 0', "[]"])
def test_pictures_without_a_whole_manifest_are_not_taken(tmp_path, content):
    picture = tmp_path / "00000.png"
    picture.touch()
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json is missing or damaged.*--remake"):
        prepare_folder(tmp_path, {"seed": 0}, remake=False)
    prepare_folder(tmp_path, {"seed": 0}, remake=True)
    assert not picture.exists()


@pytest.mark.parametrize(
    "line", ['{"sha256": "a"}', "[1]", '{"sha256":1,"prompt":2,"key":3,"score":null}']
)
def test_a_damaged_score_is_named(tmp_path, line):
    file = tmp_path / "scores.jsonl"
    file.write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"scores\.jsonl, line 1, is not a score \("):
        ScoreStore(file, {})


def test_loras_share_one_program_with_the_base(whole, setting, tmp_path, caplog):
    loras = [str(setting.root / f"lora_{i}") for i in range(2)]
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        found = run(setting, tmp_path, entries={"loras": loras})
    assert len(re.findall(r"Compiling jit\(pictures\)", caplog.text)) == 1
    assert [entry.name for entry in found.entries] == ["base", "lora_0", "lora_1"]
    base, one, other = (pixels(tmp_path, name) for name in ("base", "lora_0", "lora_1"))
    assert apart(base, pixels(whole[0]))[0] <= 1
    assert min(apart(base, one)[1], apart(base, other)[1], apart(one, other)[1]) > 0.1
    manifests = [
        json.loads(file.read_text()) for file in sorted(tmp_path.rglob("short/manifest.json"))
    ]
    assert len({one["lora"] for one in manifests}) == 3
    assert len({one["weights"] for one in manifests}) == 1


class Counting:
    """A reward that remembers the pictures of its calls, and fails where it is told to."""

    def __init__(self):
        self.calls, self.fails = [], False

    def __call__(self, images, prompts):
        if self.fails and len(self.calls) == 2:
            raise RuntimeError("no more")
        self.calls.append(len(images))
        return images.float().mean((1, 2, 3)) + len(prompts)


def counting():
    """A reward that counts, and what makes it under any name."""
    reward = Counting()
    return reward, lambda name, device, options: reward


def test_a_score_that_is_no_number_names_picture_and_reward(setting, tmp_path):
    def broken(images, prompts):
        return torch.tensor([1.0, torch.nan, 1.0])

    entries = {"pictures": [str(found_folder(tmp_path))], "base": False}
    message = r"'mean' returned nan .*; found, short: .*00001\.png$"
    with pytest.raises(ScoringError, match=message) as raised:
        run(
            setting,
            tmp_path / "run",
            entries=entries,
            rewards=lambda *_: broken,
            evaluate__scores=("mean",),
        )
    assert isinstance(raised.value.__cause__, RewardError)


def test_nothing_is_scored_twice(setting, tmp_path):
    reward, rewards = counting()
    changes = {"evaluate__scores": ("mean",), "evaluate__batch_size": 2, "rewards": rewards}
    entries = {"pictures": [str(found_folder(tmp_path))], "base": False}
    first = run(setting, tmp_path / "run", entries=entries, **changes)
    assert reward.calls == [2, 1, 2, 1]
    again = run(setting, tmp_path / "run", entries=entries, **changes)
    assert reward.calls == [2, 1, 2, 1]
    assert again.pictures == first.pictures
    Image.new("RGB", (64, 64)).save(tmp_path / "found" / "00001.png")
    changed = run(setting, tmp_path / "run", entries=entries, **changes)
    assert reward.calls[4:] == [2, 2]  # its batch as a whole, in either set
    same = [(a, b) for a, b in zip(first.pictures, changed.pictures, strict=True) if a.line != 1]
    assert all(a == b for a, b in same)
    assert [one.scores["mean"] for one in changed.pictures if one.line == 1] == [2.0, 2.0]
    more = run(
        setting,
        tmp_path / "run",
        entries=entries,
        **changes | {"evaluate__scores": ("mean", "other")},
    )
    assert reward.calls[6:] == [2, 1, 2, 1]  # the new one alone
    assert all(one.scores.keys() == {"mean", "other"} for one in more.pictures)


def test_what_was_scored_before_a_reward_failed_is_kept(setting, tmp_path):
    reward, rewards = counting()
    changes = {"evaluate__scores": ("mean",), "evaluate__batch_size": 1, "rewards": rewards}
    entries = {"pictures": [str(found_folder(tmp_path))], "base": False}
    reward.fails = True
    with pytest.raises(ScoringError, match=r"'mean' failed 2 times.*no more"):
        run(setting, tmp_path / "run", entries=entries, **changes)
    kept = tmp_path / "run" / "evaluation" / "found" / "short" / "scores.jsonl"
    assert len(kept.read_text().splitlines()) == 2
    kept.write_text(kept.read_text() + '{"file": "0000')  # a kill in the middle of a line
    reward.fails = False
    found = run(setting, tmp_path / "run", entries=entries, **changes)
    assert reward.calls == [1] * 6  # two of them before
    assert len(found.pictures) == 6
    assert len([json.loads(line) for line in kept.read_text().splitlines()]) == 3


def test_two_evaluations_score_alike(whole, setting, tmp_path):
    _, first = whole
    again = run(setting, tmp_path)
    assert [one.scores for one in again.pictures] == [one.scores for one in first.pictures]
    copies = {"pictures": [f"copy={whole[0] / 'evaluation' / 'base'}"]}
    found = run(setting, tmp_path, entries=copies)
    assert not found.problems
    own, copied = (
        [one.scores for one in found.pictures if one.entry == name] for name in ("base", "copy")
    )
    assert own == copied  # the same files, as they are found and as they are made


def test_what_is_wrong_with_found_pictures_is_named_and_counted(setting, tmp_path):
    folder = found_folder(tmp_path, lines=1)
    whole = (folder / "00000.png").read_bytes()
    (folder / "00001.png").write_bytes(whole[: len(whole) // 2])  # cut off
    Image.new("RGB", (48, 32), "red").save(folder / "00002.jpg")
    Image.new("RGB", (64, 64)).save(folder / "00003.png")  # there is no line 3
    Image.new("RGB", (64, 64)).save(folder / "cover.png")
    photographs = tmp_path / "photographs"
    for name in ("short", "long"):
        (photographs / name).mkdir(parents=True)
        Image.new("L", (64, 64), 100).save(photographs / name / "00000.webp", lossless=True)
        Image.new("RGB", (64, 64)).save(photographs / name / "00000_1.png")
    (photographs / "long" / "00001.jpeg").write_bytes(b"")
    entries = {"pictures": [f"tool={folder}"], "photographs": str(photographs), "base": False}
    found = run(setting, tmp_path / "run", entries=entries)
    problems = sorted((one.entry, one.set, one.file.name, one.kind) for one in found.problems)
    assert problems == [
        ("photographs", "long", "00001.jpeg", "unreadable"),
        ("photographs", "long", "00002.png", "missing"),
        ("photographs", "short", "00001.png", "missing"),
        ("photographs", "short", "00002.png", "missing"),
        ("tool", "long", "00001.png", "unreadable"),
        ("tool", "long", "00002.jpg", "other size"),
        ("tool", "long", "00003.png", "extra"),
        ("tool", "long", "cover.png", "extra"),
        ("tool", "short", "00001.png", "unreadable"),
        ("tool", "short", "00002.jpg", "other size"),
        ("tool", "short", "00003.png", "extra"),
        ("tool", "short", "cover.png", "extra"),
    ]
    assert any(one.detail == "48 x 32 pixels; expected 64 x 64" for one in found.problems)
    scored = [(one.entry, one.set, one.line, one.copy, one.width) for one in found.pictures]
    assert scored == [
        *(
            (("tool", name, line, 0, width))
            for name in ("short", "long")
            for line, width in ((0, 64), (2, 48))
        ),
        *((("photographs", name, 0, copy, 64)) for name in ("short", "long") for copy in (0, 1)),
    ]
    write_scores(tmp_path / "scores.csv", found)
    with (tmp_path / "scores.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(found.pictures)
    row = next(
        row for row in table if (row["entry"], row["set"], row["line"]) == ("tool", "long", "2")
    )
    assert (row["category"], row["prompt"], row["file"]) == ("b", LONG[2], "found/00002.jpg")
    assert float(row["embedded_detector"]) == pytest.approx(
        found.pictures[3].scores["embedded_detector"], rel=1e-8
    )


def test_a_folder_without_pictures_is_an_error_before_anything_is_made(setting, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("x")
    with pytest.raises(
        ValueError, match=r"empty holds no picture of 'empty'.*00000\.png to 00002\.png"
    ):
        run(setting, tmp_path / "run", entries={"pictures": [str(empty)]})
    assert not (tmp_path / "run").exists()
    folder = found_folder(tmp_path)
    Image.new("RGB", (64, 64)).save(folder / "00001.jpg")
    with pytest.raises(
        ValueError, match=r"00001\.jpg and .*00001\.png are both picture 0 of line 1"
    ):
        run(setting, tmp_path / "run", entries={"pictures": [str(folder)]})
    assert not (tmp_path / "run").exists()


def test_rewrites_are_drawn_and_scored_against_the_prompts(whole, setting, tmp_path):
    """The rewriter turns each short prompt into the long one of its line."""
    rewriter = tmp_path / "one" / "rewriter"
    rewriter.mkdir(parents=True)
    (rewriter / "rewriter.json").write_text("{}")
    calls, scored = [], []

    def rewrite(source, prompts, folder):
        calls.append((source, list(prompts), folder.relative_to(tmp_path / "run").as_posix()))
        return LONG

    def rewards(name, device, options):
        reward = make_reward(name, device, options)

        def recorded(images, prompts):
            scored.extend(prompts)
            return reward(images, prompts)

        return recorded

    entries = {"rewriters": [f"A={rewriter}"]}
    found = run(setting, tmp_path / "run", entries=entries, rewards=rewards, rewrite=rewrite,
                only_short=True)  # fmt: skip
    assert calls == [(str(rewriter), SHORT, "evaluation/A/short-texts")]
    assert set(scored) == set(SHORT)
    assert [(one.entry, one.set) for one in found.pictures] == [
        (entry, "short") for entry in ("base", "A") for _ in range(6)
    ]
    made = pictures(whole[0])
    for name, data in pictures(tmp_path / "run", "A").items():
        assert data == made[name.replace("short", "long")]

    # Other rewrites are other pictures.
    with pytest.raises(
        ValueError, match=r"pictures in .*A/short were made with other settings: pro"
    ):
        run(setting, tmp_path / "run", entries=entries, rewrite=lambda *_: LONG[::-1],
            only_short=True)  # fmt: skip
