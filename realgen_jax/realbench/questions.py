"""The arena's questions: how each protocol asks a judge and parses its reply."""

import hashlib
import io
import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from realgen_jax.input_files import read_image
from realgen_jax.realbench.results import Entry, Results, ScoredPicture

VERDICTS = ("first", "second", "tie", "refused", "unreadable")
CRITERIA = (
    "Look at hands and faces (anatomy, skin, teeth, eyes), at patterns that repeat where nature or "
    "use would vary them, at lighting and shadows (one consistent light, plausible reflections), "
    "at edges (halos, things that melt into each other), and at the overall style (a photograph's "
    "texture and noise, or a rendering's smooth finish)."
)


def read_realgen(reply: str) -> str | None:
    """Parse a verdict as RealGen's code does: by substring, checking image 1 before image 2."""
    text = reply.lower()
    if "more realistic image: image 1" in text:
        return "first"
    if "more realistic image: image 2" in text:
        return "second"
    return None


def read_balanced(reply: str) -> str | None:
    """Parse a verdict from the last line, which must have the requested form.

    Only Markdown emphasis is ignored.
    """
    lines = [line.strip() for line in reply.replace("*", "").replace("`", "").split("\n")]
    lines = [line for line in lines if line]
    if not lines:
        return None
    match = re.fullmatch(r"verdict: ?(1|2|tie)\.?", lines[-1], re.IGNORECASE)
    if match is None:
        return None
    return {"1": "first", "2": "second", "tie": "tie"}[match[1].lower()]


def _read_nothing(reply: str) -> str | None:
    """Return None: a person gives no textual reply."""
    return None


@dataclass(frozen=True)
class Protocol:
    """How two pictures are compared."""

    name: str
    text: str  # the question; its wording affects verdicts, so any change needs a new name
    image_format: str  # PNG or JPEG
    both_orders: bool  # ask about each pair twice, once with each picture first
    random_order: bool  # show each pair once, with a random picture first
    pairs: str | None  # which entries meet; None: as set in the config
    read: Callable[[str], str | None]  # a reply -> first, second, tie or None


# RealGen, benchmark/eval_vs_real.py: the tested model is always image 1, the photograph image 2.
REALGEN = Protocol(
    name="realgen",
    text="Of these two pictures, Image 1 and Image 2, which one looks more like a real photograph? "
    f"{CRITERIA}\nChoose one of them and answer with these two lines:\n"
    "More Realistic Image: Image <1 or 2>\n"
    "Reason: <what decided it, in a few words>",
    image_format="JPEG",
    both_orders=False,
    random_order=False,
    pairs="photographs",
    read=read_realgen,
)

# Ours: both orders, lossless pictures, and the judge may answer that it sees no difference.
BALANCED = Protocol(
    name="balanced",
    text="You are shown two pictures, first picture 1, then picture 2. Which one looks more like a "
    f"photograph that a camera took? {CRITERIA} What the pictures show, how well they are composed "
    "and how pretty they are does not count, nor does the order in which you see them.\n"
    "Say briefly what you see, then end with one line that holds nothing but your verdict, 1, 2, "
    "or tie if neither looks more real than the other:\n"
    "Verdict: <1, 2 or tie>",
    image_format="PNG",
    both_orders=True,
    random_order=False,
    pairs=None,
    read=read_balanced,
)

# A person sees every pair once, in random order.
HUMAN = Protocol(
    name="human",
    text="",
    image_format="PNG",
    both_orders=False,
    random_order=True,
    pairs=None,
    read=_read_nothing,
)

PROTOCOLS = {protocol.name: protocol for protocol in (REALGEN, BALANCED, HUMAN)}


