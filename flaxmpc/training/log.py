"""Shows the progress of training, and writes its metrics and TensorBoard events."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flaxmpc import files


class TrainingLog:
    """Progress in the terminal, metrics.jsonl with one object an epoch, and TensorBoard events."""

    def __init__(self, folder: Path, *, epochs: int, steps_per_epoch: int, batch_size: int, done: int):
        """Goes on with what an earlier run left in the folder.

        Args:
            folder: the run's; metrics.jsonl and tensorboard/ are written there, its name is shown with the progress.
            epochs, steps_per_epoch: how long the whole run is.
            batch_size: sentences in a step.
            done: how many steps are in the last checkpoint.

        Raises:
            ValueError: a line of metrics.jsonl is damaged.
        """
        from tensorboardX import SummaryWriter

        self._name, self._batch_size = folder.name, batch_size
        self._epochs, self._steps_per_epoch = epochs, steps_per_epoch
        self._path = folder / "metrics.jsonl"
        # Epochs that a killed run logged after its last checkpoint are run, and logged, again.
        self._lines = [line for epoch, line in _logged(self._path) if epoch <= done // steps_per_epoch]
        self._write()
        # Events files are named by the second: the suffix keeps a run that goes on at once from writing over the last.
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done or None, filename_suffix=f".{done}")
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
        )
        self._bar = self._progress.add_task(self._name, total=epochs * steps_per_epoch, completed=done, shown="")
        self._start_epoch()

    def __enter__(self) -> "TrainingLog":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._board.close()

    def _write(self) -> None:
        files.write(self._path, "".join(f"{line}\n" for line in self._lines))

    def _start_epoch(self) -> None:
        self._totals: dict[str, float] = {}
        self._steps, self._started, self._seconds = 0, time.perf_counter(), 0.0

    def _means(self) -> dict[str, float]:
        return {metric: total / self._steps for metric, total in self._totals.items()}

    def step(self, number: int, values: dict[str, float]) -> None:
        """Notes the loss and metrics of step `number`, from 0, over all epochs."""
        self._steps += 1
        self._seconds = time.perf_counter() - self._started
        self._totals = {metric: self._totals.get(metric, 0.0) + value for metric, value in values.items()}
        shown = "  ".join(f"{metric} {mean:.4f}" for metric, mean in self._means().items())
        rate = self._steps * self._batch_size / self._seconds
        self._progress.update(self._bar, completed=number + 1, shown=f"{shown}  {rate:.0f} sentences/s")
        if number % 10 == 0:
            for metric, value in values.items():
                self._board.add_scalar(f"train/{metric}", value, number)

    def epoch(self, epoch: int, figures: dict[str, float]) -> None:
        """Notes that epoch `epoch`, from 1, is done, and the figures of its evaluation."""
        seconds = {"seconds": round(self._seconds, 1)}
        record = {"name": self._name, "epoch": epoch, **seconds, **self._means(), **figures}
        for figure, value in figures.items():
            self._board.add_scalar(figure, value, epoch * self._steps_per_epoch)
        self._lines.append(json.dumps(record))
        self._write()
        shown = ", ".join(f"{figure} {value:.4f}" for figure, value in {**self._means(), **figures}.items())
        line = f"{self._name}, epoch {epoch} of {self._epochs}: {shown}, {self._seconds:.1f} s"
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._start_epoch()


def _logged(path: Path) -> Iterator[tuple[int, str]]:
    """The epoch, and the line, of each record in metrics.jsonl. ValueError: a line is damaged."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            yield int(json.loads(line)["epoch"]), line.decode()
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is damaged: remove the line; nothing but people reads it"
            ) from error
