"""The text encoders of an image model in memory."""

import threading
import time

import numpy as np
import pytest
import torch

from realgen_jax.models.flux.family import FLUX
from reward_bridge import encoders
from reward_bridge.encoders import open_encoders, open_window
from reward_bridge.reward import RewardError
from tests.helpers.goldens import PIPELINE
from tests.helpers.text import SD3, SD3_ENCODERS, ZIMAGE, ZIMAGE_ENCODERS, fill, golden_prompts

TEXTS = ["a photo of a cat", "a red boat", "two dogs on a beach", "a cat", "a red cat at night"]


def opened(model=PIPELINE, own=FLUX.encoders, max_tokens=16, dtype="float32", **changes):
    options = {"deadline": 60.0, "retries": 0, "device": "cpu"} | changes
    return open_encoders(model, own, max_tokens=max_tokens, dtype=dtype, **options)


@pytest.fixture
def flux():
    resident = opened()
    yield resident
    resident.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("model", "own", "texts", "max_tokens"),
    [
        (PIPELINE, FLUX.encoders, TEXTS * 4, 16),
        (SD3, SD3_ENCODERS, golden_prompts(SD3), 16),
        (ZIMAGE, ZIMAGE_ENCODERS, golden_prompts(ZIMAGE), 96),
    ],
    ids=["flux", "sd3", "zimage"],
)
def test_arrays_are_those_of_the_cache_bit_for_bit(tmp_path, model, own, texts, max_tokens, dtype):
    texts = list(dict.fromkeys(f"{text} {i // 5}" for i, text in enumerate(texts)))
    stored = fill(tmp_path, model, own, texts, max_tokens, dtype).read(texts)
    resident = opened(model, own, max_tokens, dtype)
    arrays = resident.encode(texts).result()
    assert list(arrays) == [name for encoder in own for name in encoder.arrays]
    for name, array in arrays.items():
        want = stored[name]
        assert (array.dtype, len(array)) == (want.dtype, len(want))
        if name == "caption":  # of all texts in one shape, whatever their lengths
            assert array.shape[1] == 96
            assert not array[:, want.shape[1] :].any()
            array = array[:, : want.shape[1]]
        np.testing.assert_array_equal(array, want, err_msg=name)
    resident.close()


def test_what_the_image_model_reads_is_told_by_tokenizers_alone(monkeypatch):
    monkeypatch.setattr(encoders, "load_model", None)
    window = open_window(PIPELINE, FLUX.encoders, 8)
    short, long = window.count(["a cat", "a cat " * 10])
    assert short < 8 < long
    assert window.fits(["a cat", "a cat " * 10, "猫"]) == [True, False, False]
    assert window.fits([]) == []

    # Z-Image's chat template counts.
    chats = open_window(ZIMAGE, ZIMAGE_ENCODERS, 40)
    assert chats.count(golden_prompts(ZIMAGE)) == [44, 68, 18]
    assert chats.fits(golden_prompts(ZIMAGE)[:2]) == [False, False]

    # CLIP's 77 tokens do not count: FLUX and SD3 cut for it.
    assert open_window(PIPELINE, FLUX.encoders[1:], 8).count(["a cat " * 100]) == [0]


def test_a_list_that_takes_too_long_names_the_text_encoders(flux, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(encoders, "encode_batch", lambda *_: released.wait(20))
    flux.deadline = 0.1
    start = time.monotonic()
    message = r"^the text encoders did not answer within 0\.1 s \(config\.reward\.deadline\); its d"
    with pytest.raises(RewardError, match=message):
        flux.encode(TEXTS).result()
    assert time.monotonic() - start < 5
    released.set()


def test_a_failure_is_tried_again_and_then_named(flux, monkeypatch):
    encode_batch = encoders.encode_batch
    calls = []

    def flaky(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise OSError("busy")
        return encode_batch(*arguments)

    want = flux.encode(TEXTS).result()
    monkeypatch.setattr(encoders, "encode_batch", flaky)
    with pytest.raises(
        RewardError, match=r"the text encoders failed 1 times; .* OSError\('busy'\)"
    ):
        flux.encode(TEXTS).result()

    calls.clear()
    flux.retries = 1
    np.testing.assert_array_equal(flux.encode(TEXTS).result()["t5"], want["t5"])
    assert len(calls) == 2


def test_out_of_memory_halves_the_batch(flux, monkeypatch, caplog):
    encode_batch = encoders.encode_batch
    sizes = []

    def small(models, tokens, rows, texts):
        sizes.append(len(texts[rows]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode_batch(models, tokens, rows, texts)

    want = flux.encode(TEXTS).result()
    monkeypatch.setattr(encoders, "encode_batch", small)
    got = flux.encode(TEXTS).result()
    assert sizes == [5, 3, 2, 2, 1]
    assert "ran out of memory on 5 texts and continue with 3 at a time" in caplog.text
    for name, array in got.items():
        np.testing.assert_allclose(array, want[name], rtol=1e-5, atol=1e-6)

    def never(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(encoders, "encode_batch", never)
    with pytest.raises(RewardError, match=r"the text encoders failed .* out of memory"):
        flux.encode(TEXTS).result()


@pytest.mark.parametrize("retries", [0, 2])
def test_nan_is_an_error_that_is_not_tried_again(flux, retries):
    (_, t5), _ = flux._models
    flux.retries = retries
    with torch.no_grad():
        t5.shared.weight.fill_(torch.nan)
    message = (
        r"^text encoders: the text encoder of t5 gave NaN or infinity for one of the prompts f"
    )
    with pytest.raises(RewardError, match=message):
        flux.encode(TEXTS).result()


def test_lists_are_encoded_in_turn_and_time_is_counted(flux):
    pending = [flux.encode([text]) for text in TEXTS]
    rows = [texts.result()["clip"] for texts in pending]
    whole = flux.encode(TEXTS).result()["clip"]
    np.testing.assert_allclose(np.concatenate(rows), whole, rtol=1e-5, atol=1e-6)
    assert flux.seconds > 0
    with pytest.raises(ValueError, match="got no text"):
        flux.encode([])


def test_what_waits_when_they_are_closed_fails(monkeypatch):
    resident = opened()
    started, released = threading.Event(), threading.Event()

    def slow(*_):
        started.set()
        assert released.wait(20)
        return {"t5": np.zeros((1, 1))}

    monkeypatch.setattr(encoders, "encode_batch", slow)
    first = resident.encode(["a"])
    second = resident.encode(["b"])
    assert started.wait(20)
    threading.Timer(0.2, released.set).start()
    resident.close()
    assert first.result()["t5"].shape == (1, 1)
    with pytest.raises(RewardError, match="the text encoders were closed before these texts were"):
        second.result()


def test_a_device_without_room_is_named(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(encoders, "load_model", full)
    with pytest.raises(
        ValueError, match=r"^no room for the text encoders on cpu \(CUDA out of mem"
    ):
        opened()
    with pytest.raises(ValueError, match="there is no device 'cuda:9'"):
        opened(device="cuda:9")