@dataclass(frozen=True)
class Question:
    """Two pictures of one prompt, in the order in which they are shown."""

    first: ScoredPicture
    second: ScoredPicture
    prompt: str
    protocol: Protocol

    @property
    def key(self) -> tuple[str, str]:
        """The digests of both files, by which its answer is stored."""
        return self.first.sha256, self.second.sha256

    @property
    def text(self) -> str:
        return self.protocol.text

    @property
    def image_format(self) -> str:
        return self.protocol.image_format

    def read(self, reply: str) -> str | None:
        return self.protocol.read(reply)

    def picture(self, position: str) -> bytes:
        """Return the file of the "first" or "second" picture in the protocol's format.

        Raises ValueError if the picture has changed since it was scored.
        """
        picture = {"first": self.first, "second": self.second}[position]
        return encode_picture(picture, self.image_format)


def make_questions(
    results: Results, settings: Any, protocol: Protocol, seed: int
) -> tuple[list[Question], Counter[str]]:
    """Return all questions, and the number of prompts skipped for a missing picture, by reason.

    settings: config.evaluate.arena. Prompts are in random order, so that the first questions are a
    fair sample. Raises ValueError if the entries that should meet do not exist.
    """
    pairs = entry_pairs(results.entries, protocol.pairs or settings.pairs)
    pictures = {}
    for picture in results.pictures:
        if picture.copy == 0:
            pictures[picture.entry, picture.set, picture.line] = picture

    # -- The prompts of every set, shuffled.
    rng = np.random.default_rng(seed)
    lines = []
    for prompt_set in results.sets:
        for line in spread(len(prompt_set.prompts), settings.prompts):
            lines.append((prompt_set, line))
    shuffled = [lines[i] for i in rng.permutation(len(lines))]

    # -- One or two questions for each pair.
    questions = []
    incomplete = Counter()
    for prompt_set, line in shuffled:
        for a, b in pairs:
            first = pictures.get((a, prompt_set.name, line))
            second = pictures.get((b, prompt_set.name, line))
            if first is None or second is None:
                reason = f"of {prompt_set.name!r} without a picture of both {a} and {b}"
                incomplete[reason] += 1
                continue
            if protocol.random_order and rng.integers(2):
                first, second = second, first
            prompt = prompt_set.prompts[line]
            questions.append(Question(first, second, prompt, protocol))
            if protocol.both_orders:
                questions.append(Question(second, first, prompt, protocol))

    # A person who sees a prompt's pairs in a row can tell which picture they have in common.
    if protocol.random_order:
        questions = [questions[i] for i in rng.permutation(len(questions))]
    return questions, incomplete


def entry_pairs(entries: Sequence[Entry], pairs: str) -> list[tuple[str, str]]:
    """Return the pairs of entries that meet.

    pairs: "all"; "photographs", every other entry against each entry of photographs; or "first",
    the first entry against each other entry. Raises ValueError if there is no such pair.
    """
    names = [entry.name for entry in entries]
    photographs = [entry.name for entry in entries if entry.kind == "photographs"]
    if len(names) < 2:
        raise ValueError(
            f"the arena compares entries, but there is only {names[0]!r}; add another entry"
        )

    if pairs == "all":
        return list(itertools.combinations(names, 2))
    if pairs == "first":
        return [(names[0], name) for name in names[1:]]
    if not photographs:
        raise ValueError(
            "the arena compares entries with photographs, but there are none among "
            f"{', '.join(names)}; add --photographs=FOLDER, or set "
            "config.evaluate.arena.protocol='balanced' and pairs='all'"
        )
    others = [name for name in names if name not in photographs]
    return [(name, photograph) for photograph in photographs for name in others]


def spread(lines: int, most: int) -> list[int]:
    """Return `most` line numbers, evenly spaced; all of them if `most` is 0."""
    count = min(most, lines) if most else lines
    return [i * lines // count for i in range(count)]


def encode_picture(picture: ScoredPicture, image_format: str) -> bytes:
    """Return the picture as a PNG or JPEG file without metadata.

    Raises ValueError if the file has changed since it was scored, or cannot be read.
    """
    try:
        content = picture.file.read_bytes()
    except OSError as error:
        raise ValueError(f"{picture.file}: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != picture.sha256:
        raise ValueError(f"{picture.file} has changed since it was scored; score it again")

    image = read_image(content)
    image.info.clear()
    options = {"compress_level": 1} if image_format == "PNG" else {}
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()
