"""The stand-in judge of the arena: a reward behind an OpenAI-compatible endpoint, for this machine only.

    python scripts/serve_judge.py                             the embedded held-out detector
    python scripts/serve_judge.py --reward=effort --device=cuda:0

scripts/evaluate.py --judge=embedded starts one by itself; with --judge=api, any program that compares two pictures
through such an endpoint can be tried against it.
"""

import sys
import time
from collections.abc import Sequence

from absl import app, flags

from reward_bridge.judges.stand_in import MARGIN, serving

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "reward", "embedded_held_out", "whose higher score wins; a name of reward_bridge/rewards"
)
flags.DEFINE_string("device", "cpu", "the reward's torch device")
flags.DEFINE_integer("port", 8018, "0 takes a free one")
flags.DEFINE_float("margin", MARGIN, "scores closer than this are a tie")


def main(_: Sequence[str]) -> None:
    try:
        with serving(FLAGS.reward, FLAGS.port, FLAGS.device, FLAGS.margin) as address:
            print(
                f"{FLAGS.reward} judges at {address}\n"
                f"is it up?  curl {address}/models\n"
                f"use it     REALGEN_JUDGE_URL={address} REALGEN_JUDGE_MODEL={FLAGS.reward} "
                "python scripts/evaluate.py --judge=api ...\n"
                "stop       Ctrl-C",
                flush=True,
            )
            while True:
                time.sleep(3600)
    except KeyboardInterrupt:
        print("stopped")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
