"""The data of the report's page: prompts with their scores, and the embedded pictures."""

import base64
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from realgen_jax.input_files import read_image
from realgen_jax.realbench.results import Judgement, Results, ScoredPicture

SIDE = 384  # pixels; the longest side of an embedded picture
LOSSLESS = 128  # pixels; smaller pictures are stored losslessly, as every pixel is visible
SHOWN = 8  # number of gains, losses, best and worst pictures, each
REPLY = 600  # maximum characters of a judge's reply
Item = tuple[str, int, int]  # set, line, copy
Group = dict[str, Any]  # an entry's pictures at both ends of a scale: "most" and "least"


def main_measure(results: Results, settings: ConfigDict) -> str:
    """Return the reward used to order pictures: the first detector, or else the first reward."""
    for name in results.rewards:
        if name in settings.detectors:
            return name
    return results.rewards[0]


def by_item(results: Results) -> dict[Item, dict[str, ScoredPicture]]:
    """Return {(set, line, copy): {entry: its picture}}."""
    items: dict[Item, dict[str, ScoredPicture]] = defaultdict(dict)
    for picture in results.pictures:
        items[picture.set, picture.line, picture.copy][picture.entry] = picture
    return items


def pairs(
    results: Results, items: Mapping[Item, Mapping[str, ScoredPicture]], measure: str
) -> list[Group]:
    """Return each generated entry's largest gains and losses against the first entry.

    Only generated pictures start from the same noise, so the result is empty if the first entry is
    not generated.
    """
    first, *others = results.entries
    if not first.is_generated:
        return []
    groups = []
    for other in others:
        if not other.is_generated:
            continue
        changes = {}
        for item, pictures in items.items():
            if first.name in pictures and other.name in pictures:
                before = pictures[first.name].scores[measure]
                changes[item] = pictures[other.name].scores[measure] - before
        if changes:
            gains = sum(change > 0 for change in changes.values())
            group = {"entry": other.name, "pairs": len(changes), "gains": gains}
            groups.append(group | _ends(changes))
    return groups


def extremes(results: Results, measure: str) -> list[Group]:
    """Return each entry's pictures with the highest and the lowest scores."""
    groups = []
    for entry in results.entries:
        scores = {}
        for picture in results.pictures:
            if picture.entry == entry.name:
                scores[picture.set, picture.line, picture.copy] = picture.scores[measure]
        if len(scores) > 1:
            groups.append({"entry": entry.name} | _ends(scores))
    return groups


def _ends(values: Mapping[Item, float]) -> dict[str, list[Item]]:
    """The items with the largest and the smallest values.

    At most one item per prompt and half of the prompts, so that no item is at both ends.
    """
    ascending = sorted(values, key=lambda item: values[item])
    least = _first_of_each_prompt(ascending)
    most = _first_of_each_prompt(ascending[::-1])
    count = min(SHOWN, -(-len(most) // 2))
    return {
        "most": sorted(most, key=lambda item: -values[item])[:count],
        "least": sorted(least, key=lambda item: values[item])[:count],
    }


def _first_of_each_prompt(items: Sequence[Item]) -> list[Item]:
    """The first item of each set and line, in the reverse order of `items`."""
    first = {}
    for item in reversed(items):
        first[item[:2]] = item
    return list(first.values())


def embedded_items(results: Results, settings: ConfigDict, groups: Sequence[Group]) -> set[Item]:
    """Return the items whose pictures are embedded in the page.

    These are the first copies of evenly spaced lines, and everything in `groups`.
    """
    lines = max((len(prompt_set.prompts) for prompt_set in results.sets), default=0)
    count = min(settings.report_prompts, lines)
    items = set()
    for line in np.linspace(0, lines - 1, count).round().astype(int):
        for prompt_set in results.sets:
            items.add((prompt_set.name, int(line), 0))
    for group in groups:
        items.update(group["most"])
        items.update(group["least"])
    return items


def thumbnail(file: Path) -> str:
    """Return a picture, as the rewards saw it, as a WebP data URL; at most SIDE pixels per side."""
    image = read_image(file.read_bytes())
    lossless = max(image.size) <= LOSSLESS
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "WEBP", lossless=lossless, quality=80, method=4)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def embed(pictures: Sequence[ScoredPicture]) -> tuple[dict[str, int], list[str]]:
    """Return ({sha256: index}, data URLs). Files with the same content are stored once."""
    files = {picture.sha256: picture.file for picture in pictures}
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(thumbnail, files.values()))
    return {sha256: i for i, sha256 in enumerate(files)}, images


