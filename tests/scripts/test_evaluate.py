"""RealBench's pictures and scores: what is made, found, kept and counted."""

import csv
import json
import logging
import re
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from PIL import Image
from rich.console import Console

from realgen_jax.data import read_categorised
from realgen_jax.nn.convert import transformer_config
from realgen_jax.nn.lora import LoraConfig, init_lora, save_lora
from realgen_jax.text_cache import TextCache
from tests.helpers import golden_config
from tests.helpers.goldens import PIPELINE
from tests.helpers.running import ROOT, begin, call, command, until

torch = pytest.importorskip("torch")

from reward_bridge.bridge import RewardError  # noqa: E402

EMBEDDED = ROOT / "realgen_jax" / "embedded"
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
    """The golden pipeline on three scenes of 2 pictures: config, made-up embeddings, two LoRAs of one rank."""
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
    config.sample.eval_num_steps, config.mesh.data = 2, 1
    model, rng = transformer_config(PIPELINE / "transformer"), np.random.default_rng(0)
    (root / "text").mkdir()
    cache = TextCache(root / "text", list(dict.fromkeys([*SHORT, *LONG])))
    sizes = {"t5": (16, model.joint_attention_dim), "clip": (model.pooled_projection_dim,)}
    cache.append(
        {
            name: rng.normal(size=(len(cache.prompts), *size)).astype(np.float32)
            for name, size in sizes.items()
        }
    )
    lora = LoraConfig(rank=2, alpha=4.0)
    for seed in range(2):
        adapters = jax.tree.map(lambda a: a + 0.1, init_lora(model, lora, jax.random.key(seed)))
        save_lora(root / f"lora_{seed}" / "pytorch_lora_weights.safetensors", adapters, lora)
    return SimpleNamespace(config=config, cache=cache, root=root)


def run(setting, folder, *, seed=0, remake=False, entries=None, **changes):
    """An evaluation in `folder`; changes are keys of the config with __ for the dots. The base alone by default."""
    from realgen_jax.realbench.benchmark import evaluate
    from realgen_jax.realbench.entries import read_entries
    from realgen_jax.realbench.prompts import read_sets

    config = setting.config.copy_and_resolve_references()
    config.update_from_flattened_dict(
        {key.replace("__", "."): value for key, value in changes.items()}
    )
    named = {"loras": [], "models": [], "pictures": [], "photographs": None, "base": True} | (
        entries or {}
    )
    found, sets = read_entries(config.pretrained, **named), read_sets(config.evaluate.prompts)
    options = {"seed": seed, "remake": remake, "console": Console(), "cache": setting.cache}
    return evaluate(config, found, sets, folder, encode=[], **options)


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
    """Of the same pictures, the largest difference in levels, and the largest picture's mean difference."""
    assert one.keys() == other.keys()
    gaps = [np.abs(one[name] - other[name]) for name in one]
    return max(gap.max() for gap in gaps), max(gap.mean() for gap in gaps)


