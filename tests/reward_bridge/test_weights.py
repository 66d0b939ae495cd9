import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from reward_bridge.weights import find, load_strict, read, rename, torch_dtype

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
    for name in ("b.pt", "a.pt", "model.safetensors"):
        (tmp_path / name).touch()
    assert find(str(tmp_path / "b.pt"), "x.path", "model.safetensors") == tmp_path / "b.pt"
    assert find(str(tmp_path), "x.path", "*.bin", "*.pt", "model.safetensors") == tmp_path / "a.pt"
    message = (
        r"neither a file nor a folder with \*\.bin or \*\.pth; set config\.reward\.options\.x\.path"
    )
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=message):
            find(str(path), "x.path", "*.bin", "*.pth")


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
    ],
)
@pytest.mark.parametrize("name", ["x.pth", "x.bin"])
def test_read_unwraps(tmp_path, name, wrap):
    torch.save(wrap(STATE), tmp_path / name)
    assert same(read(tmp_path / name), STATE)


def test_read_safetensors(tmp_path):
    save_file(STATE, tmp_path / "x.safetensors")
    assert same(read(tmp_path / "x.safetensors"), STATE)


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
    [({**STATE, "epoch": 3}, "'epoch'"), ([1, 2], r"\[1, 2\]"), ({"model": {"a": {}}}, "'a'")],
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
    "content", [b"", b"<html>", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_read_names_a_file_that_is_something_else(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pth cannot be read by safetensors or torch"):
        read(tmp_path / "x.pth")


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
