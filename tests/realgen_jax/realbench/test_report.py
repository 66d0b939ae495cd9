"""The leaderboard against numbers worked out by hand, and the report's page in a browser."""

import csv
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from realgen_configs.flux_grpo import get_config
from realgen_jax.realbench.aggregate import leaderboard
from realgen_jax.realbench.formatting import NOTHING
from realgen_jax.realbench.plots import curves
from realgen_jax.realbench.report import write_report
from realgen_jax.realbench.results import (
    Entry,
    Judgement,
    Problem,
    PromptSet,
    Results,
    ScoredPicture,
)
from realgen_jax.realbench.standings import standings
from realgen_jax.realbench.summarize import print_leaderboard, print_matches
from tests.helpers.browser import browser, console_errors

REWARDS = ("detector", "score")
NASTY = 'a cat </script><script>throw "out"</script> & <b>a "dog"</b>'


def scored(entry, set, line, copy, *scores, file=Path("x.png")):
    sha256 = hashlib.sha256(f"{entry}{set}{line}{copy}".encode()).hexdigest()
    return ScoredPicture(
        entry, set, line, copy, file, sha256, 64, 64, dict(zip(REWARDS, scores, strict=True))
    )


def settings(**changed):
    config = get_config().unlock()
    config.evaluate.detectors = ("detector",)
    config.evaluate.scores = REWARDS
    config.evaluate.update(changed)
    return config


def rows_of(pictures, prompts=4, sets=("short",), categories=None, entries="ab", seed=0, **changed):
    every = [PromptSet(name, ["p"] * prompts, categories or [""] * prompts) for name in sets]
    entries = [Entry(name, "model", name) for name in entries]
    evaluated = Results(every, entries, REWARDS, pictures, [])
    return leaderboard(evaluated, settings(**changed).evaluate, np.random.default_rng(seed))


def one(rows, **wanted):
    wanted = {"set": "short", "category": "", "measure": "detector", "kind": "mean", **wanted}
    (found,) = [
        row for row in rows if all(getattr(row, key) == value for key, value in wanted.items())
    ]
    return found


BY_HAND = [
    scored("a", "short", 0, 0, 0.2, 1.0),
    scored("a", "short", 0, 1, 0.4, 3.0),
    scored("a", "short", 1, 0, 0.9, 5.0),
    scored("b", "short", 0, 0, 0.7, 2.0),
    scored("b", "short", 1, 0, 0.5, 4.0),
    scored("b", "short", 1, 1, 0.6, 9.0),
    scored("b", "short", 2, 0, 1.0, 8.0),
]


def test_means_are_over_pictures_and_differences_over_prompts_that_both_have():
    rows = rows_of(BY_HAND)
    a, b = one(rows, entry="a"), one(rows, entry="b")
    assert (a.value, a.pictures, a.prompts) == (pytest.approx(0.5), 3, 2)
    assert (b.value, b.pictures, b.prompts) == (pytest.approx(0.7), 4, 3)
    # line 0: 0.7 - 0.3, line 1: 0.55 - 0.9; line 2 is b's alone
    assert b.difference == pytest.approx((0.4 - 0.35) / 2)
    assert np.isnan([a.difference, a.difference_low, a.difference_high]).all()
    assert one(rows, entry="b", measure="score").value == pytest.approx(23 / 4)
    share = one(rows, entry="b", kind="share above 0.5")  # 0.5 itself is not above
    assert (share.value, share.difference) == (0.75, pytest.approx((1 + (0.5 - 1)) / 2))
    assert not [row for row in rows if row.measure == "score" and row.kind != "mean"]


