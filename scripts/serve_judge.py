"""A local stand-in for a hosted judge: a reward behind an OpenAI-compatible endpoint.

    python scripts/serve_judge.py                             the embedded held-out detector
    python scripts/serve_judge.py --reward=effort --device=cuda:0

Use it to try `scripts/evaluate.py --judge=api`, or any other program that compares two pictures
through such an endpoint. `--judge=embedded` needs no server.
"""

from realgen_jax import process

process.begin(__name__)  # before the imports that take seconds

import signal
import sys
import threading
from collections.abc import Sequence

from absl import app, flags

from realgen_jax.command_line import refuse_words
from reward_bridge.judges.reward import EMBEDDED, MARGIN
from reward_bridge.judges.stand_in import serving

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "reward", EMBEDDED, "the reward that scores the pictures, a name of reward_bridge/rewards"
)
flags.DEFINE_string("device", "cpu", "torch device of the reward")
flags.DEFINE_integer("port", 8018, "port to listen on; 0 takes a free one", 0, 65535)
flags.DEFINE_float("margin", MARGIN, "scores that differ by less are a tie", lower_bound=0.0)


def run(argv: Sequence[str]) -> None:
    """Serve until Ctrl-C."""
    refuse_words(argv)
    try:
        with serving(FLAGS.reward, FLAGS.port, FLAGS.device, FLAGS.margin) as address:
            print(
                f"{FLAGS.reward} judges at {address}\n"
                f"check  curl {address}/models\n"
                f"use    REALGEN_JUDGE_URL={address} REALGEN_JUDGE_MODEL={FLAGS.reward} "
                "python scripts/evaluate.py --judge=api ...\n"
                "stop   Ctrl-C",
            )
            process.on_signal(signal.SIGINT, lambda _: process.leave("stopped", 0))
            threading.Event().wait()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def main() -> None:
    app.run(run)


if __name__ == "__main__":
    main()
