"""Build the embedded model and its rewards from photographs in two Python packages.

    python scripts/build_embedded [--work build/embedded] [--threads 2]

The photographs ship in the scikit-image and scikit-learn wheels. Takes about two hours on 2 cores.
Every stage resumes from its last checkpoint. With the same versions and number of threads, a stage
writes the same files for the same inputs; only the order of equally frequent pairs in CLIP's
vocabulary is left open by the tokenizers library. The results are realgen_jax/embedded/ (two
FluxPipeline folders, a StableDiffusion3Pipeline folder, a Qwen3 folder and prompts) and
reward_bridge/embedded/ (rewards).
"""

import argparse
import importlib.util
import sys
from pathlib import Path

PARTS = ("flux", "references", "sd3", "dino", "rewriter")

# Packages of the extra `build`, by the module they install.
REQUIRED = {"diffusers": "diffusers", "skimage": "scikit-image", "sklearn": "scikit-learn"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/embedded"),
        help="folder for checkpoints and intermediate files (default: build/embedded)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=2,
        help="PyTorch's number of threads; the results depend on it in the last bits (default: 2)",
    )
    parser.add_argument(
        "--only",
        choices=PARTS,
        help="build only this part, with the others that are already there",
    )
    args = parser.parse_args()

    missing = [name for module, name in REQUIRED.items() if not importlib.util.find_spec(module)]
    if missing:
        sys.exit(
            f"error: {', '.join(missing)} not installed; expected the extra `build`: "
            'pip install -e ".[torch,build]"'
        )

    # Python finds the modules of the folder that it runs. They are imported here, so that --help
    # works without the extra.
    import stages

    stages.build(args.work, args.threads, args.only)


if __name__ == "__main__":
    main()
