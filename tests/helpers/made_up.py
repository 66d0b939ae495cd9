"""A made-up model family: another network, conditioning, guidance and schedule than FLUX's.

Nothing outside this file knows it. Tests train it through the real programs, as proof that these
are free of FLUX: a config file registers it in FAMILIES.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P

from realgen_jax.models.family import Encoder, Family, Published
from realgen_jax.models.formats import file_config
from realgen_jax.nn.convert import Table, abstract, table_rows
from realgen_jax.nn.export import save_folder, to_torch
from realgen_jax.nn.layers import Linear
from tests.helpers.goldens import PIPELINE


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cond:
    """The prompt's words [n, l, d]."""

    words: Array


@dataclass(frozen=True)
class Config:
    channels: int = 64
    words_dim: int = 32
    dim: int = 16
    num_attention_heads: int = 1
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "full"


class Network(nnx.Module):
    """Two residual layers on every token."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        kw = {"dtype": config.dtype, "param_dtype": config.param_dtype, "rngs": rngs}
        self.tokens_in = Linear(config.channels, config.dim, **kw)
        self.words_in = Linear(config.words_dim, config.dim, **kw)
        self.layers = Linear(config.dim, config.dim, stack=(2,), **kw)
        self.out = Linear(config.dim, config.channels, **kw)

    def __call__(
        self, x: Array, sigma: Array, cond: Cond, height: int, width: int, mesh: Any = None
    ) -> Array:
        h = self.tokens_in(x) + self.words_in(cond.words.mean(axis=1))[:, None]
        h = h * (1.0 + sigma[:, None, None])
        graph, weights = nnx.split(self.layers)

        def body(h: Array, layer: Any) -> tuple[Array, None]:
            return h + jnp.tanh(nnx.merge(graph, layer)(h)), None

        h, _ = jax.lax.scan(body, h, weights)
        return self.out(h)


@dataclass(frozen=True)
class LinearSchedule:
    def sigmas(self, steps: int, image_tokens: int) -> np.ndarray:
        return np.linspace(1.0, 0.0, steps + 1).astype(np.float32)


def cond_shapes(config: Config, n: int, max_tokens: int, dtype: Any) -> Cond:
    return Cond(jax.ShapeDtypeStruct((n, max_tokens, config.words_dim), dtype))


TABLE = Table(
    table_rows({
        "tokens_in": "patch.proj",
        "words_in": "caption.proj",
        "layers": "blocks.{}.linear",
        "out": "head",
    })
)  # fmt: skip

MADE_UP = Family(
    pipeline="MadeUpPipeline",
    transformer="MadeUpTransformer",
    published=(Published("made up"),),
    Config=Config,
    Module=Network,
    Schedule=LinearSchedule,
    table=lambda config: TABLE,
    lora_targets=lambda config: ("layers",),
    rules=(
        (r"layers\.kernel", P(None, "fsdp", "tensor")),
        (r"(tokens_in|words_in|out)\.kernel", P()),
        (r".*\.bias", P()),
    ),
    encoders=(Encoder(("words",), "t5_states", tokenizer="tokenizer_2", model="text_encoder_2"),),
    text_tokens=lambda max_tokens: max_tokens,
    cond=lambda arrays, guidance: Cond(arrays["words"]),
    cond_shapes=cond_shapes,
    cost=SimpleNamespace(),
    negative_prompt="",
)


def write_model(folder: Path) -> None:
    """A pipeline folder with random weights, and the golden autoencoder and text encoder."""
    words_dim = json.loads((PIPELINE / "text_encoder_2" / "config.json").read_text())["d_model"]
    for name in ("vae", "tokenizer_2", "text_encoder_2"):
        shutil.copytree(PIPELINE / name, folder / name)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": MADE_UP.pipeline}))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")

    config = Config(words_dim=words_dim)
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(np.float32),
        abstract(Network, config)[1],
    )
    save_folder(folder / "transformer", to_torch(state, TABLE), file_config(MADE_UP, config))
