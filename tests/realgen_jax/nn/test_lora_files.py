"""LoRA files of the field: each form is read at its own strength, or refused by name."""

import json
import logging

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from realgen_jax.models.flux.tables import DIFFUSERS
from realgen_jax.models.flux.transformer import Cond
from realgen_jax.models.trainable import Lora, with_lora_file
from realgen_jax.nn.lora import LoraConfig, lora_tensors, save_lora
from realgen_jax.nn.lora_files import open_lora
from tests.helpers.compiling import QUICK
from tests.helpers.goldens import GOLDENS, PIPELINE
from tests.helpers.models import load_adapters, load_flux

PEFT = GOLDENS / "07_train" / "lora_rollout"
PEFT_CONFIG = json.loads((PEFT / "adapter_config.json").read_text())
WEIGHTS = load_file(PIPELINE / "transformer" / "diffusion_pytorch_model.safetensors")
CONFIG = LoraConfig(rank=4, alpha=8.0)

# The modules that RealGen trains, and all with a matrix.
TRAINED = sorted(
    key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    for key in load_file(PEFT / "adapter_model.safetensors")
    if key.endswith("lora_A.weight")
)
EVERY = sorted(key.removesuffix(".weight") for key, value in WEIGHTS.items() if value.ndim == 2)


def pairs(modules=TRAINED, rank=4):
    """{module: (A, B)}, random; `rank` may depend on the module's name."""
    random = np.random.default_rng(0)
    factors = {}
    for module in modules:
        n_out, n_in = WEIGHTS[f"{module}.weight"].shape
        r = rank(module) if callable(rank) else rank
        a = random.normal(0, 0.1, (r, n_in)).astype(np.float32)
        factors[module] = (a, random.normal(0, 0.1, (n_out, r)).astype(np.float32))
    return factors


def named(factors, prefix="transformer.", a="lora_A.weight", b="lora_B.weight"):
    keys = {}
    for module, (down, up) in factors.items():
        keys |= {f"{prefix}{module}.{a}": down, f"{prefix}{module}.{b}": up}
    return keys


def write(folder, tensors, name="lora.safetensors", **metadata):
    save_file(tensors, folder / name, metadata=metadata or None)
    return folder / name


def header(**settings):
    entries = {f"transformer.{name}": value for name, value in settings.items()}
    return {"lora_adapter_metadata": json.dumps(entries)}


def peft(folder, factors, extra=None, **settings):
    """A folder as peft writes it."""
    tensors = named(factors, "base_model.model.") | (extra or {})
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(PEFT_CONFIG | settings))
    return folder


def assert_adds(model, path, factors, scale):
    """The file adds scale B A to each of its modules, and nothing to the others."""
    own, adapters = with_lora_file(model, path)
    assert own.trainable.config.alpha == own.trainable.config.rank  # so that B holds the scale
    tensors = lora_tensors(adapters, DIFFUSERS)
    for module in {name.rpartition(".")[0] for name in tensors}:
        got = tensors[f"{module}.lora_B"] @ tensors[f"{module}.lora_A"]
        if factors.get(module) is None:
            assert not got.any()
            continue
        a, b = factors[module]
        factor = scale(module) if callable(scale) else scale
        np.testing.assert_allclose(got, factor * b @ a, rtol=1e-5, atol=1e-6, err_msg=module)


RANKS = {"attn.to_q": 8, "ff.net.2": 8}


def rank_8_or_4(module):
    return 8 if module.endswith(tuple(RANKS)) else 4


ALPHAS = {"ff.net.0.proj": 16, "attn.to_q": 2}


def own_alpha(module):
    return next((a for end, a in ALPHAS.items() if module.endswith(end)), 8) / 4


def alphas(value, modules=TRAINED):
    return {f"transformer.{module}.alpha": np.array(value, np.float32) for module in modules}


SIMPLE = pairs()
MIXED = pairs(rank=rank_8_or_4)
ATTENTION = pairs([module for module in EVERY if ".attn.to_" in module])
TEXT_OF_KOHYA = {
    f"lora_te1_text_model_encoder_layers_0_mlp_fc1.{name}": np.ones((4, 8), np.float32)
    for name in ("lora_down.weight", "lora_up.weight", "alpha")
}
TEXT = {"text_encoder.text_model.layers.0.q_proj.lora_A.weight": np.ones((4, 8), np.float32)}


