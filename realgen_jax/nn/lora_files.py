"""Reading LoRA files, in the forms that peft, diffusers, ComfyUI and the trainers write.

A LoRA adds scale * B A to a module's weight, A [r, in] and B [out, r] in torch's layout. The scale
is alpha / r, or alpha / sqrt(r) if it is rank-stabilised; both may differ between modules.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from realgen_jax.files import expand_home
from realgen_jax.nn.convert import Table
from realgen_jax.nn.lora import DIFFUSERS_FILE, PEFT_FILE, factors
from realgen_jax.nn.lora_scales import module_scales
from realgen_jax.nn.names import Shares, Span, flat
from realgen_jax.nn.tensors import Tensors

# Names are the module's, which may have several of these prefixes, and the factor's, which may have
# an adapter's name: "transformer.transformer_blocks.0.attn.to_q.lora_A.default.weight". The last
# three are those of sd-scripts (kohya), OneTrainer and LyCORIS, who write "_" for "." in modules.
PREFIXES = (
    "transformer.",
    "base_model.model.",
    "diffusion_model.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
# "down" and "up" alone are XLabs' factors, whose modules' names end in "_lora".
FACTOR = re.compile(
    r"(.+)\.(lora_A|lora_B|lora[._]down|lora[._]up|(?<!\.lora\.)(?:down|up))"
    r"(?:\.(?!bias$|weight$)[^.]+)?(?:\.weight)?"
)
ENCODER = re.compile(r"text_encoders?(_\d)?\.|lora_te\d?_")

# What to do with a LoRA that is not read.
MERGED = "into the weights and name these with config.pretrained.transformer"
MERGE = (
    "merge it with ComfyUI (LoraLoader and ModelSave) or diffusers (load_lora_weights, fuse_lora, "
    f"unload_lora_weights, and transformer.save_pretrained) {MERGED}"
)
MERGE_PEFT = (
    "merge it with peft (merge_and_unload, save_pretrained) into the weights and name the folder "
    "with config.rewriter.path"
)

# Patterns of the names in files that are not read, and what such a file is.
OTHER_FORMATS = (
    (r"lora_magnitude_vector|dora_scale", "is a DoRA"),
    (r"\.hada_[wt]", "is a LoHa"),
    (r"\.lokr_[wt]", "is a LoKr"),
    (r"\.b?oft_", "is an OFT"),
    (r"\.lora_mid\.", "is a LoCon with a third factor"),
    (r"\.[ab][12]\.weight$", "is a GLoRA"),
    (r"\.(diff|diff_b|set_weight|w_norm|b_norm)$", "changes weights by more than adapters"),
    (
        r"\.lora_[AB]\.bias$|\.scale$",
        "changes biases or norms, as FLUX.1-Canny's and -Depth's LoRAs, which take a picture,",
    ),
)


@dataclass(frozen=True)
class Pair:
    """The keys of a module's A and B in the file. spans: its rows of B in order; None: all."""

    a: str
    b: str
    spans: tuple[Span, ...] | None = None


@dataclass(frozen=True)
class LoraFile:
    """The adapters in a file, by the names that it has for the modules that they belong to.

    pairs: {module: its factors}. scales: {module: the factor of B A}. encoder: the first key that
    belongs to a text encoder, or "".
    """

    tensors: Tensors
    pairs: Mapping[str, Pair]
    scales: Mapping[str, float]
    encoder: str

    @property
    def path(self) -> Path:
        return self.tensors.path

    @property
    def ranks(self) -> dict[str, int]:
        """{module: its rank}."""
        return {module: self.tensors.shape(pair.a)[0] for module, pair in self.pairs.items()}

    def read(self, module: str) -> tuple[np.ndarray, np.ndarray]:
        """A [r, in] and B [out, r] of a module in float32. A convolution's are flattened."""
        pair = self.pairs[module]
        a, b = (self.tensors.read(key).astype(np.float32) for key in (pair.a, pair.b))
        a, b = (factor.reshape(len(factor), -1) for factor in (a, b))
        if pair.spans is not None:
            b = np.concatenate([b[start:stop] for start, stop in pair.spans])
        return a, b


def open_lora(path: str | Path, merge: str = MERGE) -> LoraFile:
    """Open a LoRA file, or a folder of peft or diffusers; no weight is read.

    merge: what to do with a LoRA that is not read, for error messages. Without a stated alpha, the
    scale is 1, as in diffusers and ComfyUI. Raises FileNotFoundError, or ValueError naming the file
    and what is not read.
    """
    file = _lora_file(expand_home(path))
    tensors = Tensors(file)
    _check_format(tensors, merge)

    # Sort the keys: factors, alphas, and the text encoder's part.
    pairs: dict[str, dict[str, str]] = {}
    alpha_keys = {}
    encoder = ""
    for key in sorted(tensors.keys()):
        name = _without_prefixes(key)
        factor = FACTOR.fullmatch(name)
        if ENCODER.match(name):
            encoder = encoder or key
        elif name.endswith(".alpha"):
            alpha_keys[name.removesuffix(".alpha")] = key
        elif factor is None:
            raise ValueError(f"{file} holds {key}, which is no factor of a LoRA")
        else:
            pair = pairs.setdefault(factor[1], {})
            letter = "A" if factor[2].endswith(("A", "down")) else "B"
            if letter in pair:
                raise ValueError(f"{file} holds two adapters, {pair[letter]} and {key}")
            pair[letter] = key
    if not pairs:
        raise ValueError(f"{file} holds no factor of a LoRA of the transformer")

    keys = _whole_pairs(tensors, pairs)
    ranks = {module: tensors.shape(pair.a)[0] for module, pair in keys.items()}
    scales = module_scales(tensors, ranks, alpha_keys, merge)
    return LoraFile(tensors, keys, scales, encoder)


