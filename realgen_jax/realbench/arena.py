"""Arena-Scoring: a judge is shown two pictures of one prompt and says which looks more like a photograph."""

import asyncio
import contextlib
import hashlib
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
from rich.console import Console

from realgen_jax.realbench.pictures import data_url, read_image
from realgen_jax.realbench.progress import bars
from realgen_jax.realbench.results import Entry, Evaluated, Judgement, Scored
from reward_bridge.judges.api import Endpoint, Message, ask_all, endpoint_from_environment

STAND_IN = "embedded_held_out"  # the reward that judges where the judge is "embedded"
VERDICTS = ("first", "second", "tie", "refused", "unreadable")
CRITERIA = (
    "Look at hands and faces (anatomy, skin, teeth, eyes), at patterns that repeat where nature or use would vary "
    "them, at lighting and shadows (one consistent light, plausible reflections), at edges (halos, things that melt "
    "into each other), and at the overall style (a photograph's texture and noise, or a rendering's smooth finish)."
)


@dataclass(frozen=True)
class Question:
    """Two pictures, in the order in which they are shown."""

    first: Scored
    second: Scored

    @property
    def key(self) -> tuple[str, str]:
        return self.first.sha256, self.second.sha256


def read_realgen(reply: str) -> str | None:
    """As RealGen's code reads it: by what the reply contains, image 1 before image 2."""
    text = reply.lower()
    if "more realistic image: image 1" in text:
        return "first"
    return "second" if "more realistic image: image 2" in text else None


def read_balanced(reply: str) -> str | None:
    """The last line must be the verdict that was demanded; only Markdown's emphasis is forgiven."""
    lines = reply.replace("*", "").replace("`", "").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    found = re.fullmatch(r"verdict: ?(1|2|tie)\.?", last, re.IGNORECASE)
    return {"1": "first", "2": "second", "tie": "tie"}[found[1].lower()] if found else None


PROTOCOLS = {
    # RealGen, benchmark/eval_vs_real.py: the tested model is always image 1, the photograph image 2
    "realgen": {
        "question": "Of these two pictures, Image 1 and Image 2, which one looks more like a real photograph? "
        f"{CRITERIA}\nChoose one of them and answer with these two lines:\n"
        "More Realistic Image: Image <1 or 2>\n"
        "Reason: <what decided it, in a few words>",
        "format": "JPEG",
        "both_orders": False,
        "against": "photographs",
        "read": read_realgen,
    },
    # ours: both orders, nothing lost on the way to the judge, and it may say that it sees no difference
    "balanced": {
        "question": "You are shown two pictures, first picture 1, then picture 2. Which one looks more like a "
        f"photograph that a camera took? {CRITERIA} What the pictures show, how well they are composed and how pretty "
        "they are does not count, nor does the order in which you see them.\n"
        "Say briefly what you see, then end with one line that holds nothing but your verdict, 1, 2, or tie if neither "
        "looks more real than the other:\n"
        "Verdict: <1, 2 or tie>",
        "format": "PNG",
        "both_orders": True,
        "against": None,
        "read": read_balanced,
    },
    # a person at the page of realbench/human.py, who sees every pair once, in random order
    "human": {"format": "PNG", "both_orders": False, "against": None},
}


def judge_and_protocol(judge: str, settings) -> tuple[str, str]:
    """What judgements are kept and told under: (the judging model's name, a key of PROTOCOLS). Errors: ValueError."""
    if judge == "human":
        return "human", "human"
    if settings.protocol not in ("realgen", "balanced"):
        raise ValueError(
            f"config.evaluate.arena.protocol is {settings.protocol!r}; expected balanced or realgen"
        )
    if min(settings.concurrency, settings.attempts, settings.max_failures) < 1:
        raise ValueError(
            "config.evaluate.arena: concurrency, attempts and max_failures are 1 or more"
        )
    if judge not in ("embedded", "api"):
        raise ValueError(f"there is no judge {judge!r}; choose embedded, api or human")
    return STAND_IN if judge == "embedded" else endpoint_from_environment().model, settings.protocol


