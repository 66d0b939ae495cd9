"""Reading LoRA files, in the forms that peft, diffusers, ComfyUI and the trainers write.

A LoRA adds scale * B A to a module's weight, A [r, in] and B [out, r] in torch's layout. The scale
is alpha / r, or alpha / sqrt(r) if it is rank-stabilised; both may differ between modules.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from realgen_jax.files import expand_home
from realgen_jax.nn.convert import Table
from realgen_jax.nn.lora import DIFFUSERS_FILE, PEFT_CONFIG, PEFT_FILE, factors
from realgen_jax.nn.names import Shares, Span, flat
from realgen_jax.nn.tensors import Tensors, read_json

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
    (r"\.oft_|\.oft_blocks|\.boft", "is an OFT"),
    (r"\.lora_mid\.", "is a LoCon with a third factor"),
    (r"\.[ab][12]\.weight$", "is a GLoRA"),
    (r"\.(diff|diff_b|set_weight|w_norm|b_norm)$", "changes weights by more than adapters"),
    (
        r"\.lora_[AB]\.bias$|\.scale$",
        "changes biases or norms, as FLUX.1-Canny's and -Depth's LoRAs, which take a picture,",
    ),
)

# Entries of peft's config that change more than the product B A; they must be off.
VARIANTS = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# How the factors may have started; the other ways of peft change the model's own weights too.
STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


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
    scales = _scales(tensors, ranks, alpha_keys, merge)
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


# -- The scale of a module


def _scales(
    tensors: Tensors, ranks: Mapping[str, int], alpha_keys: Mapping[str, str], merge: str
) -> dict[str, float]:
    """{module: factor of B A} by peft's config, the file's header, or tensors named ".alpha"."""
    alphas = _alpha_tensors(tensors, ranks, alpha_keys)
    source, settings = _settings(tensors, bool(alphas))
    _check_settings(source, settings, merge)
    scales = {}
    for module, rank in ranks.items():
        if _stated(source, settings, "rank_pattern", "r", module) not in (None, rank):
            raise ValueError(f"{module} in {tensors.path} has rank {rank}, unlike in {source}")
        alpha = _stated(source, settings, "alpha_pattern", "lora_alpha", module)
        if alpha is not None and alphas.get(module, alpha) != alpha:
            raise ValueError(
                f"{source} has alpha {alpha:g} for {module}, but {alpha_keys[module]} is "
                f"{alphas[module]:g}"
            )
        if alpha is None:
            alpha = alphas.get(module, float(rank))
        if not 0 < alpha < math.inf:
            raise ValueError(f"{source} has alpha {alpha:g} for {module}; expected above 0")
        scales[module] = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    return scales


def _alpha_tensors(
    tensors: Tensors, ranks: Mapping[str, int], alpha_keys: Mapping[str, str]
) -> dict[str, float]:
    """{module: alpha} of the tensors named ".alpha"."""
    alphas = {}
    for module, key in alpha_keys.items():
        value = tensors.read(key)
        if module not in ranks or value.size != 1:
            raise ValueError(
                f"{tensors.path} holds {key} of shape {value.shape}; expected one number for a "
                "module with lora_A and lora_B"
            )
        alphas[module] = float(value.reshape(()))
    return alphas


def _settings(tensors: Tensors, has_alphas: bool) -> tuple[Path, dict[str, Any]]:
    """peft's config of the LoRA and the file that holds it; {} if nothing is stated.

    peft writes a file beside its own tensors, whose names begin with "base_model.model."; diffusers
    an entry of the header, for the transformer and the text encoders together.
    """
    file = tensors.path
    config = file.with_name(PEFT_CONFIG)
    header = tensors.metadata().get("lora_adapter_metadata")
    pefts = any(key.startswith("base_model.model.") for key in tensors.keys())  # noqa: SIM118
    if pefts or file.name == PEFT_FILE:
        if config.exists():
            settings = read_json(config)
            if settings.get("lora_alpha") is None:
                raise ValueError(f"{config} lacks lora_alpha")
            return config, settings
        if not header and not has_alphas:
            raise FileNotFoundError(f"{config} is missing; it states the alpha of {file.name}")

    try:
        entries = json.loads(header or "{}")
    except ValueError as error:
        raise ValueError(f"lora_adapter_metadata of {file} is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise ValueError(f"lora_adapter_metadata of {file} is no JSON object")
    own = {}
    for name, value in entries.items():
        part, _, rest = name.rpartition(".")
        if part in ("", "transformer"):
            own[rest] = value
    if own and own.get("lora_alpha") is None:
        raise ValueError(f"lora_adapter_metadata of {file} lacks lora_alpha")
    return file, own


def _check_settings(source: Path, settings: Mapping[str, Any], merge: str) -> None:
    """Raise ValueError for a LoRA that is more than a product B A on the model's own weights."""
    if settings.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{source} has peft_type {settings['peft_type']!r}; expected 'LORA'")
    for name in VARIANTS:
        if settings.get(name):
            raise ValueError(
                f"{source} has {name} {settings[name]!r}: "
                f"{'a DoRA' if name == 'use_dora' else 'it'} is not read; {merge}"
            )
    if settings.get("bias", "none") != "none":
        raise ValueError(f"{source} has bias {settings['bias']!r}, which is not read; {merge}")
    if settings.get("init_lora_weights") not in STARTS:
        raise ValueError(
            f"{source} has init_lora_weights {settings['init_lora_weights']!r}, which changes the "
            "model's own weights; convert it to a plain LoRA with peft's "
            "path_initial_model_for_weight_conversion"
        )


def _stated(
    source: Path, settings: Mapping[str, Any], patterns: str, default: str, module: str
) -> float | None:
    """A module's alpha or rank in peft's config; None if it states none.

    It is that of the first pattern which matches the module's whole name or its end. A pattern is a
    regular expression, as in peft.
    """
    value = settings.get(default)
    try:
        for pattern, own_value in (settings.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                value = own_value
                break
        return None if value is None else float(value)
    except (re.error, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{patterns} or {default} in {source} is invalid: {error}") from error


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
