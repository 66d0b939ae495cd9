"""Rewrites as strings: which ones are drawn, the rewards of their texts, and their statistics.

A word is a part between spaces, in small letters and without punctuation around it.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

PUNCTUATION = string.punctuation + "“”‘’„«»…–—"  # noqa: RUF001
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # half of a character, as a tokenizer decodes it
THINKING = ("<think>", "</think>")  # what hybrid models put around their thoughts
SLOPE = 0.25  # share of a bound over which the length reward falls from 0 to -1

# Words that a rewrite may lack without losing anything of the prompt.
STOP_WORDS = (
    "a an and are as at be been being but by can could did do does doing done for from had has "
    "have having he her hers him his i if in into is it its itself just may me might more most "
    "much my no nor not of off on onto or our out over own she should so some such than that the "
    "their them then there these they this those to too under until up upon us very was we were "
    "what when where which while who whom whose why will with within would you your"
)


@dataclass(frozen=True)
class TextSettings:
    """What config.rewriter says about texts.

    text_rewards: {name of TEXT_REWARDS: weight}. spam_patterns: matched anywhere in a rewrite, in
    small or large letters. answer_tag: "" if the whole answer is the rewrite.
    """

    min_words: int
    max_words: int
    text_rewards: Mapping[str, float]
    spam_patterns: tuple[re.Pattern, ...]
    answer_tag: str


def text_settings(rewriter: Any) -> TextSettings:
    """Return the settings of config.rewriter. Raises ValueError naming a key that is wrong."""
    if not 1 <= rewriter.min_words <= rewriter.max_words:
        raise ValueError(
            f"config.rewriter.min_words is {rewriter.min_words} and max_words is "
            f"{rewriter.max_words}; expected 1 <= min_words <= max_words"
        )
    unknown = [name for name in rewriter.text_rewards if name not in TEXT_REWARDS]
    if unknown:
        raise ValueError(
            f"config.rewriter.text_rewards has {', '.join(unknown)}; choose from "
            f"{', '.join(TEXT_REWARDS)}"
        )
    if not re.fullmatch(r"\w*", rewriter.answer_tag):
        raise ValueError(
            f"config.rewriter.answer_tag is {rewriter.answer_tag!r}; expected a word, such as "
            "answer for <answer></answer>, or nothing"
        )

    patterns = []
    for pattern in rewriter.spam_patterns:
        try:
            patterns.append(re.compile(pattern, re.IGNORECASE))
        except re.error as error:
            raise ValueError(
                f"config.rewriter.spam_patterns has {pattern!r}, which is no regular expression "
                f"({error})"
            ) from error
    return TextSettings(
        min_words=rewriter.min_words,
        max_words=rewriter.max_words,
        text_rewards=dict(rewriter.text_rewards),
        spam_patterns=tuple(patterns),
        answer_tag=rewriter.answer_tag,
    )


# -- What is drawn


def parse(text: str, answer_tag: str) -> str:
    """Return the rewrite in a language model's answer, or "" if it holds none.

    With a tag, it is what stands inside <tag></tag>, which must be there once. Thoughts before
    </think> are left out. Unusual spaces become plain ones.
    """
    opening, closing = THINKING
    text = text.rpartition(closing)[2]
    if opening in text:  # it never stopped thinking
        return ""
    if answer_tag:
        answers = re.findall(rf"<{answer_tag}>(.*?)</{answer_tag}>", text, re.DOTALL)
        text = answers[0] if len(answers) == 1 else ""
    return re.sub(r"[^\S\n\r\v\f\x1c-\x1e\x85\u2028\u2029]", " ", text).strip()


def usable(text: str, ended: bool, fits: bool) -> bool:
    """Return whether a rewrite can be drawn: one paragraph of printable text that is whole.

    ended: it ends with an end token. fits: the image model reads it to its end.
    """
    is_printable = text.isprintable() and UNKNOWN not in text  # line breaks are not printable
    return ended and fits and bool(words(text)) and is_printable


def drawn(prompts: Sequence[str], rewrites: Sequence[str], is_usable: Sequence[bool]) -> list[str]:
    """Return the texts to draw: rewrites, and the user's prompts in place of unusable ones."""
    triples = zip(prompts, rewrites, is_usable, strict=True)
    return [rewrite if good else prompt for prompt, rewrite, good in triples]


# -- Words


def words(text: str) -> list[str]:
    """Return the words of a text, in order."""
    stripped = [part.strip(PUNCTUATION).lower() for part in text.split()]
    return [word for word in stripped if word]


def content_words(text: str) -> set[str]:
    """Return the words of a text that carry its meaning; all of them if there is no other."""
    every = set(words(text))
    return every.difference(STOP_WORDS.split()) or every


def kept_share(prompt: str, rewrite: str) -> float:
    """Return the share of the prompt's content words that the rewrite has; 1 if it has no word."""
    wanted = content_words(prompt)
    return len(wanted & set(words(rewrite))) / len(wanted) if wanted else 1.0


def spam_share(text: str, patterns: Sequence[re.Pattern]) -> float:
    """Return the share of a text's words that a pattern matches, in part or whole."""
    spans = [match.span() for pattern in patterns for match in pattern.finditer(text)]
    parts = [match.span() for match in re.finditer(r"\S+", text) if words(match[0])]
    hits = sum(any(a < end and start < b for a, b in spans) for start, end in parts)
    return hits / len(parts) if parts else 0.0


# -- Rewards of texts: (settings, prompts, rewrites, usable) -> float32 [n], higher is better


