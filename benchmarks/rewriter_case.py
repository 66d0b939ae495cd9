"""The prompt rewriter's two programs at any size, for benchmarks/rewriter.py.

Needs jax, flax, optax and what the model itself imports; no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from realgen_jax.models.language import LanguageModel
from realgen_jax.models.qwen.family import QWEN3
from realgen_jax.models.qwen.transformer import Qwen3, Qwen3Config
from realgen_jax.models.trainable import Lora
from realgen_jax.nn.convert import abstract
from realgen_jax.nn.lora import LoraConfig
from realgen_jax.objectives.token_grpo import TokenBatch, TokenGrpo
from realgen_jax.rewriter.generate import Tokens, generate
from realgen_jax.rollout import compiler_options, decoder_options
from realgen_jax.sharding import make_mesh
from realgen_jax.update import EmaConfig, TrainState, make_optimizer, update

LEARNING_RATE = 1e-5
OPTIMIZER = make_optimizer(LEARNING_RATE, 0.9, 0.999, 1e-8, 0.0, 1.0)


@dataclass(frozen=True)
class Size:
    """A model, and a call: rows of so many prompt and new tokens.

    microbatch: rows of one forward and backward pass. chunk: tokens whose logits exist at a time.
    The defaults are the recipe's on one of 7 GPUs.
    """

    model: Qwen3Config = field(default_factory=Qwen3Config)
    rows: int = 32
    prompt: int = 320
    new: int = 384
    rank: int = 32
    microbatch: int = 8
    chunk: int = 64

    @property
    def objective(self) -> TokenGrpo:
        return TokenGrpo(beta=0.01, importance_cap=2.0, logit_chunk=self.chunk)


def small_model(layers: int, hidden: int, inner: int, vocabulary: int, remat: str) -> Qwen3Config:
    """A float32 model with heads of 64 channels, three query heads to a key head."""
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 192,
        head_dim=64,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat=remat,
    )


SIZES = {
    # 71 M parameters. Without rematerialisation, as the PyTorch side.
    "cpu": Size(small_model(8, 768, 2304, 20480, "none"), 8, 64, 64, 16, 8, 64),
    "gpu": Size(),
    "tiny": Size(small_model(2, 192, 256, 512, "none"), 4, 8, 6, 4, 2, 4),
}


def programs(size: Size, mesh: Mesh) -> tuple[Callable, Callable]:
    """Return the jitted sampler and update. There is no end: every row has all new tokens."""
    fixed = {"steps": size.new, "ends": (), "pad": 0, "temperature": 1.0}
    step = partial(update, size.objective, OPTIMIZER, EmaConfig(0.0, 1))
    dtype = size.model.dtype
    return (
        jax.jit(partial(generate, **fixed), compiler_options=decoder_options(dtype, mesh)),
        jax.jit(step, compiler_options=compiler_options(dtype, mesh)),
    )


def language_model(size: Size, params: nnx.State, mesh: Mesh) -> LanguageModel:
    """Return the model with adapters of the size's rank."""
    lora = Lora(LoraConfig(size.rank, 2.0 * size.rank, "kaiming"))
    return LanguageModel(params, QWEN3, size.model, lora, mesh)


