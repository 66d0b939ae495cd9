import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from reward_bridge.weights import find, load_strict, read, rename, torch_dtype
from tests.helpers.faults import missing

STATE = {"a.weight": torch.arange(6.0).view(3, 2), "a.bias": torch.ones(3)}


def same(got, want):
    return got.keys() == want.keys() and all(got[key].equal(want[key]) for key in want)


def test_dtypes_by_name():
    assert torch_dtype("bfloat16") is torch.bfloat16
    for name in ("fp16", "half"):
        with pytest.raises(
            ValueError, match=rf"got dtype '{name}'; expected one of float32, bfloat16, float16"
        ):
            torch_dtype(name)


def test_find_takes_a_file_or_the_first_name_in_a_folder(tmp_path):
    for name in ("a.pt", "._a.pt", "model.safetensors"):
        (tmp_path / name).touch()
    assert find(str(tmp_path / "a.pt"), "x.path", "model.safetensors") == tmp_path / "a.pt"
    assert find(str(tmp_path), "x.path", "*.bin", "*.pt", "model.safetensors") == tmp_path / "a.pt"
    message = (
        r"neither a file nor a folder with \*\.bin or \*\.pth; set config\.reward\.options\.x\.path"
    )
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=message):
            find(str(path), "x.path", "*.bin", "*.pth")


def test_find_refuses_to_choose(tmp_path):
    for name in ("a.pt", "b.pt", "model.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).touch()
    for name, both in (("*.pt", "a.pt and b.pt"), ("model.safetensors", "model.safetensors and m")):
        with pytest.raises(ValueError, match=rf"holds {both}.*; set config\.reward\.options\.x\.p"):
            find(str(tmp_path), "x.path", name)


def test_find_knows_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.pt").touch()
    assert find("~/a.pt", "x.path", "*.pt") == tmp_path / "a.pt"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "epoch": 3, "args": {"lr": 0.1}},
        lambda state: {"state_dict": state},
        lambda state: {"module": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
        lambda state: {key.replace("a.", "a._orig_mod."): value for key, value in state.items()},
        lambda state: {
            "epoch": 3,
            "model_state_dict": state,
            "optimizer_state_dict": {"state": {}},
        },
        lambda state: {"state_dict": state, "model": {"width": 3}, "best_acc": np.float64(0.9)},
        lambda state: {"params": state, "history": np.arange(3), "rng": torch.get_rng_state()},
        lambda state: {
            "state_dict": state,
            "callbacks": {"ModelCheckpoint": {"best_k_models": {"x.ckpt": torch.ones(())}}},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
        },
    ],
)
@pytest.mark.parametrize("name", ["x.pth", "x.bin", "x.ckpt"])
def test_read_unwraps(tmp_path, name, wrap):
    torch.save(wrap(STATE), tmp_path / name)
    assert same(read(tmp_path / name), STATE)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
def test_read_safetensors(tmp_path, prefix):
    state = {f"{prefix}{key}": value for key, value in STATE.items()}
    save_file(state, tmp_path / "x.safetensors")
    assert same(read(tmp_path / "x.safetensors"), STATE)


def test_names_that_differ_only_by_a_prefix_are_refused(tmp_path):
    save_file({**STATE, "module.a.bias": torch.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors holds 'a\.bias' twice"):
        read(tmp_path / "x.safetensors")


@pytest.mark.parametrize("names", [("model", "model_ema"), ("params", "params_ema")])
def test_read_refuses_to_choose_between_sets_of_weights(tmp_path, names):
    torch.save(dict.fromkeys(names, STATE), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=rf"several sets of weights \({', '.join(names)}\); save"):
        read(tmp_path / "x.pth")


def write_shards(folder, kind="safetensors"):
    """The two tensors of STATE in a file each; returns their index."""
    file_of = {}
    for number, (key, value) in enumerate(STATE.items(), start=1):
        file_of[key] = f"model-0000{number}-of-00002.{kind}"
        write = save_file if kind == "safetensors" else torch.save
        write({key: value}, folder / file_of[key])
    index = folder / f"model.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_read_shards(tmp_path, kind):
    index = write_shards(tmp_path, kind)
    for name in (f"model.{kind}", f"*.{kind}"):
        assert find(str(tmp_path), "x.path", name) == index
    assert same(read(index), STATE)


def test_shards_that_are_not_whole_are_named(tmp_path):
    index = write_shards(tmp_path)
    first, second = sorted(tmp_path.glob("model-*"))
    message = rf"lacks 1 of the 2 .* such as {second.name}"
    with missing(second), pytest.raises(FileNotFoundError, match=message):
        read(index)
    message = rf"\(the index of {first.name} is missing\)"
    with missing(index), pytest.raises(FileNotFoundError, match=message):
        find(str(tmp_path), "x.path", "model.safetensors")
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=rf"{second.name} lacks 'a\.bias', which {index.name}"):
        read(index)
    second.write_bytes(first.read_bytes()[:-4])
    with pytest.raises(ValueError, match=rf"{second.name} cannot be read .* incomplete download"):
        read(index)
    for content in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}'):
        index.write_text(content)
        with pytest.raises(ValueError, match=rf"{index.name} is no index of shards"):
            read(index)


