"""The text of a converted config file."""

from realgen_jax.convert_config.conversion import Conversion


def file_text(conversion: Conversion, source: str, preset: str) -> str:
    """Return the text of a config file of ours. source: the name of their file."""
    lines = [f'"""{source}, preset {preset}, by python -m realgen_jax.convert_config.', ""]
    lines += [*listing(conversion), '"""', "", "from ml_collections import ConfigDict", ""]
    helper = "adversary, base" if conversion.learners else "base"
    lines += [f"from realgen_jax.config import {helper}", "", "", "def get_config():"]
    lines += ["    c = base()", f'    c.preset = "{preset}"']
    for key, value in sorted(conversion.values.items()):
        shown = f"ConfigDict({value!r})" if isinstance(value, dict) else repr(value)
        lines.append(f"    c.{key} = {shown}")

    for name, settings in conversion.learners.items():
        lines += ["", f"    c.reward.adversarial.{name} = adversary()"]
        for key, value in settings.items():
            lines.append(f"    c.reward.adversarial.{name}.{key} = {value!r}")
    return "\n".join([*lines, "    return c", ""])


def listing(conversion: Conversion) -> list[str]:
    """Return lines about what differs and what is left out."""
    lines = ["Different:", *(f"- {remark}" for remark in conversion.remarks)]
    lines += ["", "Left out:"]
    return lines + [f"- {key}: {reason}" for key, reason in conversion.left_out.items()]
