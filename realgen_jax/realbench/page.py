"""What the report's page is filled with: prompts with their scores, and the pictures that are inside it."""

import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from realgen_jax.realbench.pictures import data_url, read_image
from realgen_jax.realbench.results import Evaluated, Judgement, Scored

SIDE = 384  # pixels of a picture inside the page, at most
LOSSLESS = (
    128  # up to this side a picture is kept as it is: little to gain, and every pixel is looked at
)
SHOWN = 8  # gains, losses, best, worst
REPLY = 600  # characters of a judge's reply
Item = tuple[str, int, int]  # set, line, copy

GENERATED = ("model", "lora")  # kinds of entries whose pictures start from the same noise


def main_measure(evaluated: Evaluated, settings: ConfigDict) -> str:
    """The reward by which pictures are put in order: the first detector, else the first reward."""
    return next(
        (name for name in evaluated.rewards if name in settings.detectors), evaluated.rewards[0]
    )


def by_item(evaluated: Evaluated) -> dict[Item, dict[str, Scored]]:
    """Every entry's picture of a set, line and copy."""
    found: dict[Item, dict[str, Scored]] = defaultdict(dict)
    for picture in evaluated.pictures:
        found[picture.set, picture.line, picture.copy][picture.entry] = picture
    return found


def pairs(
    evaluated: Evaluated, items: Mapping[Item, Mapping[str, Scored]], measure: str
) -> list[dict[str, Any]]:
    """The largest gains and losses of each generated entry against the first, where that is generated too."""
    first, *others = evaluated.entries
    if first.kind not in GENERATED:
        return []
    found = []
    for other in others:
        if other.kind in GENERATED:
            change = {
                item: of[other.name].scores[measure] - of[first.name].scores[measure]
                for item, of in items.items()
                if first.name in of and other.name in of
            }
            gains = sum(value > 0 for value in change.values())
            if change:
                found.append(
                    {"entry": other.name, "pairs": len(change), "gains": gains, **_ends(change)}
                )
    return found


def extremes(evaluated: Evaluated, measure: str) -> list[dict[str, Any]]:
    """Each entry's pictures that score highest and lowest."""
    found = []
    for entry in evaluated.entries:
        own = {
            (p.set, p.line, p.copy): p.scores[measure]
            for p in evaluated.pictures
            if p.entry == entry.name
        }
        if len(own) > 1:
            found.append({"entry": entry.name, **_ends(own)})
    return found


def _ends(values: Mapping[Item, float]) -> dict[str, list[Item]]:
    """The items of the largest and of the smallest values: one a prompt, and of half of the prompts at most."""
    up = sorted(values, key=lambda item: values[item])
    least, most = (
        {item[:2]: item for item in reversed(order)} for order in (up, up[::-1])
    )  # the first one stays
    count = min(SHOWN, -(-len(most) // 2))
    return {
        "most": sorted(most.values(), key=lambda item: -values[item])[:count],
        "least": sorted(least.values(), key=lambda item: values[item])[:count],
    }


def inside(
    evaluated: Evaluated, settings: ConfigDict, shown: Sequence[Mapping[str, Any]]
) -> set[Item]:
    """The items whose pictures are embedded: the first copy of lines spread evenly, and all that is in `shown`."""
    lines = max((len(one.prompts) for one in evaluated.sets), default=0)
    spread = np.linspace(0, lines - 1, min(settings.report_prompts, lines)).round().astype(int)
    found = {(one.name, int(line), 0) for one in evaluated.sets for line in spread}
    return found.union(*(group[side] for group in shown for side in ("most", "least")))


def thumbnail(file: Path) -> str:
    """A picture as WebP in a data URL, at most SIDE pixels a side, as the rewards saw it."""
    small = read_image(file.read_bytes())
    lossless = max(small.size) <= LOSSLESS
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", lossless=lossless, quality=80, method=4)
    return data_url(buffer.getvalue(), "webp")


def embed(pictures: Sequence[Scored]) -> tuple[dict[str, int], list[str]]:
    """({sha256: place}, data URLs); files that are equal are one."""
    files = {picture.sha256: picture.file for picture in pictures}
    with ThreadPoolExecutor() as pool:
        return {sha256: i for i, sha256 in enumerate(files)}, list(
            pool.map(thumbnail, files.values())
        )


def page_data(
    folder: Path, evaluated: Evaluated, settings: ConfigDict, judgements: Sequence[Judgement]
) -> tuple[dict[str, Any], list[str]]:
    """(what the page's script reads, data URLs that it refers to by their place)."""
    measure, items = main_measure(evaluated, settings), by_item(evaluated)
    groups = pairs(evaluated, items, measure), extremes(evaluated, measure)
    chosen = inside(evaluated, settings, [*groups[0], *groups[1]])
    places, images = embed([p for item in sorted(chosen) for p in items.get(item, {}).values()])
    entry = {one.name: i for i, one in enumerate(evaluated.entries)}

    def described(picture: Scored) -> list[Any]:
        shown = (picture.set, picture.line, picture.copy) in chosen
        file = (
            picture.file.relative_to(folder)
            if picture.file.is_relative_to(folder)
            else picture.file.name
        )
        scores = [round(float(picture.scores[name]), 4) for name in evaluated.rewards]
        place = places[picture.sha256] if shown else -1
        return [
            entry[picture.entry],
            picture.copy,
            place,
            picture.width,
            picture.height,
            str(file),
            scores,
        ]

    answers = defaultdict(list)
    for one in judgements:
        answers[one.set, one.line].append(
            [entry[one.first], entry[one.second], one.verdict, one.reply[:REPLY]]
        )
    prompts = list(_prompts(evaluated, described, answers))
    place = {(prompt["set"], prompt["line"]): i for i, prompt in enumerate(prompts)}

    def referred(group: Mapping[str, Any]) -> dict[str, Any]:
        lists = {
            side: [(place[item[:2]], item[2]) for item in group[side]] for side in ("most", "least")
        }
        return {**group, **lists, "entry": entry[group["entry"]]}

    data = {
        "entries": [one.name for one in evaluated.entries],
        "rewards": list(evaluated.rewards),
        "main": list(evaluated.rewards).index(measure),
        "prompts": prompts,
        "pairs": [referred(group) for group in groups[0]],
        "extremes": [referred(group) for group in groups[1]],
    }
    return data, images


def _prompts(evaluated: Evaluated, described: Any, answers: Mapping) -> Iterator[dict[str, Any]]:
    def line(picture: Scored) -> tuple[str, int]:
        return picture.set, picture.line

    pictures = {
        key: list(group) for key, group in groupby(sorted(evaluated.pictures, key=line), line)
    }
    order = {one.name: i for i, one in enumerate(evaluated.entries)}
    for one in evaluated.sets:
        for i, (text, category) in enumerate(zip(one.prompts, one.categories, strict=True)):
            own = sorted(pictures.get((one.name, i), ()), key=lambda p: (p.copy, order[p.entry]))
            row = {"set": one.name, "line": i, "text": text, "category": category}
            yield {
                **row,
                "pictures": [described(p) for p in own],
                "answers": answers.get((one.name, i), []),
            }