@pytest.mark.parametrize(
    ("make", "factors", "scale"),
    [
        (lambda path: peft(path, SIMPLE), SIMPLE, 2),
        (lambda path: peft(path, SIMPLE) / "adapter_model.safetensors", SIMPLE, 2),
        (lambda path: peft(path, SIMPLE, use_rslora=True), SIMPLE, 4),
        (lambda path: peft(path, SIMPLE, alpha_pattern=ALPHAS), SIMPLE, own_alpha),
        (lambda path: peft(path, MIXED, rank_pattern=RANKS), MIXED,
         lambda module: 8 / rank_8_or_4(module)),
        (lambda path: write(path, named(MIXED)), MIXED, 1),
        (lambda path: write(path, named(ATTENTION)), ATTENTION, 1),
        (lambda path: write(path, named(SIMPLE, "")), SIMPLE, 1),
        (lambda path: write(path, named(SIMPLE, "transformer.base_model.model.")), SIMPLE, 1),
        (
            lambda path: write(
                path, named(SIMPLE, a="lora_A.default_0.weight", b="lora_B.default_0.weight")
            ),
            SIMPLE,
            1,
        ),
        (
            lambda path: write(path, named(SIMPLE, a="lora.down.weight", b="lora.up.weight")),
            SIMPLE,
            1,
        ),
        (lambda path: write(path, named(SIMPLE) | alphas(2)), SIMPLE, 0.5),
        (lambda path: write(path, named(SIMPLE) | alphas([2])), SIMPLE, 0.5),
        (lambda path: write(path, named(SIMPLE) | alphas(2, TRAINED[:1])), SIMPLE,
         lambda module: 0.5 if module == TRAINED[0] else 1),
        (lambda path: write(path, named(SIMPLE), **header(r=4, lora_alpha=8)), SIMPLE, 2),
        (
            lambda path: write(
                path, named(SIMPLE), **header(r=4, lora_alpha=8, use_rslora=True)
            ),
            SIMPLE,
            4,
        ),
        (
            lambda path: write(
                path, named(SIMPLE), lora_adapter_metadata='{"text_encoder.lora_alpha": 8}'
            ),
            SIMPLE,
            1,
        ),
        (
            lambda path: write(path, named(SIMPLE, ""), lora_adapter_metadata='{"lora_alpha": 8}'),
            SIMPLE,
            2,
        ),
    ],
)  # fmt: skip
def test_every_form_has_its_own_strength(make, factors, scale, tiny, tmp_path):
    assert_adds(tiny, make(tmp_path), factors, scale)


def inputs(config):
    random = np.random.default_rng(1)
    cond = Cond(
        random.normal(size=(2, 5, config.joint_attention_dim)).astype(np.float32),
        random.normal(size=(2, config.pooled_projection_dim)).astype(np.float32),
        np.full(2, 3.5, np.float32),
    )
    return random.normal(size=(2, 16, 64)).astype(np.float32), np.full(2, 0.6, np.float32), cond


def test_adapters_of_every_linear_layer_are_as_merged_ones(tiny, tmp_path):
    factors = pairs(EVERY)
    own, adapters = with_lora_file(tiny, write(tmp_path, named(factors)))
    merged = dict(WEIGHTS)
    for module, (a, b) in factors.items():
        merged[f"{module}.weight"] = WEIGHTS[f"{module}.weight"] + b @ a
    _, params = load_flux(write(tmp_path, merged, "merged.safetensors"))

    def velocity(model, trainable):
        return jax.jit(model.velocity, compiler_options=QUICK)(trainable, *inputs(tiny.config))

    want = velocity(tiny, params)
    assert np.abs(want - velocity(tiny, tiny.params)).max() > 0.1
    np.testing.assert_allclose(velocity(own, adapters), want, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"attn.to_q": 2, r"transformer_blocks\.0\.ff\..*": 16, "to_k": 3}},
        {"use_rslora": True, "alpha_pattern": {"^transformer_blocks.0.attn.to_v": 5}},
    ],
)
def test_scales_are_pefts(settings, tiny, tmp_path):
    """Patterns match as peft's: the first one that is the end of a module's name."""
    peft_library, diffusers = (pytest.importorskip(name) for name in ("peft", "diffusers"))
    folder = peft(tmp_path, SIMPLE, **settings)
    theirs = diffusers.FluxTransformer2DModel.from_pretrained(PIPELINE / "transformer")
    theirs = peft_library.PeftModel.from_pretrained(theirs, folder)
    scales = {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in theirs.named_modules()
        if hasattr(module, "scaling")
    }
    assert open_lora(folder).scales == scales


