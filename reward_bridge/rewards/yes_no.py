"""Reads words, and P(yes), from the log-probabilities of a chat model's first tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from reward_bridge.rewards.chat_judge import ChatJudge, Refusal

SPACES = " \t\r\n▁Ġ"  # the last two mark a leading space in token vocabularies
ANSWER_TOKENS = 5  # enough for marks before the word, as in "**Yes"

# The least P(yes) + P(no) of an answer. Below it the model begins its answer otherwise in 99 of 100
# cases, and the rest tells nothing about the picture.
LEAST_MASS = 0.01

# What a request for the first tokens' log-probabilities holds, and what the answer must hold.
FIRST_TOKENS = {
    "max_tokens": ANSWER_TOKENS,
    "temperature": 0,
    "logprobs": True,
    "top_logprobs": 20,
}
FIRST_TOKENS_PLACE = (
    "choices[0].logprobs.content[0].top_logprobs: use a server and a model that return "
    "log-probabilities"
)


class YesNoJudge(ChatJudge):
    """Asks yes/no questions about pictures. The score is P(yes) of the answer's first word.

    P(yes) = p(yes) / (p(yes) + p(no)), where each term sums the spellings, in upper or lower case
    and with or without leading spaces, among the 20 most likely tokens. Tokens without a letter or
    digit before the word, as in "**Yes**", are stepped over (`top_tokens`). An answer with
    p(yes) + p(no) below LEAST_MASS is a refusal.
    """

    expected = "yes or no"
    needs = "the first token's log-probabilities"
    place = FIRST_TOKENS_PLACE
    sampling = FIRST_TOKENS

    def read(self, choice: Mapping[str, Any]) -> float:
        """P(yes) of a choice. Raises as `ChatJudge.read` does."""
        tokens = top_tokens(choice)
        mass = p_answer(tokens)
        if mass < LEAST_MASS:
            answer = str(choice["message"].get("content"))[:200]
            raise Refusal(
                f"answered {answer!r}: it {no_answer(tokens)}, and P(yes) + P(no) = {mass:.2g} is "
                f"less than {LEAST_MASS}"
            )
        return p_yes(tokens)


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