def test_categories_and_sets_together():
    both = [
        *BY_HAND,
        *(replace(p, set="long", scores={"detector": 0.0, "score": 0.0}) for p in BY_HAND),
    ]
    rows = rows_of(both, sets=("short", "long"), categories=["cat", "dog", "", "bird"])
    cat = one(rows, entry="a", category="cat")
    assert (cat.value, cat.pictures, cat.prompts) == (pytest.approx(0.3), 2, 1)
    assert np.isnan([cat.low, cat.high]).all()  # of one prompt
    none = one(rows, entry="a", category="bird")
    assert np.isnan(none.value)
    assert (none.pictures, none.prompts) == (0, 0)
    every = one(rows, entry="a", set="all")
    assert (every.value, every.pictures, every.prompts) == (pytest.approx(0.25), 6, 4)
    assert one(rows, entry="b", set="all").difference == pytest.approx(0.025 / 2)
    assert not [row for row in rows_of(BY_HAND) if row.set == "all"]


def test_a_missing_picture_shrinks_the_counts_and_moves_the_mean():
    row = one(rows_of(BY_HAND[1:]), entry="a")
    assert (row.value, row.pictures, row.prompts) == (pytest.approx(0.65), 2, 2)
    row = one(rows_of([p for p in BY_HAND if p.entry == "b"]), entry="a")
    assert np.isnan([row.value, row.low, row.high]).all()
    assert (row.pictures, row.prompts) == (0, 0)


def test_intervals_are_those_of_normal_theory_and_copies_count_once():
    rng = np.random.default_rng(3)
    scores = (rng.random((2, 800)) < 0.3).astype(float)
    single = [
        scored("ab"[e], "short", i, 0, scores[e, i], 0.0) for e in range(2) for i in range(800)
    ]
    copies = [replace(p, copy=c) for p in single for c in range(4)]
    found = [rows_of(p, prompts=800, resamples=6000) for p in (single, copies)]
    for rows in found:
        row = one(rows, entry="a")
        half = 1.96 * scores[0].std() / np.sqrt(800)
        assert (row.low, row.high) == (
            pytest.approx(row.value - half, abs=0.002),
            pytest.approx(row.value + half, abs=0.002),
        )
        row = one(rows, entry="b")
        gap = scores[1] - scores[0]
        half = 1.96 * gap.std() / np.sqrt(800)
        assert row.difference == pytest.approx(gap.mean())
        assert row.difference_low == pytest.approx(gap.mean() - half, abs=0.003)
        assert row.difference_high == pytest.approx(gap.mean() + half, abs=0.003)
    narrow = one(rows_of(single, prompts=800, resamples=6000, confidence=0.5), entry="a")
    assert narrow.high - narrow.value == pytest.approx(
        0.6745 * scores[0].std() / np.sqrt(800), abs=0.002
    )


def test_two_variants_of_a_prompt_are_drawn_together():
    values = np.random.default_rng(4).random(300)
    pictures = [scored("a", s, i, 0, values[i], 0.0) for s in ("short", "long") for i in range(300)]
    rows = rows_of(pictures, prompts=300, sets=("short", "long"), entries="a")
    short, every = one(rows, entry="a"), one(rows, entry="a", set="all")
    assert (every.value, every.low, every.high) == pytest.approx(
        (short.value, short.low, short.high)
    )


def test_rows_repeat_and_do_not_depend_on_the_other_entries():
    assert str(rows_of(BY_HAND)) == str(rows_of(BY_HAND))  # str: nan is nan
    many = [scored("a", "short", i, 0, i * i, 0.0) for i in range(30)]
    assert str(rows_of(many, prompts=30)) != str(rows_of(many, prompts=30, seed=1))
    more = [*BY_HAND, *(replace(p, entry="c") for p in BY_HAND if p.entry == "a")]
    rows = rows_of(more, entries="abc")
    assert str([row for row in rows if row.entry != "c"]) == str(rows_of(BY_HAND))


