"""How a script's flags are read: absl's, with ml_collections' config, but a mistake is told in one line."""

import sys

from absl import flags


def parse_flags(argv: list[str]) -> list[str]:
    """What is left of argv after the flags; exits where they, or the config they name, are wrong."""
    try:
        rest = flags.FLAGS(argv)
    except (
        flags.Error
    ) as error:  # an error inside the config's file comes with its traceback; its last line says it
        sys.exit(f"error: {str(error).strip().splitlines()[-1]}")
    except (AttributeError, KeyError) as error:
        while isinstance(error.args[0], Exception):  # ml_collections wraps its own message
            error = error.args[0]
        sys.exit(f"error: the config has no key {error.args[0]}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if flags.FLAGS.config is None:
        sys.exit("error: name a config: --config configs/flux_grpo.py")
    return rest