def abstract_programs(size: Size) -> tuple[Callable, Callable, list[tuple]]:
    """Return both programs and their arguments without arrays, to lower them without memory."""
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    model = language_model(size, abstract(Qwen3, size.model)[1], mesh)
    adapters = model.trainable.abstract(model)
    opt_state = jax.eval_shape(OPTIMIZER.init, adapters)
    state = TrainState(adapters, adapters, opt_state, jax.ShapeDtypeStruct((), jnp.int32))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size.rows))

    def rows(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    # A call, and the same rows in microbatches.
    sample, train = programs(size, mesh)
    ids = rows(size.rows, size.prompt, dtype=jnp.int32)
    mask = rows(size.rows, size.prompt, dtype=jnp.bool_)
    call = (model, adapters, ids, mask, keys)
    tokens, _ = jax.eval_shape(sample, *call)

    def split(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return rows(
            -(-size.rows // size.microbatch), size.microbatch, *leaf.shape[1:], dtype=leaf.dtype
        )

    tokens = jax.tree.map(split, tokens)
    batch = TokenBatch(
        tokens=tokens,
        advantages=split(rows(size.rows, dtype=jnp.float32)),
        reference=tokens.logp,
        old=None,
        denominators=rows(dtype=jnp.float32),
    )
    return sample, train, [call, (model, state, batch)]


class Case:
    """Random weights, a call's prompts, and the programs that draw and train on it."""

    def __init__(self, size: Size, seed: int = 0):
        self.size = size
        config = size.model
        mesh = make_mesh(1, 1, 1, jax.devices()[:1])
        draw = jax.jit(lambda key: nnx.state(Qwen3(config, nnx.Rngs(key))))
        self.model = language_model(size, draw(jax.random.key(seed)), mesh)
        self.adapters = self.model.trainable.init(self.model, jax.random.key(seed + 1))

        # Prompts of full length, so that both sides do the same work.
        rng = np.random.default_rng(seed)
        shape = (size.rows, size.prompt)
        self.prompts = rng.integers(2, config.vocab_size, shape).astype(np.int32)
        self.advantages = rng.normal(size=size.rows).astype(np.float32)

        self.generate, self.update = programs(size, mesh)
        jit = partial(jax.jit, compiler_options=compiler_options(config.dtype, mesh))
        self.log_probs = jit(size.objective.log_probs)
        self.gradient = jit(size.objective.gradient)

    def decode(self, seed: int = 0) -> Tokens:
        """Draw one call."""
        keys = jax.random.split(jax.random.key(seed), self.size.rows)
        mask = np.ones(self.prompts.shape, bool)
        tokens, _ = self.generate(self.model, self.adapters, self.prompts, mask, keys)
        return tokens

    def batch(self, tokens: Tokens) -> TokenBatch:
        """The call as one optimizer step; the reference is the base model's."""
        reference = self.log_probs(self.model, None, tokens)

        def split(leaf: Any) -> jax.Array:
            leaf = jnp.asarray(leaf)
            return leaf.reshape(-1, self.size.microbatch, *leaf.shape[1:])

        return TokenBatch(
            tokens=jax.tree.map(split, tokens),
            advantages=split(self.advantages),
            reference=split(reference),
            old=None,
            denominators=self.size.objective.denominators(tokens.completion),
        )

    def state(self) -> TrainState:
        opt_state = OPTIMIZER.init(self.adapters)
        return TrainState(self.adapters, self.adapters, opt_state, jnp.int32(0))

    def trainer(self, batch: TokenBatch) -> Callable[[], Any]:
        """Return a call that takes the first optimizer step on a batch."""
        state = self.state()
        return lambda: self.update(self.model, state, batch)


def decode_bytes(size: Size) -> float:
    """Bytes that drawing a call has to read: all weights for each token, and the cache so far."""
    config = size.model
    shapes = jax.eval_shape(lambda: nnx.state(Qwen3(config, nnx.Rngs(0))))
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    place = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    place *= jnp.dtype(config.dtype).itemsize
    mean_places = size.prompt + size.new / 2
    return size.new * (weights + size.rows * mean_places * place)


def update_flops(size: Size) -> float:
    """Useful operations of an update with adapters; what is computed again does not count.

    Products with frozen weights count twice: forward, and for the gradient of their inputs.
    """
    config = size.model
    tokens = size.rows * (size.prompt + size.new)
    heads = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    hidden = config.hidden_size
    inner = config.intermediate_size

    # A block: q and o, k and v, the feed-forward; and the adapters' products, which have gradients
    # of their own.
    weights = 2 * hidden * heads + 2 * hidden * keys + 3 * hidden * inner
    ends = 4 * hidden + 2 * heads + 2 * keys + 3 * (hidden + inner)
    adapters = size.rank * ends
    block = 2 * tokens * (2 * weights + 3 * adapters)

    # Scores and weighted values, of half of all pairs; their gradients are twice as much.
    attention = 3 * 2 * 2 * tokens * (size.prompt + size.new) / 2 * heads

    head = 2 * 2 * size.rows * size.new * hidden * config.vocab_size
    return config.num_hidden_layers * (block + attention) + head
