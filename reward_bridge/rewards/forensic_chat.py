"""P(real) by Forensic-Chat, the vision-language detector of RealGen (arXiv 2512.00473, repository yejy53/RealGen)."""

from collections.abc import Sequence

import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

from reward_bridge.rewards.qwen_vl import QwenInputs
from reward_bridge.weights import torch_dtype

QUESTION = (
    "Analyze the provided image. Decide whether it is a real photograph or AI-generated. "
    "The first word must be either 'real' or 'fake'."
)
FAKE, REAL = ("fake", "Fake"), ("Real", "real")


class ForensicChat:
    """How much rather a fine-tuned Qwen2.5-VL begins its answer with "real" than with "fake"; prompts play no part.

    `path` is a local Qwen2_5_VLForConditionalGeneration folder with its tokenizer and preprocessor_config.json.
    `attention` is any implementation that transformers knows ("flash_attention_2" is what RealGen ran).
    """

    def __init__(self, device: str, path: str, attention: str = "sdpa", dtype: str = "bfloat16"):
        self.inputs = QwenInputs(path, "forensic_chat.path")
        self.fake, self.real = (token_ids(self.inputs, words, device) for words in (FAKE, REAL))
        disable_progress_bar()  # of loading; it would tear the run's own
        model, found = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            self.inputs.folder,
            dtype=torch_dtype(dtype),
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below with what is missing and what is over
        )
        if wrong := {what: sorted(keys, key=str)[:3] for what, keys in found.items() if keys}:
            raise ValueError(
                f"the weights in {self.inputs.folder} are not those of its config.json: {wrong}; download it anew"
            )
        self.model = model.eval().requires_grad_(False).to(device)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        inputs = self.inputs(
            images, [QUESTION] * len(images)
        )  # all of one length: the last position is everyone's
        state = self.model.model(**inputs, use_cache=False).last_hidden_state[:, -1].float()
        # the words' logits in float32: in bfloat16 a logit of 20 comes in steps of 1/8, P(real) of over 1 %
        words = self.model.lm_head.weight[torch.cat([self.fake, self.real])].float()
        fake, real = (state @ words.T).split([len(self.fake), len(self.real)], dim=1)
        return p_real(fake, real)


def p_real(fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Logits [n, k] of the words on either side -> [n]: softmax over the two means, the share of `real`."""
    return (real.mean(1) - fake.mean(1)).sigmoid()


def token_ids(inputs: QwenInputs, words: Sequence[str], device: str) -> torch.Tensor:
    """Each word's own token. Raises ValueError for a word that the vocabulary spells with several."""
    vocabulary = inputs.tokenizer.get_vocab()
    if missing := [word for word in words if word not in vocabulary]:
        raise ValueError(
            f"the tokenizer in {inputs.folder} has no token {missing[0]!r} among its {len(vocabulary)}; expected "
            "Qwen2.5-VL's; set config.reward.options.forensic_chat.path"
        )
    return torch.tensor([vocabulary[word] for word in words], device=device)
