"""Reads P(yes) from the log-probabilities of a chat model's first tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

SPACES = " \t\r\n▁Ġ"  # the last two mark a leading space in token vocabularies
ANSWER_TOKENS = 5  # enough for marks before the word, as in "**Yes"

# The least P(yes) + P(no) of an answer. Below it the model begins its answer otherwise in 99 of 100
# cases, and the rest tells nothing about the picture.
LEAST_MASS = 0.01


def top_tokens(choice: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return (token, log-probability) of the tokens with which the answer's first word may begin.

    These are the most likely tokens at the first position. If the model chose one without a letter
    or digit there, such as "**", the most likely tokens after it follow, with the log-probability
    of the whole, and so on.

    Raises ValueError, LookupError or TypeError if the choice has no log-probabilities.
    """
    tokens = []
    before = 0.0  # log-probability of the tokens that are stepped over
    for position in choice["logprobs"]["content"]:
        for entry in position["top_logprobs"]:
            tokens.append((entry["token"], before + _checked(entry["logprob"])))
        if any(letter.isalnum() for letter in position["token"].strip(SPACES)):
            break
        before += _checked(position["logprob"])
    if not tokens:
        raise LookupError("no tokens")
    return tokens


def _checked(value: Any) -> float:
    """A log-probability. Raises ValueError for a probability, or NaN."""
    logp = float(value)
    if not logp <= 0.01:  # rounding
        raise ValueError(f"{value} is no log-probability")
    return logp


def p_answer(tokens: Sequence[tuple[str, float]]) -> float:
    """Return P(yes) + P(no) from (token, log-probability) pairs."""
    both = torch.stack([_log_probability("yes", tokens), _log_probability("no", tokens)])
    return both.logsumexp(0).exp().item()


def p_yes(tokens: Sequence[tuple[str, float]]) -> float:
    """Return P(yes) / (P(yes) + P(no)) from (token, log-probability) pairs.

    A missing answer has probability 0. Raises ValueError if neither yes nor no is among the tokens.
    """
    yes = _log_probability("yes", tokens)
    no = _log_probability("no", tokens)
    if yes.isinf() and no.isinf():
        raise ValueError(no_answer(tokens))
    return (yes - no).sigmoid().item()


def no_answer(tokens: Sequence[tuple[str, float]]) -> str:
    """Say how an answer began that is neither yes nor no."""
    beginnings = [token for token, _ in tokens[:5]]
    return f"began its answer with neither yes nor no but one of {beginnings}"


def _log_probability(word: str, tokens: Sequence[tuple[str, float]]) -> torch.Tensor:
    """The log of the summed probabilities of all spellings of a word; -inf if there is none."""
    spellings = [logp for token, logp in tokens if token.strip(SPACES).lower() == word]
    return torch.tensor(spellings, dtype=torch.float64).logsumexp(0)
