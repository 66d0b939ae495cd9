"""P(real) by Forensic-Chat, RealGen's detector (arXiv 2512.00473, yejy53/RealGen)."""

import logging
from collections.abc import Sequence

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from reward_bridge.rewards.qwen_vl import QwenInputs
from reward_bridge.rewards.yes_no import LEAST_MASS
from reward_bridge.transformers_folder import load_model
from reward_bridge.weights import torch_dtype

QUESTION = (
    "Analyze the provided image. Decide whether it is a real photograph or AI-generated. "
    "The first word must be either 'real' or 'fake'."
)
FAKE = ("fake", "Fake")
REAL = ("Real", "real")


class ForensicChat:
    """P that a fine-tuned Qwen2.5-VL begins its answer with "real" rather than "fake".

    Prompts are not used. It is logged once if the model begins with neither word, see LEAST_MASS.

    path: a local Qwen2_5_VLForConditionalGeneration folder with its tokenizer and
        preprocessor_config.json.
    attention: any implementation that transformers knows (RealGen ran "flash_attention_2").
    """

    def __init__(self, device: str, path: str, attention: str = "sdpa", dtype: str = "bfloat16"):
        self.inputs = QwenInputs(path, "forensic_chat.path")
        self.fake = token_ids(self.inputs, FAKE, device)
        self.real = token_ids(self.inputs, REAL, device)

        self.model = load_model(
            Qwen2_5_VLForConditionalGeneration,
            Qwen2_5_VLConfig,
            path,
            "forensic_chat.path",
            torch_dtype(dtype),
            attn_implementation=attention,
        ).to(device)
        self._warned = False

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        # All texts have the same length, so none is padded after its last token.
        inputs = self.inputs(images, [QUESTION] * len(images))
        state = self.model.model(**inputs, use_cache=False).last_hidden_state[:, -1].float()

        # The words' logits in float32: in bfloat16 a logit of 20 has steps of 1/8, which is more
        # than 1 % of P(real).
        words = torch.cat([self.fake, self.real])
        weights = self.model.lm_head.weight[words].float()
        logits = state @ weights.T
        if not self._warned:
            self._warn_if_neither(state, logits)
        fake, real = logits.split([len(self.fake), len(self.real)], dim=1)
        return p_real(fake, real)

    def _warn_if_neither(self, state: torch.Tensor, logits: torch.Tensor) -> None:
        """Warn of answers that hardly ever begin with one of the words.

        state: the last position, float32 [n, d]. logits: of the words, float32 [n, k].
        """
        head = self.model.lm_head
        all_logits = head(state.to(head.weight.dtype)).float()
        mass = (logits.logsumexp(1) - all_logits.logsumexp(1)).exp()
        count = int((mass < LEAST_MASS).sum())
        if count:
            self._warned = True
            logging.getLogger(__name__).warning(
                "reward 'forensic_chat': on %d of %d pictures the model begins its answer with "
                "neither 'real' nor 'fake' (together they have a probability of %.2g; expected at "
                "least %g). Its scores mean little; are these Forensic-Chat's weights? (%s)",
                count,
                len(mass),
                mass.min().item(),
                LEAST_MASS,
                self.inputs.folder,
            )


def p_real(fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """P(real) [n] from the words' logits [n, k]: softmax over the two means."""
    return (real.mean(1) - fake.mean(1)).sigmoid()


def token_ids(inputs: QwenInputs, words: Sequence[str], device: str) -> torch.Tensor:
    """The token of each word, int64 [k]. Raises ValueError for a word that has no single token."""
    vocabulary = inputs.tokenizer.get_vocab()
    missing = [word for word in words if word not in vocabulary]
    if missing:
        raise ValueError(
            f"the tokenizer in {inputs.folder} has no token {missing[0]!r} among its "
            f"{len(vocabulary)}; expected Qwen2.5-VL's; set "
            "config.reward.options.forensic_chat.path"
        )
    return torch.tensor([vocabulary[word] for word in words], device=device)