def _lora_file(path: Path) -> Path:
    """The LoRA's file: `path` itself, or the file in a peft or diffusers folder."""
    if path.is_dir():
        for name in (PEFT_FILE, DIFFUSERS_FILE):
            if (path / name).exists():
                return path / name
        raise FileNotFoundError(
            f"{path} holds neither {PEFT_FILE} (peft) nor {DIFFUSERS_FILE} (diffusers)"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a LoRA file or folder")
    return path


def _check_format(tensors: Tensors, merge: str) -> None:
    for key in sorted(tensors.keys()):
        for pattern, what in OTHER_FORMATS:
            if re.search(pattern, key):
                raise ValueError(f"{tensors.path} {what} ({key}) and is not read; {merge}")


def _without_prefixes(key: str) -> str:
    while key.startswith(PREFIXES):
        for prefix in PREFIXES:
            key = key.removeprefix(prefix)
    return key


def _whole_pairs(tensors: Tensors, pairs: Mapping[str, Mapping[str, str]]) -> dict[str, Pair]:
    """{module: keys of A and B}, both of one rank."""
    keys = {}
    for module, pair in pairs.items():
        for letter in "AB":
            if letter not in pair:
                raise ValueError(f"{tensors.path} lacks {module}.lora_{letter}")
        shape_a = tensors.shape(pair["A"])
        shape_b = tensors.shape(pair["B"])
        if len(shape_a) < 2 or len(shape_b) < 2 or shape_a[0] != math.prod(shape_b[1:]):
            raise ValueError(
                f"{module} in {tensors.path} has factors A {shape_a} and B {shape_b}; expected "
                "(rank, in) and (out, rank)"
            )
        keys[module] = Pair(pair["A"], pair["B"])
    return keys


# -- Our arrays


def renamed(file: LoraFile, names: Mapping[str, Shares]) -> LoraFile:
    """Return the file with diffusers' names of the modules, from those of any naming.

    names: as all_names (names.py) returns them. A module that holds several of diffusers' becomes
    as many, which share A. Raises ValueError for modules that the model does not have.
    """
    unknown = [module for module in file.pairs if flat(module) not in names]
    if unknown:
        raise ValueError(
            f"{file.path} holds adapters of {unknown[0]} ({len(unknown)} such modules), which this "
            "model does not have; is it another model's LoRA?"
        )
    pairs: dict[str, Pair] = {}
    scales = {}
    for module, pair in file.pairs.items():
        content = names[flat(module)]
        shape = file.tensors.shape(pair.b)
        if shape[0] != content.rows:
            raise ValueError(
                f"{module} in {file.path} has a factor B {shape}; expected ({content.rows}, rank)"
            )
        for share in content.shares:
            if share.module in pairs:
                raise ValueError(
                    f"{file.path} holds two adapters of {share.module}, {pairs[share.module].a} "
                    f"and {pair.a}"
                )
            pairs[share.module] = Pair(pair.a, pair.b, share.spans)
            scales[share.module] = file.scales[module]
    return replace(file, pairs=pairs, scales=scales)


def read_lora(file: LoraFile, start: nnx.State, table: Table, scale: float) -> nnx.State:
    """Return adapters on the host whose product, times `scale`, is the file's.

    file: under diffusers' names (`renamed`). start: the adapters to begin with, whose B is zero.
    Modules that the file lacks, and ranks that it does not use, stay as they are there. B is
    multiplied by the file's scale over ours, which is exact for powers of two. Every module of the
    file must be in `start`. Raises ValueError naming one of another shape.
    """
    adapters = jax.tree.map(np.array, start)
    places = factors(adapters, table)
    for module in file.pairs:
        a, b = file.read(module)
        view_a, view_b = (places[f"{module}.lora_{letter}"].view() for letter in "AB")
        rank = len(a)
        if a.T.shape != view_a[:, :rank].shape or b.T.shape != view_b[:rank].shape:
            raise ValueError(
                f"{module} in {file.path} has factors A {a.shape} and B {b.shape}; expected "
                f"({rank}, {len(view_a)}) and ({view_b.shape[1]}, {rank})"
            )
        view_a[:, :rank] = a.T
        view_b[:rank] = b.T * np.float32(file.scales[module] / scale)
    return adapters
