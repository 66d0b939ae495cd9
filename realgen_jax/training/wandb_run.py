"""A run of Weights & Biases, which a training run can do without."""

from collections.abc import Callable, Mapping
from typing import Any

from realgen_jax.hosts import process_index

INIT_SECONDS = 30.0  # for its server's first answer


def open_wandb(project: str, name: str, config: Mapping[str, Any]) -> Any | None:
    """Start the run `name` in a project, or resume it, in the first process only.

    Returns None in the others, and without a project. Call this before anything is loaded. Raises
    ValueError if Weights & Biases cannot be used, as without a login or a network.
    """
    if not project or process_index():
        return None
    import wandb  # optional dependency

    try:
        return wandb.init(
            project=project,
            name=name,
            id=name,
            config=dict(config),
            resume="allow",
            settings={"init_timeout": INIT_SECONDS},
        )
    except Exception as error:  # of its client, its service or its server
        raise ValueError(
            f"config.wandb_project is {project!r}, but Weights & Biases cannot be used "
            f"({_one_line(error)}); log in with `wandb login`, or set WANDB_MODE=offline to keep "
            "the figures on this machine"
        ) from error


class WandbLog:
    """Sends figures and pictures to a run of Weights & Biases. Its first failure is the last try.

    run: what `open_wandb` returned. warn: prints a warning.
    """

    def __init__(self, run: Any | None, warn: Callable[[str], None]):
        self._run = run
        self._warn = warn

    def figures(self, values: Mapping[str, float], epoch: int) -> None:
        self._try(lambda run: run.log(values, step=epoch))

    def picture(self, name: str, picture: Any, epoch: int) -> None:
        """picture: a PIL image."""

        def send(run: Any) -> None:
            import wandb

            run.log({name: wandb.Image(picture)}, step=epoch)

        self._try(send)

    def close(self) -> None:
        self._try(lambda run: run.finish())

    def _try(self, action: Callable[[Any], None]) -> None:
        """Call `action` with the run, if there is one; warn once if that fails."""
        if not self._run:
            return
        try:
            action(self._run)
        except Exception as error:  # of its client, its service or its server
            self._run = None
            self._warn(
                f"Weights & Biases failed ({_one_line(error)}); the run goes on without it, and "
                "metrics.jsonl has all figures"
            )


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
