"""The folder of a run: its name, its lock, and which config keys a resumed run may change."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from realgen_jax.config import base
from realgen_jax.training.inputs import check_unchanged, input_digests
from realgen_jax.training.run_folder import (
    can_resume,
    changed_keys,
    has_run,
    missing_records,
    resume_from,
    run_folder,
    run_lock,
    with_defaults,
    with_todays_keys,
    write_digests,
)
from tests.helpers import golden_config
from tests.helpers.faults import changed
from tests.helpers.goldens import PIPELINE, TESTS


def test_folders(tmp_path):
    root = str(tmp_path)
    fresh = run_folder(root, "", "tiny", resume=False)
    assert fresh.name.startswith("tiny-2")
    with pytest.raises(FileNotFoundError, match="holds no run of preset 'tiny' to resume"):
        run_folder(root, "", "tiny", resume=True)
    with pytest.raises(FileNotFoundError, match=r"x cannot be resumed: it has no config\.json"):
        run_folder(root, "x", "tiny", resume=True)

    # A folder without config.json holds nothing that could be lost.
    (tmp_path / "x").mkdir()
    assert run_folder(root, "x", "tiny", resume=False) == tmp_path / "x"
    (tmp_path / "x" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="x already holds a run; continue it with --resume"):
        run_folder(root, "x", "tiny", resume=False)
    (tmp_path / "x" / "config.json").unlink()

    for name in ("tiny-1", "tiny-2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert run_folder(root, "", "tiny", resume=True).name == "tiny-2"


def test_a_preset_may_have_brackets(tmp_path):
    (tmp_path / "my[0]-1").mkdir()
    (tmp_path / "my[0]-1" / "config.json").write_text("{}")
    assert run_folder(str(tmp_path), "", "my[0]", resume=True).name == "my[0]-1"


def test_auto_resume_needs_a_name(tmp_path):
    with pytest.raises(ValueError, match="--auto_resume needs the name of the run"):
        can_resume(str(tmp_path), "")
    assert not can_resume(str(tmp_path), "x")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text("{}")
    assert can_resume(str(tmp_path), "x")


def test_records_that_a_moved_folder_lacks_are_named(tmp_path):
    """With its checkpoints a run can go on; without them and its config it cannot."""
    for name in ("samples", "checkpoints", "tensorboard"):
        (tmp_path / name).mkdir()
    for name in ("config.json", "metrics.jsonl", "trainable.txt", "samples/start.npz"):
        (tmp_path / name).touch()
    assert missing_records(tmp_path, has_best=False) == []
    end = "; the run goes on without what was in there"
    assert missing_records(tmp_path, has_best=True) == [f"{tmp_path} lacks best{end}"]

    (tmp_path / "config.json").unlink()
    shutil.rmtree(tmp_path / "samples")
    (line,) = missing_records(tmp_path, has_best=False)
    assert line == f"{tmp_path} lacks config.json, samples/start.npz{end}"
    assert has_run(tmp_path)
    assert run_folder(str(tmp_path.parent), tmp_path.name, "tiny", resume=True) == tmp_path
    with pytest.raises(FileNotFoundError, match=r"neither a good checkpoint nor config\.json"):
        resume_from(tmp_path, base(), {}, allow_change=False)


def test_a_changed_config_is_named_key_by_key():
    before = {
        "seed": 1,
        "num_epochs": 3,
        "train": {"lr": 0.1, "range": [0, 7]},
        "mesh": {"fsdp": 1},
    }
    now = {**before, "train": {"lr": 0.1, "range": (0, 7)}}
    assert changed_keys(before, now, {}, {}) == ([], [])

    reward = {
        "devices": {"omniaid": "cuda:6"},
        "batch_size": 8,
        "options": {"omniaid": {"servers": ["http://a:1"]}},
    }
    changes = {"num_epochs": 9, "mesh": {"fsdp": 2}, "reward": reward}
    free, others = changed_keys(before, {**now, **changes}, {}, {})
    assert "  config.mesh.fsdp: was 1, is now 2" in free
    assert (len(free), others) == (5, [])

    # A key that is younger than the checkpoint
    free, others = changed_keys(before, {**before, "profile": {"steps": (3,)}}, {}, {})
    assert (free, others) == (["  config.profile.steps: was None, is now [3]"], [])

    reward = {"options": {"omniaid": {"path": "x"}}}
    free, others = changed_keys(before, {**before, "reward": reward}, {}, {})
    assert (free, others) == ([], ["  config.reward.options.omniaid.path: was None, is now 'x'"])

    free, others = changed_keys(before, {**before, "train": {"lr": 0.2}, "new": 1}, {}, {})
    assert free == []
    assert others == [
        "  config.new: was None, is now 1",
        "  config.train.lr: was 0.1, is now 0.2",
        "  config.train.range: was [0, 7], is now None",
    ]


def test_an_older_run_has_one_size_and_evaluations_of_first_order():
    """It goes on unless a size, the steps or the solver of evaluations differ."""
    old = {
        "sample": {"resolution": 64, "eval_num_steps": 28, "num_steps": 10},
        "evaluate": {"sample": {"guidance_scale": 3.5}, "resamples": 10},
    }
    own = {"width": 64, "height": 64, "num_steps": 28, "solver": "euler", "guidance_scale": 3.5}
    own["tuned_share"] = 1.0
    now = {
        "sample": {"width": 64, "height": 64, "buckets": (), "num_steps": 10},
        "evaluate": {"sample": own, "resamples": 20},
    }
    free, others = changed_keys(with_todays_keys(old), now, {}, {})
    assert (len(free), others) == (1, [])
    assert with_todays_keys(now) == now

    now["evaluate"] = {"sample": {**own, "solver": "dpm2", "width": 128}, "resamples": 10}
    free, others = changed_keys(with_todays_keys(old), now, {}, {})
    assert free == []
    assert others == [
        "  config.evaluate.sample.solver: was 'euler', is now 'dpm2'",
        "  config.evaluate.sample.width: was 64, is now 128",
    ]


def test_a_run_of_before_a_key_has_its_default():
    defaults = {"seed": 0, "sample": {"steps": 10, "scout": {"previews": 0}}, "fn": {}}
    before = {"sample": {"steps": 4}, "fn": {"clip": 1.0}}
    assert with_defaults(before, defaults) == {
        "seed": 0,
        "sample": {"steps": 4, "scout": {"previews": 0}},
        "fn": {"clip": 1.0},
    }


BEFORE = {
    "prompts": {"train": "p.txt"},
    "pretrained": {"model": "/old/model"},
    "evaluate": {"prompts": {"short": "s.jsonl"}},
    "reward": {
        "options": {
            "clip": {"path": "/old/clip", "scale": 1.0},
            "far": {"servers": ["http://a:1"]},
        }
    },
}
DIGESTS = {
    "prompts.train": "1" * 64,
    "pretrained.model": "2" * 64,
    "evaluate.prompts.short": "3" * 64,
    "reward.options.clip": "4" * 64,
    "reward.options.far": "5" * 64,
}


def test_files_compare_by_what_they_hold_not_by_where_they_are():
    options = {"clip": {"path": "/new/clip", "scale": 1.0}, "far": {"servers": ["http://b:1"]}}
    moved = {
        **BEFORE,
        "prompts": {"train": "elsewhere/p.txt"},
        "pretrained": {"model": "/new/model"},
        "reward": {"options": options},
    }
    free, others = changed_keys(BEFORE, moved, DIGESTS, DIGESTS)
    assert (len(free), others) == (4, [])

    # Without digests, as a run of an older version, the paths count.
    free, others = changed_keys(BEFORE, moved, {}, DIGESTS)
    assert (len(free), len(others)) == (1, 3)


@pytest.mark.parametrize("key", ["prompts.train", "pretrained.model", "reward.options.far"])
def test_other_content_in_the_same_place_is_named(key):
    now = {**DIGESTS, key: "6" * 64}
    what = {"prompts.train": "'p.txt'", "pretrained.model": "'/old/model'"}
    named = what.get(key, "what it names, here or on servers,")
    line = f"  config.{key}: {named} has other content; its digest was "
    was = DIGESTS[key][:16]
    changes = changed_keys(BEFORE, BEFORE, DIGESTS, now)
    assert changes == ([], [f"{line}{was}, is now 6666666666666666"])
    del now[key]
    changes = changed_keys(BEFORE, BEFORE, DIGESTS, now)
    assert changes == ([], [f"{line}{was}, is now unknown"])


def test_report_prompts_may_change():
    now = {**DIGESTS, "evaluate.prompts.short": "6" * 64}
    free, others = changed_keys(BEFORE, BEFORE, DIGESTS, now)
    assert (len(free), others) == (1, [])
    del now["evaluate.prompts.short"]
    assert changed_keys(BEFORE, BEFORE, DIGESTS, now) == ([], [])


def test_a_run_without_a_checkpoint_is_compared_too(tmp_path, capsys):
    config = base()
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert resume_from(tmp_path, config, DIGESTS, allow_change=False) is None
    assert "does not tell the digests of the files" in capsys.readouterr().out

    write_digests(tmp_path, DIGESTS)
    now = {**DIGESTS, "prompts.train": "6" * 64}
    assert resume_from(tmp_path, config, DIGESTS, allow_change=False) is None
    assert "warning" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"config\.prompts\.train: '' has other content"):
        resume_from(tmp_path, config, now, allow_change=False)
    assert resume_from(tmp_path, config, now, allow_change=True) is None
    assert "config.prompts.train: '' has other content; its" in capsys.readouterr().out

    for name in ("config.json", "digests.json"):
        with changed(tmp_path / name):
            os.truncate(tmp_path / name, 3)
            with pytest.raises(ValueError, match=rf"{name} is damaged"):
                resume_from(tmp_path, config, DIGESTS, allow_change=False)


def test_the_digests_of_a_run_are_those_of_what_it_reads(tmp_path):
    config = golden_config.get_config().unlock()
    digests = input_digests(config)
    assert sorted(digests) == ["pretrained.model", "prompts.test", "prompts.train"]

    # A copy elsewhere is the same; every part of the model counts.
    model = shutil.copytree(PIPELINE, tmp_path / "model")
    config.pretrained.model = str(model)
    check_unchanged(digests, input_digests(config))
    parts = [file for file in sorted(model.rglob("*")) if file.is_file()]
    assert len(parts) > 12
    for file in parts:
        with changed(file), contextlib.suppress(ValueError):  # model_index.json must stay readable
            assert input_digests(config)["pretrained.model"] != digests["pretrained.model"], file

    # The report's prompts, if there will be one; a transformer and a LoRA of their own.
    prompts = shutil.copy(TESTS / "data" / "test.jsonl", tmp_path)
    config.evaluate.after_training = True
    config.evaluate.prompts = {"short": prompts}
    config.pretrained.transformer = str(model / "transformer")
    config.pretrained.lora = str(model / "vae")
    more = input_digests(config)
    assert more["evaluate.prompts.short"] == digests["prompts.test"]
    assert more["pretrained.transformer"] != more["pretrained.lora"]
    with changed(Path(prompts)), pytest.raises(ValueError, match=r"of what config\.evaluate\.prom"):
        check_unchanged(more, input_digests(config))

    shutil.rmtree(model / "tokenizer")
    with pytest.raises(FileNotFoundError, match="tokenizer is missing; expected a pipeline folder"):
        input_digests(config)


def test_a_folder_has_one_run_at_a_time_and_a_kill_frees_it(tmp_path):
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from realgen_jax.training.run_folder import run_lock\n"
        "with run_lock(Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    folder = tmp_path / "runs" / "x"
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    message = "x is in use: a run with this name is active; wait until it ends"
    with pytest.raises(FileExistsError, match=message), run_lock(folder):
        pass
    other.kill()
    other.wait()

    with run_lock(folder):
        (folder / "config.json").write_text("{}")
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "lock"]


def test_a_folder_that_stays_empty_is_removed(tmp_path):
    with pytest.raises(ValueError, match="wrong"), run_lock(tmp_path / "y"):
        raise ValueError("wrong")
    assert not (tmp_path / "y").exists()