def check_arena(entries: Sequence[Entry], settings, judge: str) -> None:
    """Raises ValueError for what would stop the arena once all pictures are made: settings, environment, entries."""
    _, protocol = judge_and_protocol(judge, settings)
    entry_pairs(entries, PROTOCOLS[protocol]["against"] or settings.pairs)


def judge_all(
    evaluated: Evaluated, settings, judge: str, folder: Path, seed: int, say: Callable[[str], None]
) -> list[Judgement]:
    """Every pair's judgements, as far as the judge gave them; only what `folder` does not hold yet is asked for.

    `settings` is config.evaluate.arena. Raises ValueError for settings that ask for what is not there.
    """
    name, protocol = judge_and_protocol(judge, settings)
    rules = PROTOCOLS[protocol]
    asked, lacking = questions(evaluated, settings, protocol, seed)
    for text, n in lacking.items():
        say(f"arena: {n} prompts {text} are left out")
    file = store_file(folder, name, protocol)
    known = load(file)
    if protocol == "human":
        from reward_bridge.judges.human import judge_by_hand

        left = [q for q in asked if judgement_of(q, known, protocol) is None]
        if left:
            with appending(file) as append:
                judge_by_hand(evaluated, left, len(asked), append, settings.port, say)
            known = load(file)
    else:
        todo = list({q.key: q for q in asked if q.key not in known}.values())
        if todo:
            with _endpoint(judge) as endpoint, appending(file) as append, bars(Console()) as bar:
                step = bar(f"{name} judges", len(todo), "questions")

                def keep(question: Question, verdict: str, reply: str) -> None:
                    known[question.key] = append(question, verdict, reply)
                    step(1)

                outcome = asyncio.run(
                    ask_all(endpoint, todo, _message_by(rules), rules["read"], settings, keep)
                )
            for reason, n in outcome.failures.most_common(5):
                say(f"arena: {n} questions came to nothing: {reason}")
            if outcome.stopped:
                say(f"WARNING: arena: {name} is left alone: {outcome.stopped}")
    judgements = [found for q in asked if (found := judgement_of(q, known, protocol)) is not None]
    if len(judgements) < len(asked):
        orders = 2 if rules["both_orders"] else 1
        answered = Counter((j.set, j.line, frozenset((j.first, j.second))) for j in judgements)
        whole = sum(n == orders for n in answered.values())
        say(
            f"WARNING: arena: {name} has judged {whole} of {len(asked) // orders} pairs"
            f"{' in both orders' if orders == 2 else ''}; the same command goes on from there"
        )
    return judgements


def questions(
    evaluated: Evaluated, settings, protocol: str, seed: int
) -> tuple[list[Question], Counter[str]]:
    """What is to be asked, prompts in random order, and how many prompts of which sets and pairs lack a picture."""
    rules = PROTOCOLS[protocol]
    pairs = entry_pairs(evaluated.entries, rules["against"] or settings.pairs)
    pictures = {(p.entry, p.set, p.line): p for p in evaluated.pictures if p.copy == 0}
    rng = np.random.default_rng(seed)
    made, lacking = [], Counter()
    lines = [
        (one.name, line)
        for one in evaluated.sets
        for line in spread(len(one.prompts), settings.prompts)
    ]
    for i in rng.permutation(len(lines)):
        name, line = lines[i]
        for pair in pairs:
            first, second = (pictures.get((entry, name, line)) for entry in pair)
            if first is None or second is None:
                lacking[f"of {name!r} without a picture of both {pair[0]} and {pair[1]}"] += 1
                continue
            made.append(Question(first, second))
            if rules["both_orders"]:
                made.append(Question(second, first))
            elif protocol == "human" and rng.integers(2):
                made[-1] = Question(second, first)
    if (
        protocol == "human"
    ):  # whoever sees a prompt's pairs one after the other can tell whose picture they share
        made = [made[i] for i in rng.permutation(len(made))]
    return made, lacking


