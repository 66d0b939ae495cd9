"""Compiled programs of small models, to compare the formulas of cost.py with XLA's own figures."""

import json
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

from realgen_configs.flux_grpo import get_config
from realgen_jax.models import cost
from realgen_jax.preflight.report import QUICK, lowered, make_report


@dataclass(frozen=True)
class Case:
    """A model and a batch; heads have 64 channels."""

    blocks: tuple[int, int]  # of two kinds, which each family's test names
    heads: int
    text: int  # tokens
    pixels: int  # a side
    images: int
    vae: tuple[int, ...]  # widths
    rank: int


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def write_model(folder, pipeline, transformer, schedule, vae_widths):
    """What abstract_model reads of a model: the config.json files, no weights."""
    vae = {
        "_class_name": "AutoencoderKL",
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "block_out_channels": vae_widths,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    }
    files = {
        "transformer/config.json": transformer,
        "vae/config.json": vae,
        "scheduler/scheduler_config.json": schedule,
        "model_index.json": {"_class_name": pipeline},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))


def report_of(
    folder,
    case,
    *,
    remat="full",
    lora=True,
    beta=0.0,
    calls=1,
    mesh=(1, 1, 1),
    branches=1,
    guidance=1.0,
    gradient="",
    quantization="",
):
    """The report of a run with the model in `folder`, with attention and fusions as on a CPU.

    case: has text (tokens), pixels (a side), images (of a call) and rank. guidance, gradient: of
    classifier-free guidance.
    """
    config = get_config().unlock()
    config.pretrained.model = str(folder)
    config.pretrained.remat = remat
    config.pretrained.quantization = quantization
    config.prompts.max_tokens = case.text
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
    config.sample.update(
        width=case.pixels,
        height=case.pixels,
        num_steps=4,
        sde_window_size=calls,
        sde_window_range=(0, 3),
        train_batch_size=case.images,
        num_image_per_prompt=case.images,
        num_batches_per_epoch=calls,
        branches=branches,
        guidance_scale=guidance,
    )
    config.train.update(
        lora=lora,
        beta=beta,
        lora_rank=case.rank,
        gradient_accumulation_steps=calls,
        cfg_gradient=gradient,
    )
    report = make_report(config, int(np.prod(mesh)))
    return replace(report, work=replace(report.work, flash=False, fused=False))


def compile_programs(report):
    """XLA's figures of the two large programs."""
    programs = {name: program.compile(QUICK) for name, program in lowered(report).items()}
    return SimpleNamespace(report=report, **programs)


def compiled_cases(case_report, cases):
    """A fixture, compiled(case, ...): the compiled programs of a case, shared by a test file."""

    @pytest.fixture(scope="module")
    def compiled(tmp_path_factory):
        @cache
        def build(name, **options):
            folder = tmp_path_factory.mktemp("model")
            return compile_programs(case_report(folder, cases[name], **options))

        return build

    return compiled


def assert_peaks_are_xlas(programs, devices=1, sampling=True):
    """Bytes of activations: of the update with its gradients, and of sampling."""
    report = programs.report
    phases = cost.phase_bytes(report.work, devices, report.held["trained"])
    update = phases["update"]["activations"] + phases["update"]["gradients"]
    assert_near(update, temporaries(programs.update), 0.15)
    if sampling:
        assert_near(phases["sample"]["activations"], temporaries(programs.sample), 0.15)


def temporaries(program):
    """Bytes of a compiled program's temporary arrays."""
    return program.memory_analysis().temp_size_in_bytes


def assert_near(formula, xla, tolerance):
    message = f"formula {formula:.4g}, XLA {xla:.4g}: {formula / xla - 1:+.1%}"
    print(message)  # pytest -s shows how near
    assert formula == pytest.approx(xla, rel=tolerance), message
