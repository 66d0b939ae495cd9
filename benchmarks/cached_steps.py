"""What cached steps cost in exactness and save in time, on the embedded FLUX.

    python benchmarks/cached_steps.py [--steps 10 25] [--skipped 1 2 3] [--orders 0 1 2]

Samples 64 pictures of the demo's training prompts (`tiny` in configs/embedded.py) without noise,
with all velocities computed and with some of them predicted by polynomials of several orders. The
error is the RMS of the difference of the final latents, relative to the RMS of the exact ones.
Seconds are medians of a call without the decoder, whose runs alternate.
"""

import argparse
import statistics
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import measure

from realgen_configs.embedded import tiny
from realgen_jax.cached_steps import ORDER, make_cache
from realgen_jax.data import read_prompts
from realgen_jax.models.loading import load_model
from realgen_jax.models.prompts import embed_prompts
from realgen_jax.rollout import SOLVERS, draw_latents, make_noiseless_plan
from realgen_jax.sharding import make_mesh

ENCODE = (sys.executable, str(measure.ROOT / "scripts" / "encode_prompts.py"))
IMAGES = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25])
    parser.add_argument("--skipped", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--orders", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    # The model, without a LoRA, and one prompt a picture.
    config = tiny()
    prompts = read_prompts(config.prompts.train)
    prompts = [prompts[i % len(prompts)] for i in range(IMAGES)]
    cache = embed_prompts(prompts, config.pretrained, config.prompts, ENCODE)
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    model = load_model(config.pretrained, (config.sample.width, config.sample.height), mesh)
    cond = model.cond(cache, prompts, config.sample.guidance_scale)
    latents = draw_latents(jax.random.key(0), IMAGES, IMAGES, model.token_shape)

    @jax.jit
    def final(model, plan, cond, latents):
        return plan.sample(partial(model.velocity, None), cond, latents)

    rows = []
    for steps in args.steps:
        sigmas = model.sigmas(steps)
        for solver in SOLVERS:
            exact = make_noiseless_plan(sigmas, solver, sigmas[:-1])
            plans = {("all", ""): exact}
            for skipped in args.skipped:
                for order in args.orders:
                    plan = replace(exact, cache=make_cache(sigmas, skipped, order))
                    plans[str(skipped), str(order)] = plan

            # The time does not depend on the order.
            timed = {name: plan for name, plan in plans.items() if name[1] in ("", str(ORDER))}
            calls = {name: partial(final, model, timed[name], cond, latents) for name in timed}
            seconds = measure.alternate(calls, args.repeats)

            x0 = final(model, exact, cond, latents)
            for name, plan in plans.items():
                own = final(model, plan, cond, latents)
                error = float(jnp.sqrt(jnp.mean((own - x0) ** 2) / jnp.mean(x0**2)))
                rows.append(
                    {
                        "steps": steps,
                        "solver": solver,
                        "cached_steps": name[0],
                        "computed": int(plan.mean_steps),
                        "order": name[1],
                        "error": error,
                        "seconds": statistics.median(seconds[name]) if name in seconds else None,
                    }
                )

    table = []
    for row in rows:
        cells = [str(row[key]) for key in ("steps", "solver", "cached_steps", "computed", "order")]
        time = "" if row["seconds"] is None else f"{row['seconds']:.2f}"
        table.append([*cells, f"{row['error']:.4f}", time])
    header = ("steps", "solver", "cached_steps", "computed", "order", "error", "seconds")
    measure.print_table(header, table)
    print(f"written to {measure.save('cached_steps', {'images': IMAGES, 'rows': rows})}")


if __name__ == "__main__":
    main()
