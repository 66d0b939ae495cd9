"""Text encoders and tokenizers from folders of transformers, loaded strictly.

transformers itself draws missing tensors at random, leaves out unknown ones, and makes a tokenizer
without a vocabulary.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from reward_bridge.weights import files_named, read

# The most that a tokenizer's vocabulary may be smaller than the model's. T5's is rounded up: 32128
# for 32100 tokens.
PADDED_VOCABULARY = 0.1


def load_model(
    kind: type[PreTrainedModel], folder: Path, unused: str, dtype: torch.dtype, device: str
) -> PreTrainedModel:
    """Load a text encoder, every weight of it from the folder's files.

    unused: matches the keys of tensors that do not belong to the encoder. Raises ValueError naming
    tensors that are missing, of another shape, quantized or unknown, OSError for missing files.
    """
    config = read_config(kind, folder)
    file = weights_file(folder)
    state = {}
    for key, tensor in read(file).items():
        if not re.fullmatch(unused, key):
            state[key] = tensor

    quantized = [key for key, tensor in state.items() if is_quantized(key, tensor)]
    if quantized or getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{file} holds quantized weights{f' ({quantized[0]})' if quantized else ''}, which are "
            "not read; use the published ones in bfloat16, float16 or float32"
        )

    # Nothing is left out, and nothing is made up.
    model, differences = kind.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below
    )
    wrong = {name: sorted(keys, key=str)[:3] for name, keys in differences.items() if keys}
    if wrong:
        raise ValueError(
            f"{file} does not fit {kind.__name__} of the config.json beside it: {wrong}; download "
            "the folder again"
        )
    return model.eval().to(device)


def read_config(kind: type[PreTrainedModel], folder: Path) -> Any:
    """The config of a text encoder. Raises FileNotFoundError, or ValueError for a damaged one."""
    # Without config.json, transformers would take the sizes of another model.
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder / 'config.json'} is missing; expected a text encoder of transformers"
        )
    return read_folder(folder, kind.config_class.from_pretrained)


def weights_file(folder: Path) -> Path:
    """The weights in a folder of transformers, or the index of their shards."""
    files = files_named(folder, "model.safetensors", "pytorch_model.bin")
    if len(files) != 1:
        names = " and ".join(file.name for file in files)
        raise ValueError(
            f"{folder} holds {names or 'no weights'}; expected model.safetensors, or one index of "
            "its shards"
        )
    return files[0]


def is_quantized(key: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor belongs to weights of 8 or 4 bits with scales."""
    if key.endswith("position_ids"):  # a buffer of integers in files of old versions
        return False
    return not tensor.is_floating_point() or bool(re.search(r"scale|absmax|quant|\bSCB", key))


def load_tokenizer(
    folder: Path, kind: type[PreTrainedModel], size: int, padding: str
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a text encoder.

    size: the encoder's number of tokens. padding: the piece that it was trained to be padded with,
    or "" for any. Raises ValueError if the tokenizer lacks the vocabulary, or is another model's.
    """
    tokenizer = read_folder(
        folder, lambda path: AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    )
    known = len(tokenizer)
    if not (1 - PADDED_VOCABULARY) * size <= known <= size:
        raise ValueError(
            f"the tokenizer in {folder} has {known} tokens, and {kind.__name__} has {size}; "
            "expected its own tokenizer, with its vocabulary; download the folder again"
        )
    if not tokenizer.pad_token or tokenizer.pad_token != (padding or tokenizer.pad_token):
        raise ValueError(
            f"the tokenizer in {folder} pads with {tokenizer.pad_token!r}, but the text encoder "
            f"was trained with {padding or 'a piece for padding'!r}; expected its own tokenizer; "
            "download the folder again"
        )
    return tokenizer


def read_folder(folder: Path, load: Callable[[Path], Any]) -> Any:
    """What `load` of transformers reads from a folder. Raises ValueError naming a damaged folder.

    For damaged files, transformers and tokenizers raise errors of many types.
    """
    try:
        return load(folder)
    except Exception as error:
        raise ValueError(
            f"{folder} cannot be read ({type(error).__name__}: {first_line(error)}); is it "
            "complete? Download it again"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, or ""."""
    return next(iter(str(error).strip().splitlines()), "")


def chat_text(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Mapping[str, str]], thinking: bool
) -> str:
    """The chat template with these turns, up to where the model would answer.

    turns: {"role": system, user or assistant, "content": text} each. thinking: what a hybrid
    model's template is told. transformers renders it in a sandbox. Raises ValueError naming a
    tokenizer that has no template, or a damaged one.
    """
    folder = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer in {folder} has no chat template (chat_template.jinja, or an entry of "
            "tokenizer_config.json), in which the model reads its prompts; download the folder "
            "again"
        )
    try:
        return tokenizer.apply_chat_template(
            [dict(turn) for turn in turns],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
    except Exception as error:  # of many types
        raise ValueError(
            f"the chat template of {folder} cannot be filled in ({type(error).__name__}: "
            f"{first_line(error)}); download the folder again"
        ) from error
