"""Time a forward pass of diffusers' FLUX transformer at batch 1, eager and compiled.

The weights are random, in bfloat16. flux_gpu.py starts it with the sizes as JSON; it prints JSON.
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
    """Return the time of the first call and the median of the next ones."""
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            model(**inputs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
    return times[0], statistics.median(times[1:])


def main() -> None:
    sizes = json.loads(sys.argv[1])
    device = "cuda" if torch.cuda.is_available() else "cpu"

    # Random weights, drawn on the device.
    with torch.device("meta"):
        model = FluxTransformer2DModel(**sizes["model"])
    model = model.to(torch.bfloat16).to_empty(device=device).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.02)

    config = model.config
    tokens = sizes["tokens"]
    text = sizes["text"]
    options = {"device": device, "dtype": torch.bfloat16}
    inputs = {
        "hidden_states": torch.randn(1, tokens, config.in_channels, **options),
        "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim, **options),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, **options),
        "timestep": torch.full((1,), 0.5, **options),
        "guidance": torch.full((1,), 3.5, device=device),
        "img_ids": torch.zeros(tokens, 3, device=device),
        "txt_ids": torch.zeros(text, 3, device=device),
    }
    _, eager = seconds(model, inputs, 5)
    first, compiled = seconds(torch.compile(model), inputs, 5)
    results = {
        "eager_seconds": eager,
        "compiled_seconds": compiled,
        "first_compiled_seconds": first,
        "torch": torch.__version__,
        "device": device,
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
