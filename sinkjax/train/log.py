"""What a run tells: `metrics.jsonl` for programs, a progress line for people."""

import json
import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from sinkjax.files import write_whole
from sinkjax.models.config import DecoderConfig
from sinkjax.models.flops import utilization
from sinkjax.strict_json import plain


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a `metrics.jsonl`, in order; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


class MetricsLog:
    """Appends records to `metrics.jsonl`, one JSON object a line, on process 0 only.

    Args:
      path: of the file.
      step: step the run starts from; later records, of a run that was killed, are cut off.

    Raises:
      OSError: the file cannot be written.
    """

    def __init__(self, path: Path, step: int):
        self.records = [record for record in read_metrics(path) if record["step"] <= step]
        self._path = path
        self._writes = jax.process_index() == 0
        if self._writes:
            write_whole(path, "".join(map(_line, self.records)))

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; arrays become lists, and what is not finite becomes null.

        Raises:
          OSError: the line did not fit; the file ends with the line before it.
        """
        record = plain(record)
        self.records.append(record)
        if not self._writes:
            return
        size = self._path.stat().st_size
        try:
            with open(self._path, "ab", buffering=0) as file:
                line = _line(record).encode()
                while line:
                    line = line[file.write(line) :]
        except OSError as error:
            os.truncate(self._path, size)
            raise OSError(error.errno, error.strerror, str(self._path)) from error


def speed(config: DecoderConfig, mesh: Mesh, tokens_per_second: float) -> dict[str, float]:
    """What a training record says about speed.

    Args:
      config: of the model.
      mesh: on which it is trained.
      tokens_per_second: of all devices together, evaluation and saving left out.

    Returns:
      `tokens_per_second`; `tokens_per_second_per_device`; and `mfu`, the share of the devices'
      peak FLOP/s that the model's own operations take (`sinkjax.models.flops.utilization`), which
      is left out where the peak is not known, as on a CPU.
    """
    kind = mesh.devices.flat[0].device_kind
    found = {
        "tokens_per_second": tokens_per_second,
        "tokens_per_second_per_device": tokens_per_second / mesh.size,
        "mfu": utilization(config, tokens_per_second, kind, mesh.size),
    }
    return {name: value for name, value in found.items() if value is not None}


class Progress:
    """A live line of step, loss, tokens per second and time left; nothing without a terminal.

    Args:
      steps: length of the run.
      step: where it starts.
      show: None shows it when standard error is a terminal, on process 0.
    """

    def __init__(self, steps: int, step: int, show: bool | None = None):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        show = console.is_terminal if show is None else show
        self._bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s  left"),
            TimeRemainingColumn(),
            console=console,
            disable=not show or jax.process_index() != 0,
        )
        self._task = self._bar.add_task("train", total=steps, completed=step, loss="-", speed="-")

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show a step."""
        self._bar.update(
            self._task, completed=step, loss=f"{loss:.4f}", speed=f"{tokens_per_second:,.0f}"
        )

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
