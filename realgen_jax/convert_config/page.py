"""The tables of docs/from_elsewhere.md, as Markdown."""

from collections.abc import Mapping

from realgen_jax.convert_config.flow_factory import FLOW_FACTORY
from realgen_jax.convert_config.keys import FLOW_GRPO, REALGEN, REWARDS, Key


def tables() -> str:
    """Return a section for each project, and for the rewards."""
    return "\n".join(
        [
            "## Flow-GRPO\n",
            key_table(FLOW_GRPO),
            "## RealGen\n",
            "All keys of Flow-GRPO, and\n",
            key_table(REALGEN),
            "## Rewards of both\n",
            "| theirs | `config.reward.fn` | options to start from |",
            "|---|---|---|",
            *(
                f"| `{name}` | `{ours}` | {shown(options)} |"
                for name, (ours, options) in REWARDS.items()
            ),
            "",
            "## Flow-Factory\n",
            "The YAML file is not converted. Write [a config](configs.md) by this table.\n",
            key_table(FLOW_FACTORY),
        ]
    )


def key_table(keys: Mapping[str, Key]) -> str:
    """Return the rows of a project's keys."""
    rows = ["| theirs | ours | note |", "|---|---|---|"]
    for name, key in keys.items():
        ours = ", ".join(f"`config.{own}`" for own in key.ours)
        rows.append(f"| `{name}` | {ours or 'none'} | {key.note} |")
    return "\n".join([*rows, ""])


def shown(options: Mapping[str, object]) -> str:
    """Return a reward's options."""
    return ", ".join(f"`{name}={value!r}`" for name, value in options.items()) or "none"