def entry_pairs(entries: Sequence[Entry], which: str) -> list[tuple[str, str]]:
    """The entries that meet: all, photographs (each other entry with these), first (the first one with each other)."""
    names = [entry.name for entry in entries]
    real = [entry.name for entry in entries if entry.kind == "photographs"]
    if len(names) < 2:
        raise ValueError(f"the arena compares entries, and there is only {names}; name another one")
    if which == "photographs" and not real:
        raise ValueError(
            f"the arena's entries are to meet photographs, and {', '.join(names)} are none; add a folder of "
            "photographs, or take config.evaluate.arena.protocol='balanced' with pairs='all'"
        )
    chosen = {
        "all": lambda: list(itertools.combinations(names, 2)),
        "photographs": lambda: [
            (name, photo) for photo in real for name in names if name not in real
        ],
        "first": lambda: [(names[0], name) for name in names[1:]],
    }
    if which not in chosen:
        raise ValueError(
            f"config.evaluate.arena.pairs is {which!r}; expected one of {', '.join(chosen)}"
        )
    return chosen[which]()


def spread(lines: int, most: int) -> list[int]:
    """`most` of the line numbers, evenly; all of them where that is 0."""
    n = min(most, lines) if most else lines
    return [i * lines // n for i in range(n)]


def judgement_of(
    question: Question, known: Mapping[tuple[str, str], Mapping], protocol: str
) -> Judgement | None:
    """What the judge said, if it did. A person's verdict counts whichever of the two was shown first."""
    first, second = question.first, question.second
    found = known.get(question.key)
    if found is None and protocol == "human":
        first, second = second, first
        found = known.get((first.sha256, second.sha256))
    if found is None:
        return None
    return Judgement(
        first.set, first.line, first.entry, second.entry, found["verdict"], found["reply"]
    )


def store_file(folder: Path, name: str, protocol: str) -> Path:
    safe = re.sub(r"^\.+", lambda dots: "%2E" * len(dots[0]), quote(name, safe=""))
    return folder / safe / f"{protocol}.jsonl"


def load(file: Path) -> dict[tuple[str, str], Mapping]:
    """{digests of both pictures: what was answered last}. Cuts off a last line that a full stop left unfinished."""
    if not file.exists():
        return {}
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with file.open("r+b") as opened:
            opened.truncate(len(whole))
    known = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
            key = record["first_sha256"], record["second_sha256"]
            verdict, _ = record["verdict"], record["reply"]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{file}, line {number}, is no judgement ({error!r}); remove that line"
            ) from None
        if verdict in VERDICTS:
            known[key] = record
        else:  # taken back
            known.pop(key, None)
    return known


@contextlib.contextmanager
def appending(file: Path) -> Iterator[Callable[[Question, str, str], Mapping]]:
    """A function that writes one answer, which is on its way to the disk when it returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as opened:

        def append(question: Question, verdict: str, reply: str) -> Mapping:
            first, second = question.first, question.second
            record = {
                "set": first.set,
                "line": first.line,
                "first": first.entry,
                "second": second.entry,
                "verdict": verdict,
                "reply": reply,
                "first_sha256": first.sha256,
                "second_sha256": second.sha256,
            }
            opened.write(json.dumps(record) + "\n")
            opened.flush()
            return record

        yield append


def encode(picture: Scored, format: str) -> bytes:
    """The picture alone, without what else its file may tell. Raises ValueError where it is not what was scored."""
    try:
        content = picture.file.read_bytes()
    except OSError as error:
        raise ValueError(f"{picture.file}: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != picture.sha256:
        raise ValueError(f"{picture.file} has changed since it was scored; score it again")
    image, file = read_image(content), io.BytesIO()
    image.info.clear()
    image.save(file, format, **({"compress_level": 1} if format == "PNG" else {}))
    return file.getvalue()


def _message_by(rules: Mapping) -> Callable[[Question], Message]:
    def message(question: Question) -> Message:
        pictures = question.first, question.second
        urls = [
            data_url(encode(picture, rules["format"]), rules["format"].lower())
            for picture in pictures
        ]
        text = {"type": "text", "text": rules["question"]}
        return [text, *({"type": "image_url", "image_url": {"url": url}} for url in urls)]

    return message


@contextlib.contextmanager
def _endpoint(judge: str) -> Iterator[Endpoint]:
    if judge == "api":
        yield endpoint_from_environment()
        return
    from reward_bridge.judges.stand_in import serving

    with serving(STAND_IN) as address:
        yield Endpoint(STAND_IN, address, "")
