"""The flag --config and the rest of a command line: what is read, and what is refused."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from absl import flags

from realgen_configs import serve_rewards
from realgen_jax.command_line import define_config, parse_flags
from realgen_jax.config_ranges import SERVER_RANGES

PROGRAM = '''"""A program with a config."""

from absl import app, flags

from realgen_jax.command_line import define_config, parse_flags

define_config("embedded")


def run(_):
    config = flags.FLAGS.config
    print(config.preset, config.train.learning_rate)


app.run(run, flags_parser=parse_flags)
'''


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (["--config.train.learning_rate=2"], "tiny 2.0\n"),
        (["--help"], "A program with a config.\n"),
        (["--config.num_epochs=x"], "error: config.num_epochs is 'x'; expected an integer, 0 or"),
    ],
)
def test_a_program(tmp_path, arguments, output):
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "program.py", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stderr + done.stdout).startswith(output)
    assert done.returncode == output.startswith("error")


@pytest.fixture
def parse(monkeypatch):
    """Parse a command line as a program does; returns its config and its words."""

    def parse(*arguments, default="embedded", words=False, **template):
        argv = ["program.py", *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
        define_config(default, **template)
        flags.DEFINE_bool("resume", False, "", flag_values=flags.FLAGS)
        flags.DEFINE_float("share", 0.0, "", 0.0, 1.0, flag_values=flags.FLAGS)
        rest = parse_flags(argv, words=words)
        return SimpleNamespace(config=flags.FLAGS.config, words=rest[1:])

    return parse


def refusal(parse, *arguments, **options):
    """The line that a program ends with."""
    with pytest.raises(SystemExit) as error:
        parse(*arguments, **options)
    assert "\n" not in error.value.code
    return error.value.code


def test_config_and_preset(parse):
    assert parse().config.preset == "tiny"
    assert parse("--config=flux_grpo:tiny_soft").config.preset == "tiny_soft"
    assert parse("--config", "flux_grpo", "--resume").config.preset == "tiny"
    assert refusal(parse, default=None).startswith("error: no config; name one")
    twice = refusal(parse, "--config", "flux_grpo", "--config=embedded")
    assert twice == "error: --config is given 2 times; name one config"
    assert refusal(parse, "--config.seed=1", default=None).startswith("error: no config; name one")


def test_the_size_of_evaluations_follows_that_of_rollouts(parse):
    config = parse("--config.sample.width=128").config
    assert (config.evaluate.sample.width, config.evaluate.sample.height) == (128, 64)
    own = ("--config.evaluate.sample.width=256", "--config.sample.width=128")
    config = parse(*own).config
    assert (config.sample.width, config.evaluate.sample.width) == (128, 256)
    assert refusal(parse, "--config.sample.resolution=64") == (
        "error: the config has no key sample.resolution; it is now config.sample.width and "
        "config.sample.height"
    )
    refused = refusal(parse, "--config.evaluate.sample.width=x")
    assert refused == "error: config.evaluate.sample.width is 'x'; expected an integer, 1 or more"


def test_words_that_are_no_flags(parse):
    assert parse("a", "--config.seed=1", "b c", words=True).words == ["a", "b c"]
    refused = "; this program takes only flags"
    assert refusal(parse, "x y") == f"error: unexpected argument 'x y'{refused}"
    assert refusal(parse, "resume") == (
        f"error: unexpected argument 'resume'{refused}; did you mean --resume?"
    )
    # A blank after a line's backslash, and a value that belongs to no flag.
    assert refusal(parse, "--config.seed=1", " ") == f"error: unexpected argument ' '{refused}"
    assert "unexpected argument 'False'" in refusal(parse, "--config.train.lora", "False")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a", ("a",)),
        ("a,b", ("a", "b")),
        ("a, b", ("a", "b")),
        ("('a', 'b')", ("a", "b")),
        ("['a']", ("a",)),
        ("http://a:1,http://b:2", ("http://a:1", "http://b:2")),
        ("", ()),
        ("()", ()),
    ],
)
def test_tuples(parse, text, value):
    """The last value wins, as for other keys. It never adds to the config's own value."""
    assert parse(f"--config.reward.held_out={text}").config.reward.held_out == value
    twice = parse("--config.reward.held_out=x,y", f"--config.reward.held_out={text}")
    assert twice.config.reward.held_out == value


def test_numbers_in_tuples(parse):
    config = parse("--config.profile.steps=3", "--config.sample.sde_window_range=1,7").config
    assert config.profile.steps == (3,)
    assert config.sample.sde_window_range == (1, 7)