@pytest.mark.parametrize("text", [TEXT, TEXT_OF_KOHYA])
def test_a_text_encoders_part_is_left_out_with_a_line(text, tiny, tmp_path, caplog):
    path = write(tmp_path, named(SIMPLE) | text)
    with caplog.at_level(logging.WARNING):
        assert_adds(tiny, path, SIMPLE, 1)
    assert "holds adapters of a text encoder" in caplog.text


ONE = f"transformer.{TRAINED[0]}"
VECTOR = {f"base_model.model.{TRAINED[0]}.lora_magnitude_vector": np.ones(64, np.float32)}


NOT_READ = (
    ("lora_unet_double_blocks_0_img_attn_qkv.dora_scale", "is a DoRA .*merge it with ComfyUI"),
    ("lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a", "is a LoHa"),
    ("lora_unet_double_blocks_0_img_attn_qkv.lokr_w1", "is a LoKr"),
    ("lora_unet_double_blocks_0_img_attn_qkv.lora_mid.weight", "is a LoCon with a third factor"),
    ("lora_unet_double_blocks_0_img_attn_qkv.oft_blocks", "is an OFT"),
    ("lora_unet_double_blocks_0_img_attn_qkv.a1.weight", "is a GLoRA"),
    ("diffusion_model.img_in.diff", "changes weights by more than adapters"),
    ("double_blocks.0.img_attn.norm.key_norm.scale", "FLUX.1-Canny's and -Depth's LoRAs"),
    ("double_blocks.0.img_attn.proj.lora_B.bias", "FLUX.1-Canny's and -Depth's LoRAs"),
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *(
            (lambda path, key=key: write(path, {key: np.ones(4, np.float32)}), message)
            for key, message in NOT_READ
        ),
        (lambda path: peft(path, SIMPLE, VECTOR), "is a DoRA .*lora_magnitude_vector"),
        (lambda path: peft(path, SIMPLE, use_dora=True), "use_dora True: a DoRA is not read"),
        (lambda path: peft(path, SIMPLE, lora_bias=True), "lora_bias True: it is not read"),
        (lambda path: peft(path, SIMPLE, bias="all"), "has bias 'all'"),
        (lambda path: peft(path, SIMPLE, peft_type="LOHA"), "has peft_type 'LOHA'"),
        (lambda path: peft(path, SIMPLE, init_lora_weights="pissa"), "'pissa', which changes"),
        (lambda path: peft(path, SIMPLE, alpha_pattern={"(": 1}), "alpha_pattern or lora_alpha in"),
        (lambda path: peft(path, SIMPLE, alpha_pattern=[1]), "alpha_pattern or lora_alpha in"),
        (lambda path: peft(path, SIMPLE, r=8), "has rank 4, unlike in .*adapter_config.json"),
        (lambda path: write(path, named(SIMPLE) | alphas(np.nan)), "has alpha nan for"),
        (lambda path: write(path, named(SIMPLE), lora_adapter_metadata="[]"), "no JSON object"),
        (lambda path: write(path, named(SIMPLE), lora_adapter_metadata="{"), "is not JSON"),
        (lambda path: peft(path, SIMPLE, lora_alpha=None), "lacks lora_alpha"),
        (
            lambda path: write(path, named(SIMPLE, "base_model.model.")),
            r"adapter_config\.json is missing; it states the alpha",
        ),
        (lambda path: write(path, {}), "holds no factor of a LoRA of the transformer"),
        (lambda path: write(path, TEXT), "holds no factor of a LoRA of the transformer"),
        (lambda path: write(path, {"x.bias": np.ones(3, np.float32)}), "holds x.bias, which is no"),
        (
            lambda path: write(path, {f"{ONE}.lora_A.weight": np.ones((4, 64), np.float32)}),
            "lacks .*lora_B",
        ),
        (
            lambda path: write(path, named({TRAINED[0]: (np.ones((4, 64)), np.ones((64, 3)))})),
            r"factors A \(4, 64\) and B \(64, 3\)",
        ),
        (
            lambda path: write(path, named({TRAINED[0]: (np.ones((4, 64)), np.ones((63, 4)))})),
            r"has a factor B \(63, 4\); expected \(64, rank\)",
        ),
        (
            lambda path: write(
                path, named(SIMPLE) | named(SIMPLE, a="lora_A.b.weight", b="lora_B.b.weight")
            ),
            "holds two adapters",
        ),
        (
            lambda path: write(path, named(SIMPLE) | alphas(2), **header(lora_alpha=4)),
            "has alpha 4 for .*alpha is 2",
        ),
        (lambda path: write(path, named(SIMPLE) | alphas([2, 2])), r"alpha of shape \(2,\)"),
        (
            lambda path: write(path, named({"blocks.0": SIMPLE[TRAINED[0]]})),
            "holds adapters of blocks.0 .*which this model does not have",
        ),
        (lambda path: path / "none.safetensors", "does not exist; expected a LoRA file or folder"),
        (lambda path: path, r"holds neither adapter_model\.safetensors"),
    ],
)
def test_what_is_not_read_is_named(make, message, tiny, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        with_lora_file(tiny, make(tmp_path))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (named(MIXED), "has rank 8, but config.train.lora_rank is 4; expected 8 or more"),
        (named(SIMPLE) | TEXT, "holds adapters of a text encoder"),
        (named(pairs(EVERY)), r"holds context_embedder .*scripts/export.py --merge"),
    ],
)
def test_training_refuses_other_modules_and_larger_ranks(tensors, message, tiny, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_adapters(tiny, write(tmp_path, tensors), CONFIG)


@pytest.mark.parametrize("factors", [MIXED, ATTENTION])
def test_training_goes_on_from_a_part_of_the_modules_and_ranks(factors, tiny, tmp_path):
    """What the file lacks starts as new adapters do, with B zero and A that is not."""
    file = write(tmp_path, named(factors))
    own, adapters = load_adapters(tiny, file, LoraConfig(rank=8, alpha=16.0))
    tensors = lora_tensors(adapters, DIFFUSERS)
    assert {name.rpartition(".")[0] for name in tensors} == set(TRAINED)
    for module in TRAINED:
        a = tensors[f"{module}.lora_A"]
        b = tensors[f"{module}.lora_B"]
        rank = len(factors[module][0]) if module in factors else 0
        assert not b[:, rank:].any()
        assert (np.abs(a[rank:]).max(axis=1) > 0.01).all()
        if rank:
            np.testing.assert_array_equal(a[:rank], factors[module][0])
            np.testing.assert_array_equal(2 * b[:, :rank], factors[module][1])

    # It samples as the file does, and so does what it exports.
    own.trainable.save(own, tmp_path / "again", adapters)
    assert_adds(tiny, tmp_path / "again", {**dict.fromkeys(TRAINED), **factors}, 1)


@pytest.mark.parametrize("alpha", [8.0, 4.0, 6.0])
def test_training_goes_on_at_the_files_strength(alpha, tiny, tmp_path):
    """Whatever its alpha: the function is the same, to the bit for powers of two."""
    own, adapters = load_adapters(tiny, PEFT, LoraConfig(4, alpha))
    ours = lora_tensors(adapters, DIFFUSERS)
    for key, value in load_file(PEFT / "adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.").removesuffix(".weight")
        want = value * 8.0 / alpha if name.endswith("B") else value
        np.testing.assert_allclose(ours[name], want, rtol=0 if alpha != 6.0 else 1e-6)

    # What it exports is loaded again as it was.
    own.trainable.save(own, tmp_path, adapters)
    again = Lora(LoraConfig(4, alpha)).load(own, tmp_path, jax.random.key(0))
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(adapters), strict=True):
        np.testing.assert_allclose(a, b, rtol=0 if alpha != 6.0 else 1e-6)