def page_data(
    folder: Path, results: Results, settings: ConfigDict, judgements: Sequence[Judgement]
) -> tuple[dict[str, Any], list[str]]:
    """Return the data for the page's script, and the data URLs that it refers to by index.

    folder: the run's folder; picture files are named relative to it.
    """
    # -- Choose what to show, and embed its pictures.
    measure = main_measure(results, settings)
    items = by_item(results)
    pair_groups = pairs(results, items, measure)
    extreme_groups = extremes(results, measure)
    chosen = embedded_items(results, settings, [*pair_groups, *extreme_groups])
    pictures = []
    for item in sorted(chosen):
        pictures += items.get(item, {}).values()
    index, images = embed(pictures)

    # -- Prompts with their pictures and answers.
    prompts = list(_Prompts(folder, results, chosen, index, judgements))
    place = {(prompt["set"], prompt["line"]): i for i, prompt in enumerate(prompts)}
    entry_index = {entry.name: i for i, entry in enumerate(results.entries)}

    def refer(group: Group) -> Group:
        """The group with prompts and entry by index, as the page knows them."""
        references = {"entry": entry_index[group["entry"]]}
        for side in ("most", "least"):
            references[side] = [(place[item[:2]], item[2]) for item in group[side]]
        return group | references

    data = {
        "entries": list(entry_index),
        "rewards": list(results.rewards),
        "main": list(results.rewards).index(measure),
        "prompts": prompts,
        "pairs": [refer(group) for group in pair_groups],
        "extremes": [refer(group) for group in extreme_groups],
    }
    return data, images


class _Prompts:
    """Iterates over all prompts in the format of the page's script."""

    def __init__(
        self,
        folder: Path,
        results: Results,
        chosen: set[Item],
        index: Mapping[str, int],
        judgements: Sequence[Judgement],
    ):
        """chosen: items whose pictures are embedded; index: {sha256: index of the image}."""
        self.folder = folder
        self.results = results
        self.chosen = chosen
        self.index = index
        self.entry_index = {entry.name: i for i, entry in enumerate(results.entries)}

        self.pictures: dict[tuple[str, int], list[ScoredPicture]] = defaultdict(list)
        for picture in results.pictures:
            self.pictures[picture.set, picture.line].append(picture)
        self.answers = defaultdict(list)
        for judgement in judgements:
            answer = [
                self.entry_index[judgement.first],
                self.entry_index[judgement.second],
                judgement.verdict,
                judgement.reply[:REPLY],
            ]
            self.answers[judgement.set, judgement.line].append(answer)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for prompt_set in self.results.sets:
            for line, text in enumerate(prompt_set.prompts):
                key = prompt_set.name, line
                pictures = sorted(
                    self.pictures.get(key, []),
                    key=lambda picture: (picture.copy, self.entry_index[picture.entry]),
                )
                yield {
                    "set": prompt_set.name,
                    "line": line,
                    "text": text,
                    "category": prompt_set.categories[line],
                    "pictures": [self._describe(picture) for picture in pictures],
                    "answers": self.answers.get(key, []),
                }

    def _describe(self, picture: ScoredPicture) -> list[Any]:
        """A picture in the format of report.js, which fixes the order of these values."""
        image = -1
        if (picture.set, picture.line, picture.copy) in self.chosen:
            image = self.index[picture.sha256]
        file = picture.file.name
        if picture.file.is_relative_to(self.folder):
            file = str(picture.file.relative_to(self.folder))
        return [
            self.entry_index[picture.entry],
            picture.copy,
            image,
            picture.width,
            picture.height,
            file,
            [round(float(picture.scores[name]), 4) for name in self.results.rewards],
        ]