@pytest.fixture(scope="module")
def whole(setting, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run(setting, folder)


def test_the_embedded_prompts_are_pairs_of_the_same_subject():
    from reward_bridge.rewards.embedded import EmbeddedPromptAccuracy

    label, sets = EmbeddedPromptAccuracy("cpu").label, {}
    for name in ("short", "long"):
        sets[name] = read_categorised(EMBEDDED / f"realbench_{name}.jsonl")
        labels = [label(prompt) for prompt, _ in sets[name]]
        assert sorted(labels) == sorted([*range(16)] * 2)
        assert len({prompt for prompt, _ in sets[name]}) == 32
    for (short, category), (long, same) in zip(sets["short"], sets["long"], strict=True):
        assert label(short) == label(long)
        assert len(short) < len(long)
        assert category == same != ""


def test_sets_must_have_as_many_lines_as_each_other(tmp_path):
    from realgen_jax.realbench.prompts import read_sets

    (tmp_path / "a.txt").write_text("a boat on a lake\nsnow\n")
    (tmp_path / "b.jsonl").write_text(
        '{"prompt": "a boat", "category": "scenes"}\n{"prompt": "x"}\n'
    )
    files = {"a": tmp_path / "a.txt", "b": tmp_path / "b.jsonl"}
    short, long = read_sets(files)
    assert (short.name, short.prompts, short.categories) == ("b", ("a boat", "x"), ("scenes", ""))
    assert (long.name, long.categories) == ("a", ("", ""))
    (tmp_path / "a.txt").write_text("one\n")
    with pytest.raises(ValueError, match=r"has 1 prompts .*a\.txt.* has 2 .*b\.jsonl"):
        read_sets(files)
    (tmp_path / "b.jsonl").write_text('{"prompt": "a boat", "category": 3}\n')
    with pytest.raises(ValueError, match=r"line 1 has 3 under \"category\""):
        read_sets(files)
    with pytest.raises(ValueError, match="'a/b'"):
        read_sets({"a/b": tmp_path / "a.txt"})


def test_entries_have_names_of_their_own(tmp_path):
    from realgen_jax.realbench.entries import read_entries, weights_of

    config = golden_config.get_config().pretrained
    for name in (
        "runs/one/lora",
        "runs/one/best",
        "x=1/two",
        "runs/full/lora/transformer",
        "arena",
    ):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs/full/lora/transformer/config.json").write_text("{}")

    def names(*loras, models=(), base=True):
        found = read_entries(config, [str(word) for word in loras], models, [], None, base)
        return [entry.name for entry in found]

    one, best = tmp_path / "runs/one/lora", tmp_path / "runs/one/best"
    assert names(one, best, tmp_path / "x=1/two") == ["base", "one", "one-best", "two"]
    assert names(f"mine={one}", base=False) == ["mine"]
    with pytest.raises(ValueError, match=r"'one' names several entries .*tell them apart"):
        names(one, one)
    with pytest.raises(ValueError, match="'arena' cannot name an entry"):
        names(tmp_path / "arena")
    with pytest.raises(FileNotFoundError, match="named as lora 'none'"):
        names(f"none={tmp_path / 'nothing'}")
    with pytest.raises(ValueError, match="nothing to evaluate"):
        names(base=False)
    full = str(tmp_path / "runs/full/lora")
    base, other = read_entries(config, [], [full], [], None, True)
    assert other.name == "full"
    assert weights_of(other, config).transformer == f"{full}/transformer"
    assert weights_of(base, config).model == config.model


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
    expected = r"base/short were made with something else: guidance 3\.5 then and 2\.0 now; .*--config\.run_name.*--remake"
    with pytest.raises(ValueError, match=expected):
        run(setting, tmp_path, sample__guidance_scale=2.0)
    assert pictures(tmp_path) == first
    run(setting, tmp_path, sample__guidance_scale=2.0, remake=True)
    assert not set(pictures(tmp_path).values()) & set(first.values())
    with pytest.raises(ValueError, match=r"seed 0 then and 1 now"):
        run(setting, tmp_path, sample__guidance_scale=2.0, seed=1)


def test_loras_share_one_program_with_the_base(whole, setting, tmp_path, caplog):
    loras = [str(setting.root / f"lora_{i}") for i in range(2)]
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        found = run(setting, tmp_path, entries={"loras": loras})
    assert len(re.findall(r"Compiling jit\(run\)", caplog.text)) == 1
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


def counting(monkeypatch):
    from realgen_jax.realbench import benchmark

    reward = Counting()
    monkeypatch.setattr(benchmark, "make_reward", lambda name, device, options: reward)
    monkeypatch.setattr(benchmark, "missing_rewards", lambda reward, names: [])
    return reward


def test_a_score_that_is_no_number_names_picture_and_reward(setting, tmp_path, monkeypatch):
    counting(monkeypatch)
    monkeypatch.setattr(
        Counting, "__call__", lambda self, images, prompts: torch.tensor([1.0, torch.nan, 1.0])
    )
    entries = {"pictures": [str(found_folder(tmp_path))], "base": False}
    with pytest.raises(RewardError, match=r"'mean' returned nan .*; found, short: .*00001\.png$"):
        run(setting, tmp_path / "run", entries=entries, evaluate__scores=("mean",))


def found_folder(tmp_path, lines=3):
    """Pictures as another tool leaves them, for both sets."""
    folder, rng = tmp_path / "found", np.random.default_rng(0)
    folder.mkdir()
    for line in range(lines):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{line:05}.png")
    return folder


def test_nothing_is_scored_twice(setting, tmp_path, monkeypatch):
    reward, changes = (
        counting(monkeypatch),
        {"evaluate__scores": ("mean",), "evaluate__batch_size": 2},
    )
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


def test_what_was_scored_before_a_reward_failed_is_kept(setting, tmp_path, monkeypatch):
    reward, changes = (
        counting(monkeypatch),
        {"evaluate__scores": ("mean",), "evaluate__batch_size": 1},
    )
    entries = {"pictures": [str(found_folder(tmp_path))], "base": False}
    reward.fails = True
    with pytest.raises(RewardError, match=r"'mean' failed 2 times.*no more"):
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
    problems = sorted((one.entry, one.set, one.file.name, one.what) for one in found.problems)
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
    from realgen_jax.realbench.report import write_scores

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


def test_pictures_are_read_upright_opaque_and_in_eight_bits(tmp_path):
    from realgen_jax.realbench.pictures import decode

    def saved(image, name, **options):
        image.save(tmp_path / name, **options)
        return decode((tmp_path / name).read_bytes())

    half = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    half.putpixel((1, 0), (0, 0, 0, 0))
    np.testing.assert_array_equal(saved(half, "a.png")[:, 0], [[0, 255]] * 3)  # transparent: white
    np.testing.assert_array_equal(saved(Image.new("L", (1, 1), 7), "b.png"), np.full((3, 1, 1), 7))
    deep = Image.fromarray(np.array([[0, 257 * 200]], np.uint16))
    np.testing.assert_array_equal(saved(deep, "c.png")[:, 0], [[0, 200]] * 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert saved(Image.new("RGB", (6, 4)), "d.png", exif=exif).shape == (3, 6, 4)
    with pytest.raises(ValueError, match="cannot identify"):
        decode(b"no picture")


@pytest.fixture
def words(tmp_path):
    """What evaluate.py is called with: two sets of four prompts, one reward."""
    prompts = ROOT / "tests" / "data" / "train.txt"
    words = [
        f"--config.run_root={tmp_path}",
        "--config.run_name=run",
        "--config.evaluate.batch_size=2",
    ]
    words += [f"--config.evaluate.prompts.{name}={prompts}" for name in ("short", "long")]
    words += [
        "--config.evaluate.scores=('embedded_detector',)",
        "--config.evaluate.detectors=('embedded_detector',)",
    ]
    return [*words, "--config.evaluate.resamples=100"]


def rows_of_scores(folder):
    with (folder / "report" / "scores.csv").open(newline="") as file:
        return len(list(csv.DictReader(file)))


def test_evaluate_py_as_a_user_calls_it(cache, tmp_path, words):
    found = found_folder(tmp_path, lines=4)
    done = call(
        "evaluate.py",
        cache,
        *words,
        "--judge=embedded",
        "--nobase",
        f"--pictures={found}",
        f"--pictures=b={found}",
    )
    assert done.returncode == 0, done.stderr
    assert "found against b: wins 50.0 % " in done.stdout
    assert done.stdout.splitlines()[-1] == f"report: {tmp_path}/run/report/index.html"
    assert '<section id="arena">' in (tmp_path / "run" / "report" / "index.html").read_text()
    assert rows_of_scores(tmp_path / "run") == 16


@pytest.mark.slow
def test_evaluate_py_goes_on_after_a_kill(cache, tmp_path, words):
    folder, output = tmp_path / "run", tmp_path / "output.txt"
    done = call("evaluate.py", cache, *words, "--judge=embedded")
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        == "error: the arena compares entries, and there is only ['base']; name another one"
    )
    assert not folder.exists()
    made = lambda: list((folder / "evaluation").rglob("*.png"))  # noqa: E731
    program = begin(
        command("evaluate.py", cache, *words, "--config.evaluate.images_per_prompt=100"), output
    )
    until(lambda: len(made()) > 3, program, output)
    program.send_signal(signal.SIGKILL)
    program.wait()
    times = {file: file.stat().st_mtime_ns for file in made()}
    done = call("evaluate.py", cache, *words, "--config.evaluate.images_per_prompt=2")
    assert done.returncode == 0, done.stderr
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    assert not [
        file for file in folder.rglob("*") if file.suffix == ".png" and not file.stat().st_size
    ]
    assert rows_of_scores(folder) == 16