def test_numbers_of_numpy_1_are_read(tmp_path):
    """Its functions are in numpy.core, those of NumPy 2 in numpy._core."""
    torch.save({"model": STATE, "best": np.float32(0.5), "all": np.ones(2)}, tmp_path / "new.pth")
    source = zipfile.ZipFile(tmp_path / "new.pth")
    with source, zipfile.ZipFile(tmp_path / "old.pth", "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b"numpy._core", b"numpy.core"))
    assert b"numpy.core.multiarray" in (tmp_path / "old.pth").read_bytes()
    assert same(read(tmp_path / "old.pth"), STATE)


def test_pickled_objects_are_named_in_one_line(tmp_path):
    torch.save({"model": STATE, "path": Path("x")}, tmp_path / "x.ckpt")
    with pytest.raises(
        ValueError, match=r"it holds a pickled pathlib\.PosixPath, .*; save"
    ) as error:
        read(tmp_path / "x.ckpt")
    assert not {"\n", "\x1b"} & set(str(error.value))


def test_torchscript_is_named(tmp_path, recwarn):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/constants.pkl", b"")
    with pytest.raises(
        ValueError, match=r"x\.pt cannot be read .*: it is TorchScript, which holds"
    ):
        read(tmp_path / "x.pt")
    assert not recwarn


class Payload:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize(
    "dump", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value))]
)
def test_read_executes_nothing(tmp_path, dump):
    trace = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.exists()
    trace.unlink()
    dump({"model": STATE, "extra": Payload(trace)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth cannot be read by safetensors or torch"):
        read(tmp_path / "x.pth")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        ({**STATE, "epoch": 3}, "'epoch'"),
        ([1, 2], r"\[1, 2\]"),
        ({"model": {"a": {}}}, "'model'"),
        ({3: torch.ones(1)}, "3"),
    ],
)
def test_read_wants_a_table_of_tensors(tmp_path, value, seen):
    torch.save(value, tmp_path / "x.pth")
    with pytest.raises(
        ValueError, match=rf"x\.pth does not hold a table of tensors \(see {seen}\)"
    ):
        read(tmp_path / "x.pth")


def test_read_reads_files_from_before_torch_1_6(tmp_path):
    torch.save(STATE, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert same(read(tmp_path / "x.pth"), STATE)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.pth", b"", r"an incomplete download \(0 bytes\)"),
        ("x.safetensors", b"\x10" + bytes(7) + b"{", r"an incomplete download \(9 bytes\)"),
        ("x.pth", b"<html>", "it is a web page"),
        ("x.bin", b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer"),
        ("x.bin", b"GGUF\x03" + bytes(40), "it is GGUF"),
        ("x.onnx", b"\x08\x07\x12" + bytes(40), "it is ONNX"),
        ("x.h5", b"\x89HDF\r\n", "it is HDF5"),
        ("x.msgpack", b"\x83\xa6params", "it is msgpack"),
    ],
)
def test_read_names_a_file_that_is_something_else(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    message = (
        rf"{name} cannot be read by safetensors or torch\.load\(weights_only=True\): .*{reason}"
    )
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


TABLE = [(r"a\.(weight|bias)", r"b.\1"), (r"old\..*", None), (r"a\.weight", "never")]


def test_rename_takes_the_first_rule_that_matches_a_whole_key():
    got = rename({**STATE, "old.buffer": torch.ones(1)}, TABLE, "x.pth")
    assert same(got, {"b.weight": STATE["a.weight"], "b.bias": STATE["a.bias"]})


@pytest.mark.parametrize("key", ["c.weight", "xa.weight", "a.weights", "old"])
def test_rename_names_a_key_that_no_rule_knows(key):
    with pytest.raises(
        ValueError, match=rf"x\.pth has 1 keys that do not belong to this model, such as '{key}'"
    ):
        rename({**STATE, key: torch.ones(1)}, TABLE, "x.pth")


def test_load_strict_fills_and_freezes():
    module = nn.ModuleDict({"a": nn.Linear(2, 3)}).half()
    loaded = load_strict(module, STATE, "x.pth")
    assert loaded is module
    assert loaded.a.weight.dtype == torch.float16
    assert same({key: value.float() for key, value in loaded.state_dict().items()}, STATE)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_load_strict_names_what_does_not_fit():
    def load(state):
        return load_strict(nn.ModuleDict({"a": nn.Linear(2, 3)}), state, "x.pth")

    with pytest.raises(
        ValueError, match=r"x\.pth does not fit ModuleDict: 1 keys missing, such as 'a\.bias'$"
    ):
        load({"a.weight": STATE["a.weight"]})
    with pytest.raises(
        ValueError, match=r"x\.pth does not fit ModuleDict: 1 unexpected keys, such as 'b'$"
    ):
        load({**STATE, "b": torch.ones(1)})
    with pytest.raises(ValueError, match=r": a\.weight has shape \(2, 3\), expected \(3, 2\)$"):
        load({**STATE, "a.weight": torch.ones(2, 3)})
    both = r"2 keys missing, such as 'a\.weight'; 1 unexpected keys, such as 'A\.weight'$"
    with pytest.raises(ValueError, match=both):
        load({"A.weight": STATE["a.weight"]})
    with pytest.raises(ValueError, match=r"a\.bias has torch\.uint8, expected torch\.float32$"):
        load({**STATE, "a.bias": STATE["a.bias"].byte()})
