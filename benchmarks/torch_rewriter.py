"""The same model and the same update in PyTorch, by transformers and peft, for rewriter.py."""

from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from rewriter_case import LEARNING_RATE, Case
from transformers import Qwen3Config, Qwen3ForCausalLM

from realgen_jax.nn.export import to_torch
from realgen_jax.nn.lora import lora_tensors

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "tie_word_embeddings",
)


class Theirs:
    """A case's weights and adapters in transformers and peft."""

    def __init__(self, case: Case):
        # The model with our weights.
        config = case.size.model
        self.size = case.size
        sizes = {name: getattr(config, name) for name in SIZES}
        theta = {"rope_theta": config.rope_theta, "rope_type": "default"}
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, rope_parameters=theta)).eval()
        table = case.model.family.table(config)
        weights = {
            name: torch.from_numpy(np.array(array))
            for name, array in to_torch(case.model.params, table)
        }
        model.load_state_dict(weights, strict=False)

        # Our adapters on all projections.
        lora = case.model.trainable.config
        settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=TARGETS)
        self.model = get_peft_model(model, settings)
        self.factors = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                key = name.removeprefix("base_model.model.").removesuffix(".default.weight")
                self.factors[key] = parameter
        with torch.no_grad():
            for name, array in lora_tensors(case.adapters, table).items():
                self.factors[name].copy_(torch.from_numpy(array))

        self.prompts = torch.from_numpy(case.prompts).long()
        self.optimizer = torch.optim.AdamW(self.factors.values(), LEARNING_RATE, weight_decay=0.0)

    def decode(self) -> torch.Tensor:
        """Draw one call, all new tokens of every row."""
        with torch.no_grad():
            return self.model.generate(
                input_ids=self.prompts,
                attention_mask=torch.ones_like(self.prompts),
                max_new_tokens=self.size.new,
                min_new_tokens=self.size.new,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                pad_token_id=0,
            )

    def log_probs(self, ids: torch.Tensor) -> torch.Tensor:
        """Of the new tokens, [rows, new]. Only their places are projected to the vocabulary."""
        new = self.size.new
        out = self.model(input_ids=ids, logits_to_keep=new + 1, use_cache=False)
        logs = torch.log_softmax(out.logits[:, :-1], dim=-1)
        return logs.gather(-1, ids[:, -new:, None])[..., 0]

    def gradient(self, batch: Any) -> float:
        """Backward passes over all microbatches; returns the loss. The gradients are in .grad."""
        objective = self.size.objective
        low, high = objective.clip
        self.optimizer.zero_grad()
        total = 0.0
        for i in range(len(batch.advantages)):
            ids = torch.from_numpy(np.array(batch.tokens.ids[i])).long()
            sampled = torch.from_numpy(np.array(batch.tokens.logp[i]))
            reference = torch.from_numpy(np.array(batch.reference[i]))
            advantages = torch.from_numpy(np.array(batch.advantages[i]))[:, None]
            logp = self.log_probs(ids)
            old = logp.detach()
            weights = (old - sampled).exp().clamp(max=objective.importance_cap)
            ratio = (logp - old).exp()
            bounded = ratio.clamp(1 - low, 1 + high)
            policy = -weights * torch.minimum(ratio * advantages, bounded * advantages)
            shift = reference - logp
            kl = shift.exp() - shift - 1
            loss = (policy + objective.beta * kl).sum() / float(batch.denominators)
            loss.backward()
            total += float(loss.detach())
        return total

    def update(self, batch: Any) -> float:
        loss = self.gradient(batch)
        torch.nn.utils.clip_grad_norm_(self.factors.values(), 1.0)
        self.optimizer.step()
        return loss
