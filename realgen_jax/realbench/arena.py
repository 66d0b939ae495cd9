"""Arena scoring: a judge says which of two pictures of a prompt looks more like a photograph."""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from realgen_jax.files import append, drop_incomplete_line, read_jsonl
from realgen_jax.realbench.interfaces import Judge, Keep
from realgen_jax.realbench.questions import (
    HUMAN,
    PROTOCOLS,
    VERDICTS,
    Protocol,
    Question,
    entry_pairs,
    make_questions,
)
from realgen_jax.realbench.results import Entry, Judgement, Results
from realgen_jax.training.progress import plain_console, progress_bars

Answers = dict[tuple[str, str], Mapping[str, Any]]  # digests of both pictures -> stored record


def protocol_for(judge: Judge, settings: Any) -> Protocol:
    """Return the protocol to use for a judge. settings: config.evaluate.arena."""
    return HUMAN if judge.is_person else PROTOCOLS[settings.protocol]


def check_arena(entries: Sequence[Entry], settings: Any, judge: Judge) -> None:
    """Raise ValueError for entries with which the arena would fail later."""
    protocol = protocol_for(judge, settings)
    entry_pairs(entries, protocol.pairs or settings.pairs)


def judge_all(
    results: Results,
    judge: Judge,
    settings: Any,
    folder: Path,
    *,
    seed: int,
    say: Callable[[str], None],
) -> list[Judgement]:
    """Return the judgements of all pairs that the judge answered.

    settings: config.evaluate.arena. Answers are stored in `folder` one by one, and questions with a
    stored answer are not asked again. Raises ValueError for settings that the entries do not allow.
    """
    # -- Make the questions.
    protocol = protocol_for(judge, settings)
    questions, incomplete = make_questions(results, settings, protocol, seed)
    for reason, count in incomplete.items():
        say(f"arena: {count} prompts {reason} are left out")

    # -- Ask the questions without a stored answer.
    file = answers_file(folder, judge.name, protocol)
    answers = load_answers(file)
    remaining = _unanswered(questions, answers)
    if remaining:
        answered = len(questions) - len(remaining)
        with storing_answers(file, answers) as keep, _counting(judge, remaining, keep) as counted:
            judge.compare(remaining, answered=answered, keep=counted, say=say)

    # -- Collect the answers.
    judgements = []
    for question in questions:
        judgement = judgement_of(question, answers)
        if judgement is not None:
            judgements.append(judgement)
    if len(judgements) < len(questions):
        _warn_of_missing(questions, judgements, judge, protocol, say)
    return judgements


def _unanswered(questions: Sequence[Question], answers: Answers) -> list[Question]:
    """The questions without an answer, without duplicates about the same two files.

    A person is asked about every pair, because the page counts pairs.
    """
    remaining = {}
    for i, question in enumerate(questions):
        if judgement_of(question, answers) is None:
            key = i if question.protocol.random_order else question.key
            remaining[key] = question
    return list(remaining.values())


@contextlib.contextmanager
def _counting(judge: Judge, questions: Sequence[Question], keep: Keep) -> Iterator[Keep]:
    """Add a progress bar to `keep`, except for a person, whose page has its own."""
    if judge.is_person:
        yield keep
        return

    with progress_bars(plain_console()) as bars:
        advance = bars(f"{judge.name} judges", len(questions), "questions")

        def keep_and_count(question: Question, verdict: str, reply: str) -> None:
            keep(question, verdict, reply)
            advance(1)

        yield keep_and_count


def _warn_of_missing(
    questions: Sequence[Question],
    judgements: Sequence[Judgement],
    judge: Judge,
    protocol: Protocol,
    say: Callable[[str], None],
) -> None:
    orders = 2 if protocol.both_orders else 1
    answers_of_pair = Counter()
    for judgement in judgements:
        pair = frozenset((judgement.first, judgement.second))
        answers_of_pair[judgement.set, judgement.line, pair] += 1
    complete = sum(count == orders for count in answers_of_pair.values())
    in_orders = " in both orders" if protocol.both_orders else ""
    say(
        f"WARNING: arena: {judge.name} has judged {complete} of {len(questions) // orders} pairs"
        f"{in_orders}; run the same command again to continue"
    )


def judgement_of(question: Question, answers: Answers) -> Judgement | None:
    """Return a question's judgement, or None if it has no answer.

    A person's verdict counts no matter which of the two was shown first.
    """
    first = question.first
    second = question.second
    answer = answers.get((first.sha256, second.sha256))
    if answer is None and question.protocol.random_order:
        first, second = second, first
        answer = answers.get((first.sha256, second.sha256))
    if answer is None:
        return None
    return Judgement(
        set=first.set,
        line=first.line,
        first=first.entry,
        second=second.entry,
        verdict=answer["verdict"],
        reply=answer["reply"],
    )


# --- Stored answers


def answers_file(folder: Path, judge: str, protocol: Protocol) -> Path:
    """Return the file of a judge's answers. The judge's name becomes a safe folder name."""
    quoted = quote(judge, safe="")
    safe = re.sub(r"^\.+", lambda dots: "%2E" * len(dots[0]), quoted)
    return folder / safe / f"{protocol.name}.jsonl"


def load_answers(file: Path) -> Answers:
    """Return the last answer to each pair of files. Raises ValueError, naming a bad line."""
    answers: Answers = {}
    for number, record in enumerate(read_jsonl(file), start=1):
        try:
            key = record["first_sha256"], record["second_sha256"]
            verdict = record["verdict"]
            record["reply"]
        except (LookupError, TypeError) as error:
            raise ValueError(
                f"{file}, line {number}, is not a judgement ({error!r}); remove that line"
            ) from None

        if verdict in VERDICTS:
            answers[key] = record
        else:  # undone
            answers.pop(key, None)
    return answers


@contextlib.contextmanager
def storing_answers(file: Path, answers: Answers) -> Iterator[Keep]:
    """Yield a function that stores one answer, in the file at once and in `answers`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    drop_incomplete_line(file)

    def keep(question: Question, verdict: str, reply: str) -> None:
        record = {
            "set": question.first.set,
            "line": question.first.line,
            "first": question.first.entry,
            "second": question.second.entry,
            "verdict": verdict,
            "reply": reply,
            "first_sha256": question.first.sha256,
            "second_sha256": question.second.sha256,
        }
        append(file, json.dumps(record) + "\n")
        if verdict in VERDICTS:
            answers[question.key] = record
        else:  # undone
            answers.pop(question.key, None)

    yield keep
