"""Builds the embedded model and its rewards from photographs inside the scikit-image and scikit-learn wheels.

    python scripts/build_embedded [--work build/embedded] [--threads 2]

About two hours on 2 cores. Every stage goes on from its last checkpoint; with the same versions and thread count it
makes the same files. Results: realgen_jax/embedded/ (a FluxPipeline folder and prompts), reward_bridge/embedded/.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import detectors  # noqa: E402
import flux  # noqa: E402
import references  # noqa: E402
import text  # noqa: E402
import torch  # noqa: E402
import vae as autoencoder  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/embedded"),
        help="checkpoints and intermediate files",
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="of PyTorch; another number gives other last bits"
    )
    parser.add_argument(
        "--references",
        action="store_true",
        help="only the reference pictures, by the model that ships",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    root = HERE.parents[1]
    embedded, rewards = root / "realgen_jax" / "embedded", root / "reward_bridge" / "embedded"
    pipeline, work = embedded / "flux_tiny", args.work.resolve()
    for folder in (work, pipeline, rewards):
        folder.mkdir(parents=True, exist_ok=True)
    vae = autoencoder.build(work, pipeline)
    if not args.references:
        text.build(work, pipeline, rewards)
        flux.build(work, pipeline, vae)
        detectors.write_prompts(embedded)
        detectors.build(work, pipeline, rewards, vae)
    references.build(vae, rewards)


if __name__ == "__main__":
    main()