def picture(file, colour, size=(64, 64)):
    y, x = np.mgrid[: size[1], : size[0]]
    pixels = np.stack([x * 3 % 256, y * 3 % 256, np.full_like(x, colour % 256)], axis=2).astype(
        np.uint8
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def evaluation(folder, lines=40, copies=2):
    """Two models and photographs on two sets of prompts; one picture is missing."""
    rng = np.random.default_rng(0)
    sets = [
        PromptSet(
            name,
            [f"{name} prompt {i} of a {'red' if i % 3 else 'blue'} thing" for i in range(lines)],
            c,
        )
        for name, c in (
            ("short", ["animal", "people"] * (lines // 2)),
            ("long", ["animal", "people"] * (lines // 2)),
        )
    ]
    sets[0].prompts[0] = NASTY
    entries = [Entry("base", "model", "flux_tiny"), Entry("<i>tuned</i>", "lora", "runs/x/lora")]
    entries.append(Entry("photographs", "photographs", "photos"))
    pictures, seen = [], 0
    for e, entry in enumerate(entries):
        for one_set in sets:
            for line in range(lines):
                for copy in range(copies if e < 2 else 1):
                    if (e, one_set.name, line, copy) == (1, "short", 5, 0):
                        continue
                    file = (
                        folder / "pictures" / f"entry{e}" / one_set.name / f"{line:05}_{copy}.png"
                    )
                    size = (80, 48) if (e, line) == (2, 7) else (64, 64)
                    sha256, seen = picture(file, seen, size), seen + 1
                    scores = np.clip(rng.normal(0.3 + 0.2 * e, 0.15, 2), 0, 1)
                    scores = dict(zip(REWARDS, map(float, scores), strict=True))
                    pictures.append(
                        ScoredPicture(
                            entry.name, one_set.name, line, copy, file, sha256, *size, scores
                        )
                    )
    problems = [
        Problem(
            "<i>tuned</i>",
            "short",
            folder / "00005_0.png",
            "missing",
            "the folder has no such file",
        ),
        Problem(
            "<i>tuned</i>",
            "short",
            folder / "cover.png",
            "extra",
            "expected 00000.png to 00039.png",
        ),
        Problem("photographs", "short", folder / "00007.png", "other size", "80x48"),
        Problem("photographs", "long", folder / "00007.png", "other size", "80x48"),
    ]
    return Results(sets, entries, REWARDS, pictures, problems)


def arena():
    match = {
        "losses": 10,
        "ties": 4,
        "refused": 1,
        "unreadable": 2,
        "incomplete": 3,
        "low": 0.6,
        "high": 0.8,
    }
    names = [("<i>tuned</i>", "base"), ("<i>tuned</i>", "photographs"), ("base", "photographs")]
    matches = [
        SimpleNamespace(a=a, b=b, wins=26, pairs=40, win_rate=0.7, **match) for a, b in names
    ]
    ratings = [("photographs", 1100.0), ("<i>tuned</i>", 1000.0), ("base", 900.0)]
    ratings = [
        SimpleNamespace(entry=name, rating=r, low=r - 40, high=r + 40) for name, r in ratings
    ]
    counts = {"questions": 240, "refused": 3}
    return SimpleNamespace(
        judge="stand-in",
        protocol="balanced",
        matches=matches,
        ratings=ratings,
        first_share=(0.55, 0.5, 0.6),
        counts=counts,
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = settings(report_prompts=10, resamples=200)
    config.reward.fn = {"detector": 1.0}
    config.reward.held_out, config.reward.metrics = ("score",), ()
    rows = [{"kind": "train", "epoch": i, "reward/detector": 0.3 + i / 100} for i in range(1, 9)]
    rows += [
        {"kind": "eval", "epoch": i, "detector": 0.3 + i / 90, "score": 0.5} for i in (0, 4, 8)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluated = evaluation(folder)
    board = leaderboard(evaluated, config.evaluate, np.random.default_rng(0))
    judgements = [
        Judgement(
            "short", 0, "base", "photographs", "second", "Image 2 </script>, its light is better"
        )
    ]
    page = write_report(folder, config, evaluated, board, arena(), judgements, seed=7)
    return SimpleNamespace(folder=folder, config=config, evaluated=evaluated, rows=board, page=page)


def test_tables_are_the_rows(report):
    with (report.page.parent / "leaderboard.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert (
        len(lines) == len(report.rows) == 3 * 3 * 3 * 3
    )  # sets and all, categories and all, measures, entries
    for line, row in zip(lines, report.rows, strict=True):
        for key, value in vars(row).items():
            assert line[key] == ("" if value != value else str(value))
    text = (report.page.parent / "report.md").read_text()
    tuned = one(report.rows, entry="<i>tuned</i>")
    assert f"{tuned.value:.3f} [{tuned.low:.3f}, {tuned.high:.3f}]; +{tuned.difference:.3f}" in text
    assert "| <i>tuned</i> | short | 79 | 40 of 40 | 1 | 0 | 0 | 1 |" in text
    assert "- Seed: 7\n" in text
    assert "- <i>tuned</i>, short: 00005_0.png missing (the folder has no such file)" in text
    assert (
        "| <i>tuned</i> against base | 70.0 % [60.0 %, 80.0 %] | 26 | 10 | 4 | 40 | 1 | 2 | 3 |"
        in text
    )
    assert "chosen in 55.0 % [50.0 %, 60.0 %]" in text


def test_scores_table(report):
    with (report.page.parent / "scores.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(report.evaluated.pictures) == 40 * 2 * 5 - 1
    first = report.evaluated.pictures[0]
    expected = {
        "entry": "base",
        "set": "short",
        "line": "0",
        "copy": "0",
        "category": "animal",
        "prompt": NASTY,
    }
    expected |= {"file": "../pictures/entry0/short/00000_0.png", "width": "64", "height": "64"}
    assert lines[0] == expected | {name: str(first.scores[name]) for name in REWARDS}


def test_the_page_asks_for_nothing_and_escapes_what_it_is_given(report):
    text = report.page.read_text()
    assert 'throw "out"</script>' not in text
    assert "<i>tuned</i>" not in text
    own = re.sub(r"<script>\s*/\*\*\s*\* plotly\.js.*?</script>", "", text, flags=re.DOTALL)
    assert len(own) < len(text) - 1_000_000
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!#|data:)|url\(|@import|fetch\(""", own)


def test_watched_rewards_have_curves(tmp_path):
    """Under their own names in training; those that are held out too have test prompts as well."""
    rows = [{"kind": "train", "epoch": i, "diversity": 0.1, "other": 0.2} for i in (1, 2)]
    rows += [{"kind": "eval", "epoch": i, "other": 0.3} for i in (0, 1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings()
    config.reward.fn = {"detector": 1.0}
    config.reward.held_out, config.reward.watched = ("other",), ("diversity", "other", "detector")
    config.reward.metrics = ()
    found = curves(tmp_path, config)
    assert [(curve["name"], curve["role"]) for curve in found] == [
        ("other", "held out"),
        ("diversity", "watched"),
    ]
    assert [len(curve["figure"]["data"]) for curve in found] == [2, 1]


def test_figures_of_the_update_have_curves_if_they_are_recorded(tmp_path):
    """A distance of 1e-8 that grows is no constant, whose axis would hide it."""
    figures = {"velocity_norm": 1.1, "kept_share": 0.9, "scout/rank_correlation": 0.5}
    rows = [
        {"kind": "train", "epoch": i, "reward/detector": 0.5, "old_distance": i * 1e-8, **figures}
        for i in (1, 2, 3)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings()
    config.reward.fn = {"detector": 1.0}
    config.reward.held_out, config.reward.watched, config.reward.metrics = (), (), ()
    found = {curve["name"]: curve["figure"] for curve in curves(tmp_path, config)}
    assert list(found) == [
        "detector",
        "velocity norm",
        "distance to the old policy",
        "kept share",
        "previews and pictures",
    ]
    assert "range" not in found["distance to the old policy"]["layout"]["yaxis"]
    assert found["velocity norm"]["layout"]["yaxis"]["range"] == pytest.approx([1.05, 1.15])


def test_without_arena_run_or_a_second_entry(report, tmp_path):
    only = replace(
        report.evaluated,
        sets=[replace(report.evaluated.sets[0], categories=[""] * 40)],
        entries=report.evaluated.entries[:1],
        pictures=[p for p in report.evaluated.pictures if (p.entry, p.set) == ("base", "short")],
        problems=[],
    )
    rows = leaderboard(only, report.config.evaluate, np.random.default_rng(0))
    text = write_report(tmp_path, report.config, only, rows, None, [], seed=0).read_text()
    for part in ("arena", "curves", "pairs"):
        assert f'<section id="{part}">' not in text
    assert "No picture is missing" in text
    with pytest.raises(ValueError, match="no picture"):
        write_report(tmp_path, report.config, replace(only, pictures=[]), [], None, [], seed=0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("lines", "resamples"), [(1, 100), (3, 0)])
def test_without_intervals(tmp_path, capsys, lines, resamples):
    """One prompt with one picture, or no resamples."""
    prompts = PromptSet("short", ["a cat"] * lines, [""] * lines)
    entries = [Entry("a", "model", "a"), Entry("b", "lora", "b")]
    pictures = []
    for number, entry in enumerate("ab"):
        for line in range(lines):
            file = tmp_path / f"{entry}{line}.png"
            picture(file, 100 * number + line)
            pictures.append(scored(entry, "short", line, 0, 0.25, 0.5, file=file))
    evaluated = Results([prompts], entries, REWARDS, pictures, [])
    config = settings(resamples=resamples)
    rows = leaderboard(evaluated, config.evaluate, np.random.default_rng(0))
    answers = [Judgement("short", line, "a", "b", "first", "") for line in range(lines)]
    answers += [Judgement("short", line, "b", "a", "second", "") for line in range(lines)]
    table = standings(
        answers, "ab", config.evaluate, np.random.default_rng(0), judge="j", protocol="balanced"
    )
    print_leaderboard(rows, evaluated, Console())
    print_matches(table, Console(markup=False))
    page = write_report(tmp_path, config, evaluated, rows, table, answers, seed=0)

    shown = capsys.readouterr().out
    assert "no interval: that needs pictures of two prompts" in shown
    assert f"a against b: wins 100.0 % of {lines} pairs" in shown
    text = page.with_name("report.md").read_text()
    assert "| a | 1" in text
    assert f"[{NOTHING}, {NOTHING}]" in text
    assert "nan" not in shown + text


@pytest.fixture(scope="module")
def laptop(report):
    with browser(1280, 800) as driver:
        driver.get(report.page.as_uri())
        yield driver


def scroll_through(driver):
    """As a reader would: what is lazy comes into view."""
    height = driver.execute_script(
        "document.documentElement.style.scrollBehavior = 'auto'; return document.body.scrollHeight"
    )
    for y in range(0, height, 600):
        driver.execute_async_script(
            "scrollTo(0, arguments[0]); requestAnimationFrame(() => setTimeout(arguments[1], 30))",
            y,
        )


def test_opens_from_a_file_without_errors_and_all_pictures_load(laptop, report):
    scroll_through(laptop)
    script = "return [...document.images].map(i => [i.src.slice(0, 23), i.naturalWidth])"
    sources = laptop.execute_async_script(
        "const tell = arguments[0]; "
        "Promise.all([...document.images].map(i => i.decode()))"
        ".then(() => tell(true), e => tell(String(e)))"
    )
    assert sources is True
    shown = laptop.execute_script(script)
    assert len(shown) == 16 * 2 + 3 * 16 + 24 * 3  # pairs, best and worst, the list's first prompts
    assert all(source == "data:image/webp;base64," and width in (64, 80) for source, width in shown)
    asked = laptop.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name)"
    )
    assert [name for name in asked if not name.startswith("data:")] == []
    plots = laptop.execute_script(
        "return [...document.querySelectorAll('.chart')]"
        ".filter(c => c.offsetParent).map(c => !!c.querySelector('svg'))"
    )
    assert plots == [True] * (2 + 1 + 2 + 2)  # distributions, categories, curves, arena
    assert console_errors(laptop) == []


def test_sets_and_categories_switch_tables(laptop, report):
    visible = (
        "return [...document.querySelectorAll('.board')].filter(t => t.offsetParent)"
        ".map(t => [t.caption.textContent, t.querySelector('.value').textContent])"
    )
    row = one(report.rows, entry="base", set="all")
    assert laptop.execute_script(visible) == [["Set all, all categories", f"{row.value:.3f}"]]
    laptop.execute_script("scrollTo(0, 0)")
    laptop.find_element("css selector", "[data-pick-set=long]").click()
    laptop.execute_script(
        "const s = document.getElementById('category');"
        "s.value = 'people'; s.dispatchEvent(new Event('change'))"
    )
    row = one(report.rows, entry="base", set="long", category="people")
    assert laptop.execute_script(visible) == [["Set long, people", f"{row.value:.3f}"]]


def test_filter_finds_prompts(laptop):
    count = "return document.querySelectorAll('#list .card').length"
    assert laptop.execute_script(count) == 24  # of 80, and a button for more
    laptop.execute_script("document.getElementById('more').click()")
    assert laptop.execute_script(count) == 48
    field = laptop.find_element("id", "filter")
    field.send_keys("LONG blue")
    assert laptop.execute_script(count) == 14
    assert "14 of 80 prompts" in laptop.find_element("id", "found").text
    laptop.execute_script(
        "const s = document.getElementById('filter-category');"
        "s.value = 'animal'; s.dispatchEvent(new Event('change'))"
    )
    assert laptop.execute_script(count) == 7
    field.send_keys(" nothing like it")
    assert laptop.execute_script(count) == 0


def test_enlarge_and_keyboard(laptop):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(key):
        ActionChains(laptop).send_keys(key).perform()

    is_open = "return document.getElementById('enlarged').open"
    where = "return document.getElementById('enlarged-where').textContent"
    first = laptop.find_element("css selector", "#pairs .card")
    laptop.execute_script(
        "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", first
    )
    first.click()
    assert laptop.execute_script(is_open)
    assert laptop.execute_script(where).startswith("1 of 8")
    sizes = laptop.execute_script(
        "return [...document.querySelectorAll('#enlarged img')]"
        ".map(i => [i.getBoundingClientRect().width, getComputedStyle(i).imageRendering])"
    )
    assert len(sizes) >= 2
    assert all(
        width >= 192 and width % 64 == 0 and rendering == "pixelated" for width, rendering in sizes
    )
    scores = laptop.execute_script(
        "return document.querySelector('#enlarged-scores tbody').rows.length"
    )
    assert scores == len(REWARDS)
    press(Keys.ARROW_RIGHT)
    assert laptop.execute_script(where).startswith("2 of 8")
    press(Keys.ARROW_LEFT)
    press(Keys.ARROW_LEFT)
    assert laptop.execute_script(where).startswith("8 of 8")
    press(Keys.ESCAPE)
    assert not laptop.execute_script(is_open)
    assert laptop.execute_script(
        "return document.activeElement === document.querySelector('#pairs .card')"
    )
    assert console_errors(laptop) == []


def test_what_the_judge_said_and_foreign_text_are_shown_as_text(laptop):
    laptop.execute_script(
        "document.getElementById('filter').value = 'throw';"
        "for (const s of document.querySelectorAll('.filters select')) s.value = '';"
        "search()"
    )
    laptop.execute_script("document.querySelector('#list .card').click()")
    assert laptop.find_element("id", "enlarged-title").text == NASTY
    assert (
        "Image 2 </script>, its light is better"
        in laptop.find_element("id", "enlarged-answers").text
    )
    laptop.execute_script("document.getElementById('enlarged').close()")


def test_a_phone_scrolls_in_one_direction_only(report):
    with browser(390, 844) as driver:
        driver.get(report.page.as_uri())
        scroll_through(driver)
        assert driver.execute_script("return document.documentElement.scrollWidth") == 390
        driver.execute_script("document.querySelector('#list .card').click()")
        width, inside = driver.execute_script(
            "const d = document.getElementById('enlarged'); return [d.clientWidth, d.scrollWidth]"
        )
        assert inside <= width <= 390
        assert console_errors(driver) == []