MISTAKES = {
    "--config=nothing": "--config nothing: no such file and no shipped config; shipped are ",
    "--config=serve_rewards": "serve_rewards lacks the keys compilation_cache, ",
    "--confg=flux_grpo": "Unknown command line flag 'confg'. Did you mean: config",
    "--config.train.lerning_rate=1": (
        "the config has no key train.lerning_rate; did you mean train.learning_rate?"
    ),
    "--config.learning_rate=1": (
        "the config has no key learning_rate; did you mean train.learning_rate?"
    ),
    "--noconfig.train.lor": "the config has no key train.lor; did you mean train.lora?",
    "--config.train.beta.x=1": "the config has no key train.beta.x; did you mean train.beta?",
    "--config.reward.fn.jpeg_compressibility=1.0": (
        "the config has no key reward.fn.jpeg_compressibility; to add it, set the whole mapping: "
        "\"--config.reward.fn={'jpeg_compressibility': 1.0}\""
    ),
    "--config.reward.options.omniaid.path=models/omniaid": (
        "the config has no key reward.options.omniaid.path; to add it, set the whole mapping: "
        "\"--config.reward.options={'omniaid': {'path': 'models/omniaid'}}\""
    ),
    "--config.reward.options.clip_score.batch=3": (
        "the config has no key reward.options.clip_score.batch; to add it, set the whole mapping: "
        "\"--config.reward.options.clip_score={'batch': 3}\""
    ),
    "--config.reward.fn.my_rewards.bright=1": (
        "the config has no key reward.fn.my_rewards.bright. A reward of your own has a name "
        "without dots, and its class in its options: "
        "config.reward.options.NAME = {'class': 'package.module:Class'} (docs/rewards.md)"
    ),
    "--config.reward.fn={'my_rewards.bright': 1}": (
        "flag --config.reward.fn={'my_rewards.bright': 1}: ConfigDict does not accept dots"
    ),
    "--config.reward.fn=omniaid": (
        "config.reward.fn is 'omniaid'; expected a mapping, such as {'clip_score': 1.0}"
    ),
    "--config.reward.fn={'a': nan}": (
        "config.reward.fn is \"{'a': nan}\"; expected a mapping, such as {'clip_score': 1.0}"
    ),
    "--config.prompts.cache=/dev/null/text": (
        "config.prompts.cache is '/dev/null/text', which cannot be created: this user cannot "
        "write into /dev/null"
    ),
    "--share=nan": "--share is nan; expected a finite number",
    "--config.num_epochs=2.5": "config.num_epochs is '2.5'; expected an integer, 0 or more",
    "--config.train.lora=maybe": "config.train.lora is 'maybe'; expected True or False",
    "--config.train.beta=nan": "config.train.beta is nan; expected a finite number, 0 or more",
    "--config.run_name=../x": (
        "config.run_name is '../x'; expected the name of one folder, without / "
        "(config.run_root is its parent)"
    ),
}


@pytest.mark.parametrize(("argument", "message"), MISTAKES.items())
def test_a_mistake_is_one_line(parse, argument, message):
    assert refusal(parse, argument).startswith(f"error: {message}")


def test_all_values_out_of_range_are_named_at_once(parse):
    with pytest.raises(SystemExit) as error:
        parse("--config.seed=-1", "--config.reward.retries=-1")
    assert error.value.code.splitlines() == [
        "error: config.seed is -1; expected an integer, from 0 to 4294967295",
        "config.reward.retries is -1; expected an integer, 0 or more",
    ]


def test_another_template_has_its_own_ranges(parse):
    server = {"template": serve_rewards.base, "ranges": SERVER_RANGES, "default": "serve_rewards"}
    assert parse("--config.port=0", **server).config.port == 0
    assert refusal(parse, "--config.port=99999", **server) == (
        "error: config.port is 99999; expected an integer, from 0 to 65535"
    )


def test_a_user_without_a_home_folder(parse, monkeypatch):
    """As in a container: no HOME, and a user id without an entry in passwd."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert refusal(parse) == (
        "error: config.compilation_cache and config.prompts.cache: '~' is the user's home folder, "
        "and this user has none; set HOME, or name other folders: "
        "--config.compilation_cache=FOLDER --config.prompts.cache=FOLDER"
    )
    given = ("--config.compilation_cache=x", "--config.prompts.cache=y")
    assert parse(*given).config.prompts.cache == "y"
    assert "config.prompts.cache: '~'" in refusal(parse, given[0])
    assert "--config ~/x.py: no such file" in refusal(parse, "--config=~/x.py")
