"""The tokenizer and chat template of a language model's folder."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from reward_bridge.text_encoders import chat_text, read_folder
from reward_bridge.weights import expand_home

PROBE = "a cat on a roof"  # must be in what the template makes of it


class ChatTokenizer:
    """Makes token ids of users' prompts, and texts of a language model's answers.

    ends: the ids that end an answer, all of generation_config.json's. pad: the id of padding.
    vocab_size: the model's number of tokens.
    """

    ends: tuple[int, ...]
    pad: int
    vocab_size: int

    def __init__(self, folder: str | Path, *, system: str, thinking: bool):
        """Read the files of a Hugging Face folder: nothing is downloaded, and no code of it runs.

        system: the system prompt, or "" for none. thinking: what the chat template is told. Raises
        FileNotFoundError or ValueError naming the file that is missing or does not fit.
        """
        folder = expand_home(folder)
        self.vocab_size = read_entry(folder / "config.json", "vocab_size")
        if not is_id(self.vocab_size, 1 << 31):
            raise ValueError(
                f"vocab_size in {folder / 'config.json'} is {self.vocab_size!r}; expected a number"
            )
        self._tokenizer = load_fast(folder)
        self._check_ids(folder)
        self.ends = self._read_ends(folder)
        self.pad = self._read_pad(folder)
        self._system = system
        self._thinking = thinking
        self._check_template(folder)

    def text(self, prompt: str) -> str:
        """The chat template with the system prompt and a user's prompt, up to the answer."""
        turns = [{"role": "user", "content": prompt}]
        if self._system:
            turns.insert(0, {"role": "system", "content": self._system})
        return chat_text(self._tokenizer, turns, self._thinking)

    def encode(
        self, prompts: Sequence[str], max_tokens: int, place: str = "prompt"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return ids int32 [n, max_tokens] and mask bool [n, max_tokens], padded on the left.

        place: what errors call the prompts, which are numbered from 1: "prompts.txt, line". Raises
        ValueError naming a prompt that has more than max_tokens tokens; none is cut.
        """
        texts = [self.text(prompt) for prompt in prompts]
        rows = self._tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        ids = np.full((len(rows), max_tokens), self.pad, np.int32)
        mask = np.zeros((len(rows), max_tokens), bool)
        for number, row in enumerate(rows):
            if len(row) > max_tokens:
                short = textwrap.shorten(prompts[number], 80, placeholder=" ...")
                raise ValueError(
                    f"{place} {number + 1} has {len(row)} tokens with the system prompt, more than "
                    f"config.rewriter.max_prompt_tokens {max_tokens}: {short!r}; shorten it, or "
                    "raise that"
                )
            ids[number, max_tokens - len(row) :] = row
            mask[number, max_tokens - len(row) :] = True
        return ids, mask

    def decode(self, ids: np.ndarray, completion: np.ndarray) -> list[str]:
        """Return the texts of answers without their end tokens. ids, completion: [n, t]."""
        texts = []
        for row, valid in zip(ids, completion, strict=True):
            kept = [int(token) for token in row[valid] if token not in self.ends]
            texts.append(self._tokenizer.decode(kept, clean_up_tokenization_spaces=False))
        return texts

    def ended(self, ids: np.ndarray, completion: np.ndarray) -> np.ndarray:
        """Return which answers have an end token: bool [n]. ids, completion: [n, t]."""
        return (np.isin(ids, self.ends) & completion).any(axis=1)

    # -- Checks of the folder

    def _check_ids(self, folder: Path) -> None:
        highest = max(self._tokenizer.get_vocab().values())
        if highest >= self.vocab_size:
            raise ValueError(
                f"the tokenizer in {folder} has the id {highest}, but vocab_size in "
                f"{folder / 'config.json'} is {self.vocab_size}; expected the model's own tokenizer"
            )

    def _read_ends(self, folder: Path) -> tuple[int, ...]:
        file = folder / "generation_config.json"
        value = read_entry(file, "eos_token_id")
        ends = tuple(value) if isinstance(value, list) else (value,)
        wrong = [end for end in ends if not is_id(end, self.vocab_size)]
        if wrong or not ends:
            raise ValueError(
                f"eos_token_id in {file} is {value!r}; expected ids below {self.vocab_size}"
            )
        return ends

    def _read_pad(self, folder: Path) -> int:
        pad = self._tokenizer.pad_token_id
        if pad is None:
            raise ValueError(
                f"the tokenizer in {folder} has no pad_token (tokenizer_config.json); expected the "
                "model's own tokenizer"
            )
        return pad

    def _check_template(self, folder: Path) -> None:
        text = self.text(PROBE)
        for what, words, key in (
            ("the user's prompt", PROBE, "path"),
            ("the system prompt", self._system.strip(), "system"),
        ):
            if words not in text:
                raise ValueError(
                    f"the chat template in {folder} leaves out {what} (config.rewriter.{key}); "
                    "expected a template that has a system's and a user's turn"
                )


def load_fast(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder. Raises ValueError for one without a vocabulary."""
    tokenizer = read_folder(
        folder,
        lambda path: AutoTokenizer.from_pretrained(
            path, trust_remote_code=False, local_files_only=True
        ),
    )
    if not tokenizer.is_fast or len(tokenizer) < 2:
        raise ValueError(
            f"{folder} holds no tokenizer.json of a fast tokenizer; expected the model's own"
        )
    return tokenizer


def read_entry(file: Path, name: str) -> Any:
    """Return an entry of a JSON file of a Hugging Face folder.

    Raises FileNotFoundError for a missing file, ValueError for a damaged one or a missing entry.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing; expected a Hugging Face folder of a language model "
            "(config.rewriter.path)"
        )
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); download it again") from error
    if not isinstance(content, dict) or content.get(name) is None:
        raise ValueError(f"{file} has no {name}; expected a language model's")
    return content[name]


def is_id(value: Any, vocab_size: int) -> bool:
    """Return whether a value is the id of a token."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size
