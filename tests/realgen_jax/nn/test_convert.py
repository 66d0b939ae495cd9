import json
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import load_file, save_file

from realgen_jax.models.flux.tables import DIFFUSERS
from realgen_jax.models.flux.transformer import FluxConfig, FluxTransformer
from realgen_jax.nn.convert import Table, abstract, leaves, load, table_rows
from realgen_jax.nn.export import to_torch
from realgen_jax.nn.layers import Linear
from realgen_jax.nn.tensors import Tensors
from realgen_jax.nn.vae_files import load_vae
from tests.helpers.bfl_names import bfl_transformer
from tests.helpers.goldens import GOLDENS, PIPELINE
from tests.helpers.models import load_flux, save_flux

NAME = "diffusion_pytorch_model.safetensors"
MODEL = PIPELINE / "transformer"


@pytest.fixture
def folder(tmp_path):
    copy = tmp_path / "transformer"
    shutil.copytree(MODEL, copy)
    return copy


def assert_same(got, want):
    got, want = leaves(got), leaves(want)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_reads_any_float_sharded_or_not(folder, dtype):
    weights = {k: v.astype(jnp.dtype(dtype)) for k, v in load_file(MODEL / NAME).items()}
    save_file(weights, folder / NAME)
    _, single = load_flux(folder)
    for got, key in ((leaves(single)["img_in.kernel"].T, "x_embedder.weight"),):
        np.testing.assert_array_equal(got, weights[key].astype(np.float32))
    (folder / NAME).unlink()
    shards = [dict(list(weights.items())[i::3]) for i in range(3)]
    for i, shard in enumerate(shards):
        save_file(shard, folder / f"part{i}.safetensors")
    weight_map = {key: f"part{i}.safetensors" for i, shard in enumerate(shards) for key in shard}
    (folder / f"{NAME}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _, sharded = load_flux(folder)
    assert_same(sharded, single)
    (folder / "part1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"part1\.safetensors is missing"):
        load_flux(folder)


def test_exports_what_diffusers_reads(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    config, params = load_flux(MODEL)
    save_flux(tmp_path / "one", config, params)
    save_flux(tmp_path / "many", config, params, shard_bytes=300_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    want = load_file(MODEL / NAME)
    for export in ("one", "many"):
        theirs = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / export)
        state = {key: value.numpy() for key, value in theirs.state_dict().items()}
        assert state.keys() == want.keys()
        for key in want:
            np.testing.assert_array_equal(state[key], want[key], err_msg=key)
        again, loaded = load_flux(tmp_path / export)
        assert again == config
        assert_same(loaded, params)


def test_reads_bfls_single_file(tmp_path):
    config, want = load_flux(MODEL)
    save_file(bfl_transformer(load_file(MODEL / NAME), config), tmp_path / "flux1-dev.safetensors")
    found, got = load_flux(tmp_path / "flux1-dev.safetensors")
    assert found == config
    assert_same(got, want)


def test_reads_bfls_autoencoder(tmp_path):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    widths = (8, 8, 16, 16)
    vae = diffusers.AutoencoderKL(
        block_out_channels=widths, layers_per_block=2, latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    config, want = load_vae(tmp_path / "vae", tmp_path)
    bfl = {}
    for key, value in vae.state_dict().items():
        part, *rest = key.split(".")
        name = ".".join(rest)
        if rest[0] == "mid_block":
            where = {"resnets": f"block_{int(rest[2]) + 1}", "attentions": "attn_1"}[rest[1]]
            name = ".".join(["mid", where, *rest[3:]])
        elif rest[0] in ("up_blocks", "down_blocks"):
            level = 3 - int(rest[1]) if rest[0] == "up_blocks" else int(rest[1])
            tail = rest[2:]
            if tail[0] == "resnets":
                tail = ["block", *tail[1:]]
            else:
                tail = [
                    tail[0].removesuffix("rs")
                    and {"upsamplers": "upsample", "downsamplers": "downsample"}[tail[0]],
                    *tail[2:],
                ]
            name = ".".join([rest[0].removesuffix("_blocks"), str(level), *tail])
        for ours, theirs in (
            ("group_norm", "norm"),
            ("to_out.0", "proj_out"),
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
        ):
            name = name.replace(f"attn_1.{ours}", f"attn_1.{theirs}")
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        square = "attn_1" in name and value.ndim == 2
        bfl[f"{part}.{name}"] = np.ascontiguousarray(value[:, :, None, None] if square else value)
    save_file(bfl, tmp_path / "ae.safetensors")
    _, got = load_vae(tmp_path / "ae.safetensors", tmp_path / "vae")
    assert_same(got, want)

    # As ComfyUI has it beside the transformer and the text encoders.
    for prefix in ("first_stage_model.", "vae."):
        whole = {prefix + key: array for key, array in bfl.items()}
        whole["model.diffusion_model.img_in.weight"] = np.zeros((2, 2), np.float32)
        whole["text_encoders.t5xxl.shared.weight"] = np.zeros((2, 2), np.float32)
        save_file(whole, tmp_path / "whole.safetensors")
        _, got = load_vae(tmp_path / "whole.safetensors", tmp_path / "vae")
        assert_same(got, want)

    # One file with diffusers' names.
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    _, got = load_vae(file, tmp_path / "vae")
    assert_same(got, want)
    assert config.scaling_factor == 0.3611


def edit(folder, change):
    weights = load_file(folder / NAME)
    change(weights)
    save_file(weights, folder / NAME)


def test_wrong_checkpoints_are_named(folder):
    key = "transformer_blocks.0.attn.to_k.weight"
    edit(folder, lambda w: w.pop(key))
    with pytest.raises(ValueError, match=rf"lacks {key}; it is not a complete checkpoint"):
        load_flux(folder)
    edit(folder, lambda w: w.update({key: np.zeros((64, 63), np.float32)}))
    with pytest.raises(
        ValueError,
        match=rf"{key} .* has shape \(64, 63\), which does not fit double.img.qkv.kernel",
    ):
        load_flux(folder)
    edit(folder, lambda w: w.update({key: np.zeros((63, 64), np.float32)}))
    with pytest.raises(ValueError, match=r"needs more outputs"):
        load_flux(folder)
    edit(
        folder,
        lambda w: w.update(
            {key: np.zeros((64, 64), np.float32), "pos_embed": np.zeros(3, np.float32)}
        ),
    )
    with pytest.raises(ValueError, match="holds pos_embed, which this model does not have"):
        load_flux(folder)


def test_wrong_files_are_named(folder, tmp_path):
    whole = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        load_flux(folder)
    (folder / NAME).unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither .*\.safetensors nor .*index\.json"):
        load_flux(folder)
    with pytest.raises(
        ValueError, match="describes a AutoencoderKL; expected a FluxTransformer2DModel"
    ):
        load_flux(PIPELINE / "vae")
    with pytest.raises(
        FileNotFoundError, match=r"config\.json is missing; expected a FluxTransformer2DModel"
    ):
        load_flux(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"expected BFL.s FLUX\.1 file"):
        load_flux(PIPELINE / "text_encoder" / "model.safetensors")
    vae = json.loads((GOLDENS / "02_vae" / "c8_16_l1" / "model" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**vae, "use_quant_conv": True}))
    with pytest.raises(ValueError, match="has use_quant_conv True; expected False"):
        load_vae(tmp_path, tmp_path)


def test_places_arrays_where_they_are_wanted():
    devices = jax.devices()
    assert len(devices) > 1
    _, params = load_flux(
        MODEL, sharding=lambda leaf, shape: SingleDeviceSharding(devices["qkv" in leaf])
    )
    for name, value in leaves(params).items():
        assert value.devices() == {devices["qkv" in name]}


@pytest.mark.slow
def test_loading_streams(tmp_path):
    """Host memory beyond the placed arrays stays under twice the largest stacked array."""
    config = FluxConfig(
        num_layers=12,
        num_single_layers=12,
        attention_head_dim=64,
        num_attention_heads=16,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(16, 24, 24),
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
    )
    state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract(FluxTransformer, config)[1])
    save_flux(tmp_path, config, state, shard_bytes=10**8)
    sizes = [a.nbytes for a in leaves(state).values()]
    program = f"""
        import threading, time
        from tests.helpers.models import load_flux
        def anonymous():
            lines = open("/proc/self/status").read().splitlines()
            return next(int(l.split()[1]) for l in lines if l.startswith("RssAnon")) * 1024
        import jax; jax.devices()
        load_flux({str(MODEL)!r})
        before, peak, stop = anonymous(), [0], threading.Event()
        def watch():
            while not stop.is_set():
                peak[0] = max(peak[0], anonymous()); time.sleep(0.002)
        thread = threading.Thread(target=watch); thread.start()
        _, params = load_flux({str(tmp_path)!r}, param_dtype=jax.numpy.bfloat16)
        stop.set(); thread.join()
        print(peak[0] - before)
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    beyond = int(out.stdout) - sum(sizes)
    assert sum(sizes) > 4 * max(sizes)  # so that holding the whole model twice would fail
    assert beyond < 2 * max(sizes) + 2**26


def test_to_torch_is_the_inverse_of_load():
    _, params = load_flux(MODEL)
    want = load_file(MODEL / NAME)
    got = dict(to_torch(params, DIFFUSERS))
    assert got.keys() == want.keys() == Tensors(MODEL).keys()
    for key in want:
        np.testing.assert_array_equal(got[key], want[key])


class Patches(nnx.Module):
    """What the tables of other families need: a stack that torch numbers from 3, a bare tensor, a
    convolution held as a product of patches, and a fused projection.
    """

    def __init__(self, config, rngs):
        kw = {"dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": rngs}
        self.img_in = Linear(12, 5, **kw)
        self.pos = nnx.Param(jnp.zeros((1, 4, 5)))
        self.joint = nnx.Dict(qkv=Linear(5, (3, 5), stack=(2,), **kw))


PATCHES = Table(
    rows=table_rows({"img_in": "pos_embed.proj", "pos": "pos_embed.pos_embed"})
    | table_rows({"joint.qkv": ("blocks.{}.to_q", "blocks.{}.to_k", "blocks.{}.to_v")}, first=3),
    fused={"qkv.kernel": -2, "qkv.bias": -2},
    bare=frozenset({"pos"}),
    windows={"img_in": (2, 2)},
)


def test_stacks_from_another_layer_bare_tensors_and_patches(tmp_path):
    rng = np.random.default_rng(0)
    shapes = {"pos_embed.proj.weight": (5, 3, 2, 2), "pos_embed.proj.bias": (5,)}
    shapes["pos_embed.pos_embed"] = (1, 4, 5)
    for layer in (3, 4):
        for name in ("to_q", "to_k", "to_v"):
            shapes[f"blocks.{layer}.{name}.weight"] = (5, 5)
            shapes[f"blocks.{layer}.{name}.bias"] = (5,)
    weights = {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}
    save_file(weights, tmp_path / "model.safetensors")

    state = load(Tensors(tmp_path / "model.safetensors"), abstract(Patches, None)[1], PATCHES)
    ours = leaves(state)
    picture = rng.standard_normal((3, 2, 2), np.float32)
    convolved = np.einsum("ocij,cij->o", weights["pos_embed.proj.weight"], picture)
    np.testing.assert_allclose(picture.ravel() @ ours["img_in.kernel"], convolved, rtol=1e-5)
    np.testing.assert_array_equal(ours["pos"], weights["pos_embed.pos_embed"])
    np.testing.assert_array_equal(
        ours["joint.qkv.kernel"][1, :, 2], weights["blocks.4.to_v.weight"].T
    )

    again = dict(to_torch(state, PATCHES))
    assert again.keys() == weights.keys()
    for key, value in weights.items():
        np.testing.assert_array_equal(again[key], value, err_msg=key)


def test_a_row_that_is_missing_is_named():
    rows = {name: parts for name, parts in PATCHES.rows.items() if name != "img_in"}
    tensors = Tensors(MODEL)
    with pytest.raises(ValueError, match=r"no row of the family's table fills img_in\.bias"):
        load(tensors, abstract(Patches, None)[1], Table(rows, PATCHES.fused))
