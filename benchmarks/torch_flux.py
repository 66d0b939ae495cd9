"""diffusers' FLUX transformer with random bfloat16 weights: seconds of a forward at batch 1, eager and compiled.

Started by flux_gpu.py with the sizes as JSON; prints JSON.
"""

import json
import statistics
import sys
import time

import torch
from diffusers import FluxTransformer2DModel


def seconds(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], repeats: int
) -> tuple[float, float]:
    """(of the first call, the median of the next ones)."""
    taken = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            model(**inputs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - begin)
    return taken[0], statistics.median(taken[1:])


def main() -> None:
    sizes = json.loads(sys.argv[1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        model = FluxTransformer2DModel(**sizes["model"])
    model = model.to(torch.bfloat16).to_empty(device=device).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.02)
    config, n = model.config, {"device": device, "dtype": torch.bfloat16}
    inputs = {
        "hidden_states": torch.randn(1, sizes["tokens"], config.in_channels, **n),
        "encoder_hidden_states": torch.randn(1, sizes["text"], config.joint_attention_dim, **n),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, **n),
        "timestep": torch.full((1,), 0.5, **n),
        "guidance": torch.full((1,), 3.5, device=device),
        "img_ids": torch.zeros(sizes["tokens"], 3, device=device),
        "txt_ids": torch.zeros(sizes["text"], 3, device=device),
    }
    _, eager = seconds(model, inputs, 5)
    first, compiled = seconds(torch.compile(model), inputs, 5)
    found = {"eager_seconds": eager, "compiled_seconds": compiled, "first_compiled_seconds": first}
    print(json.dumps({**found, "torch": torch.__version__, "device": device}))


if __name__ == "__main__":
    main()
