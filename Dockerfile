# Images of realgen_jax, with the versions that constraints.txt pins.
#
#   docker build --target cpu --build-arg EXTRA_INDEX=URL --tag realgen_jax:cpu .
#   docker build --tag realgen_jax:cuda .
#   docker run --rm --gpus all --volume "$PWD:/work" realgen_jax:cuda realgen-train --config flux_grpo
#
# EXTRA_INDEX: the index URL that pytorch.org/get-started shows for "CPU"; without it, the CPU image
# has PyPI's torch, the CUDA build of several GB. The CUDA image needs only the driver of the host
# and the NVIDIA container toolkit: CUDA comes with the wheels of jax and torch.

# -- The package, without what an installed one does not need.
FROM python:3.11-slim-bookworm AS source
WORKDIR /source
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY configs configs
COPY scripts scripts
COPY reward_bridge reward_bridge
COPY realgen_jax realgen_jax

# -- CPU.
FROM python:3.11-slim-bookworm AS cpu
ARG EXTRA_INDEX=
COPY --from=source /source /source
RUN pip install --no-cache-dir --constraint /source/constraints.txt \
        ${EXTRA_INDEX:+--extra-index-url "$EXTRA_INDEX"} torch "/source[torch]" \
    && useradd --create-home --uid 1000 realgen \
    && install --directory --owner realgen /work
USER 1000
WORKDIR /work
CMD ["realgen-train", "--config", "flux_grpo"]

# -- CUDA, the default.
FROM python:3.11-slim-bookworm AS cuda
COPY --from=source /source /source
RUN pip install --no-cache-dir --constraint /source/constraints.txt "/source[cuda,torch]" \
    && useradd --create-home --uid 1000 realgen \
    && install --directory --owner realgen /work
USER 1000
WORKDIR /work
CMD ["realgen-train", "--config", "flux_grpo"]