def test_an_exported_lora_has_its_trained_strength_everywhere(tiny, tmp_path):
    """For programs that read the header, and for those that read the tensors alone."""
    _, adapters = load_adapters(tiny, PEFT, CONFIG)
    save_lora(tmp_path, adapters, CONFIG, DIFFUSERS)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    trained = lora_tensors(adapters, DIFFUSERS)
    for key, value in load_file(file).items():
        name = key.removeprefix("transformer.").removesuffix(".weight")
        np.testing.assert_array_equal(value, trained[name] * (2 if name.endswith("B") else 1))
    assert set(open_lora(file).scales.values()) == {1.0}

    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    for folder, weights in ((tmp_path, None), (None, load_file(file))):
        model = diffusers.FluxTransformer2DModel.from_pretrained(PIPELINE / "transformer")
        if weights is None:
            model.load_lora_adapter(str(folder), weight_name=file.name, prefix="transformer")
        else:
            torch = pytest.importorskip("torch")
            state = {key: torch.tensor(value) for key, value in weights.items()}
            model.load_lora_adapter(state, prefix="transformer")
        model.fuse_lora()
        for name, module in model.named_modules():
            if not hasattr(module, "lora_A"):
                continue
            change = module.weight.detach().numpy() - WEIGHTS[f"{name}.weight"]
            want = 2 * trained[f"{name}.lora_B"] @ trained[f"{name}.lora_A"]
            np.testing.assert_allclose(change, want, atol=1e-5, err_msg=name)