def usable_reward(
    settings: TextSettings, prompts: Sequence[str], rewrites: Sequence[str], good: Sequence[bool]
) -> np.ndarray:
    """1 for a rewrite that is drawn, 0 for one that is not."""
    return np.array(good, np.float32)


def length_reward(
    settings: TextSettings, prompts: Sequence[str], rewrites: Sequence[str], good: Sequence[bool]
) -> np.ndarray:
    """0 for min_words to max_words, falling to -1 a quarter of the bound outside."""
    count = np.array([len(words(rewrite)) for rewrite in rewrites], np.float32)
    below = (settings.min_words - count) / (SLOPE * settings.min_words)
    above = (count - settings.max_words) / (SLOPE * settings.max_words)
    return -np.clip(np.maximum(below, above), 0, 1).astype(np.float32)


def kept_reward(
    settings: TextSettings, prompts: Sequence[str], rewrites: Sequence[str], good: Sequence[bool]
) -> np.ndarray:
    """The share of the prompt's content words that the rewrite has."""
    return np.array(list(map(kept_share, prompts, rewrites)), np.float32)


def spam_reward(
    settings: TextSettings, prompts: Sequence[str], rewrites: Sequence[str], good: Sequence[bool]
) -> np.ndarray:
    """Minus the share of words that match config.rewriter.spam_patterns."""
    shares = [spam_share(rewrite, settings.spam_patterns) for rewrite in rewrites]
    return -np.array(shares, np.float32)


TEXT_REWARDS: dict[str, Callable[..., np.ndarray]] = {
    "usable": usable_reward,
    "length": length_reward,
    "kept": kept_reward,
    "spam": spam_reward,
}


def text_scores(
    settings: TextSettings, prompts: Sequence[str], rewrites: Sequence[str], good: Sequence[bool]
) -> dict[str, np.ndarray]:
    """Return {reward: float32 [n]} of settings.text_rewards. prompts: one a rewrite."""
    scores = {}
    for name in settings.text_rewards:
        scores[name] = TEXT_REWARDS[name](settings, prompts, rewrites, good)
    return scores


# -- Statistics


def statistics(
    settings: TextSettings, prompts: Sequence[str], rewrites: Sequence[str], group: int
) -> dict[str, float]:
    """Return figures of rewrites that are looked at and never trained on.

    prompts: one a rewrite. group: consecutive rewrites of one prompt.
    words, words_95: the mean and the 95th percentile of their numbers of words.
    kept, spam: means of the shares of the text rewards.
    tail: the share of rewrites that hold the commonest last word.
    distinct_2: different pairs of neighbouring words over all pairs, a group's mean; absent if no
        rewrite has two words.
    """
    texts = [words(rewrite) for rewrite in rewrites]
    counts = [len(text) for text in texts]
    figures = {
        "words": float(np.mean(counts)),
        "words_95": float(np.percentile(counts, 95)),
        "kept": float(np.mean(list(map(kept_share, prompts, rewrites)))),
        "spam": float(np.mean([spam_share(text, settings.spam_patterns) for text in rewrites])),
        "tail": _tail(texts),
    }
    shares = []
    for start in range(0, len(texts), group):
        pairs = [pair for text in texts[start : start + group] for pair in pairwise(text)]
        if pairs:
            shares.append(len(set(pairs)) / len(pairs))
    if shares:
        figures["distinct_2"] = float(np.mean(shares))
    return figures


def _tail(texts: Sequence[Sequence[str]]) -> float:
    """The share of texts that hold the commonest last word of all."""
    last = Counter(text[-1] for text in texts if text)
    if not last:
        return 0.0
    word = last.most_common(1)[0][0]
    return sum(word in text for text in texts) / len(texts)


@dataclass(frozen=True)
class WordChange:
    """How often a word is in rewrites before and after training.

    before, after: rewrites that hold it. log_odds: log of the ratio of its odds, after over before.
    z: log_odds over its standard error.
    """

    word: str
    before: int
    after: int
    log_odds: float
    z: float


def log_odds(before: Sequence[str], after: Sequence[str]) -> list[WordChange]:
    """Return the words of two lists of rewrites, those gained most surely first.

    A word counts once a rewrite: k of n hold it. With 1/2 added to k and n - k, the odds are
    o = k / (n - k), and the log odds ratio's variance is the sum of 1 / k and 1 / (n - k) of both
    lists (Haldane 1956; Gart 1966). Words are in the order of z. Raises ValueError for no rewrites.
    """
    if not before or not after:
        raise ValueError("log_odds needs rewrites of both times")
    counts = []
    for rewrites in (before, after):
        counts.append(Counter(word for text in rewrites for word in set(words(text))))

    changes = []
    for word in counts[0].keys() | counts[1].keys():
        logs = []
        variance = 0.0
        for count, rewrites in zip(counts, (before, after), strict=True):
            with_word = count[word] + 0.5
            without = len(rewrites) - count[word] + 0.5
            logs.append(np.log(with_word / without))
            variance += 1 / with_word + 1 / without
        ratio = float(logs[1] - logs[0])
        z = ratio / float(np.sqrt(variance))
        changes.append(WordChange(word, counts[0][word], counts[1][word], ratio, z))
    return sorted(changes, key=lambda change: (-change.z, change.word))


def difference(best: str, worst: str) -> tuple[list[str], list[str]]:
    """Return the words that only the first text has, and those that only the second has."""
    first = dict.fromkeys(words(best))
    second = dict.fromkeys(words(worst))
    only_first = [word for word in first if word not in second]
    only_second = [word for word in second if word not in first]
    return only_first, only_second
