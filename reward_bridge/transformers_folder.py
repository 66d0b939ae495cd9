"""Loads a model of transformers from a local folder, strictly and without a download."""

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from reward_bridge.weights import find, read


def load_model(
    make: type[PreTrainedModel],
    make_config: type[PretrainedConfig],
    path: str,
    option: str,
    dtype: torch.dtype,
    **options: Any,
) -> PreTrainedModel:
    """Return the folder's model in eval mode, without gradients.

    option: the name of the folder in config.reward.options. options: of `from_pretrained`. Raises
    FileNotFoundError if a file is missing, and ValueError if weights are missing, unexpected or
    have another shape.
    """
    disable_progress_bar()  # loading would draw over the run's own progress bar
    folder = find(path, option, "config.json").parent
    model, mismatches = make.from_pretrained(
        None,
        config=make_config.from_pretrained(folder),
        state_dict=read(find(path, option, "model.safetensors", "pytorch_model.bin")),
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, with missing and unexpected keys
        **options,
    )
    wrong = {kind: sorted(keys, key=str)[:3] for kind, keys in mismatches.items() if keys}
    if wrong:
        raise ValueError(
            f"the weights in {folder} do not fit its config.json: {wrong}; download the folder "
            "again"
        )
    return model.eval().requires_grad_(False)
