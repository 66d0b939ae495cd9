"""What XLA's compilers make of the recipes, beside preflight's formulas: no GPU or TPU is needed.

    python benchmarks/compiled.py [--target h200] [--only flux_grpo:flux_dev_1xh200 ...] \\
        [--again | --formulas]

Runs scripts/preflight.py --compile_for for each recipe (1 GB of memory and about a minute of a CPU
core each for GPUs, 4 GB and ten minutes for TPUs) and prints temporaries by the compiler and by
formula. Figures that benchmarks/results/compiled_TARGET.json already has are kept, so that a run
can be continued, unless --again is given. With --formulas, the formulas are computed anew, and what
is compiled already is kept.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure

from realgen_jax.preflight.compiled import temporary_bytes
from realgen_jax.preflight.targets import CARDS

GIB = 2**30
RECIPES = (
    "flux_grpo:flux_dev_8xh200",
    "flux_grpo:flux_dev_8xh200_remote",
    "flux_grpo:flux_dev_6x2",
    "flux_grpo:flux_dev_1xh200",
    "flux_grpo:flux_dev_16xh200",
    "flux_grpo:flux_dev_full_8xh200",
    "flux_grpo:flux_adv_8xh200",
    "flux_grpo:flux_dino_adv",
    "flux_objectives:flux_nft_8xh200",
    "flux_objectives:flux_awm_8xh200",
    "flux_objectives:flux_mix_8xh200",
    "sd3_grpo:adv_dino_8xh200",
    "sd3_grpo:adv_pickscore_8xh200",
    "sd3_grpo:adv_dino_1xh200",
    "sd3_grpo:flow_grpo_sd3_pickscore",
    "sd3_grpo:realgen_sd3_large_8xh200",
    "zimage_grpo:realgen_v2_base_8xh200",
    "zimage_grpo:realgen_v2_turbo_8xh200",
    "rewriter_grpo:flux_rewriter_8xh200",
    "rewriter_grpo:flux_rewriter_1xh200",
    "rewriter_grpo:flux_rewriter_full_8xh200",
)
HEADER = ("recipe", "devices", "program", "compiler", "formula", "", "total", "attention")


def preflight(recipe: str, options: list[str]) -> dict[str, Any]:
    """Preflight's figures of a recipe, as its --json has them."""
    name, preset = recipe.split(":")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [
            sys.executable,
            str(measure.ROOT / "scripts" / "preflight.py"),
            "--config",
            f"{measure.ROOT}/configs/{name}.py:{preset}",
            f"--json={file}",
            *options,
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(file.read_text())


def compile_recipe(recipe: str, target: str, options: list[str]) -> dict[str, Any]:
    """What the compiler for the target makes of a recipe."""
    figures = preflight(recipe, [f"--compile_for={target}", *options])
    keep = ("preset", "devices", "mesh", "compiled")
    return {key: figures[key] for key in keep}


def compute_formulas(recipe: str, figures: dict[str, Any], options: list[str]) -> None:
    """Set the formulas' figures of a recipe that is compiled to today's."""
    phases = preflight(recipe, ["--nocompile", *options])["bytes"]
    for name, program in figures["compiled"].items():
        program["temporaries_by_formula"] = temporary_bytes(phases[name])


def rows_of(recipe: str, figures: dict[str, Any]) -> list[list[str]]:
    """The lines of the table for a recipe, one a program; sizes in GiB of one device."""
    rows = []
    for name, program in figures["compiled"].items():
        compiler = program["temporaries_in_use"]
        formula = program["temporaries_by_formula"]
        rows.append(
            [
                recipe,
                str(figures["devices"]),
                name,
                f"{compiler / GIB:.2f}",
                f"{formula / GIB:.2f}",
                f"{formula / compiler - 1:+.1%}",
                f"{program['total'] / GIB:.1f}",
                " + ".join(map(str, program["attention"].values())),
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="h200")
    parser.add_argument("--only", nargs="+", default=RECIPES, metavar="RECIPE")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--formulas", action="store_true")
    args, options = parser.parse_known_args()
    if args.formulas and args.target not in CARDS:
        parser.error(f"--formulas are those of GPUs, but --target is {args.target}; use --again")

    file = measure.RESULTS / f"compiled_{args.target.replace(':', '_')}.json"
    recipes = json.loads(file.read_text())["recipes"] if file.exists() else {}
    for recipe in args.only:
        name = " ".join([recipe, *options])
        if args.again or name not in recipes:
            recipes[name] = compile_recipe(recipe, args.target, options)
        elif args.formulas:
            compute_formulas(recipe, recipes[name], options)
        content = {"target": args.target, "recipes": recipes}
        file.write_text(json.dumps(content, indent=1) + "\n")
        for row in rows_of(name, recipes[name]):
            print("  ".join(row), flush=True)

    table = [row for name, figures in recipes.items() for row in rows_of(name, figures)]
    measure.print_table(HEADER, table)
    print(f"written to {file}")


if __name__ == "__main__":
    main()
