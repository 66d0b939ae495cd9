"""TensorBoard's event file of a run."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from realgen_jax.files import writing


class Board:
    """Writes figures and pictures for TensorBoard.

    tensorboardX's own SummaryWriter writes in a thread, whose errors nobody sees: on a full disk
    the figures are lost, and the run blocks once the thread's queue is full.

    Args:
      folder: the folder of the event files.
      start: a resumed run hides what is recorded from this epoch on; None for a new run.
    """

    def __init__(self, folder: Path, start: int | None):
        self.folder = folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"))
        if start is not None:
            self._write(Event(step=start, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, values: Mapping[str, float], epoch: int) -> None:
        """Record one row of figures. Raises OSError, which names the folder."""
        figures = [summary.scalar(name, value).value[0] for name, value in values.items()]
        self._write(Event(step=epoch, summary=summary.Summary(value=figures)))

    def picture(self, name: str, pixels: np.ndarray, epoch: int) -> None:
        """Record a picture, uint8 [h, w, 3]. Raises OSError, which names the folder."""
        self._write(Event(step=epoch, summary=summary.image(name, pixels, dataformats="HWC")))

    def close(self) -> None:
        """Close the file. Everything is written already."""
        with writing(self.folder):
            self._writer.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        with writing(self.folder):
            self._writer.write_event(event)
            self._writer.flush()
