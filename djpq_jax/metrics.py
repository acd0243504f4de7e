"""Where the metrics of a run go: a file of JSON lines, and TensorBoard."""

from collections.abc import Mapping, Sequence
import json
import pathlib
from typing import Any

from djpq_jax import files
from djpq_jax import packages

Row = Mapping[str, Any]


class Log:
  """Writes rows of metrics as they come.

  A run that goes on writes all anew, beginning with what its checkpoints hold,
  so that no step is there twice.

  Args:
    folder: gets `metrics.jsonl` and the folder `tensorboard`; it must exist.
    tensorboard: whether to write event files, which needs tensorboardX.

  Raises:
    ImportError: tensorboardX is asked for and missing; says what to install.
  """

  def __init__(self, folder: pathlib.Path, *, tensorboard: bool = False):
    self._path = folder / 'metrics.jsonl'
    self._lines: list[str] = []
    self._path.write_text('')
    self._events = None
    events = folder / 'tensorboard'
    if events.exists():
      files.remove(events)
    if tensorboard:
      self._events = _event_writer(events)

  def write(self, rows: Sequence[Row]) -> None:
    """Adds rows: 'phase', 'step' over all phases, and numbers by name."""
    lines = [json.dumps(row) + '\n' for row in rows]
    if files.is_remote(self._path):  # nothing can be added to an object
      self._lines += lines
      self._path.write_text(''.join(self._lines))
    else:
      with open(self._path, 'a', encoding='utf-8') as file:
        file.writelines(lines)
    if self._events is None:
      return
    for row in rows:
      for name, value in row.items():
        if name not in ('phase', 'step'):
          tag = f'{row["phase"]}/{name}'
          self._events.add_scalar(tag, value, row['step'])
    self._events.flush()

  def close(self) -> None:
    """Closes the event file."""
    if self._events is not None:
      self._events.close()


def check(*, tensorboard: bool) -> None:
  """Raises an ImportError if event files are asked for in vain."""
  if tensorboard:
    _tensorboard()


def _event_writer(folder: pathlib.Path):
  return _tensorboard().SummaryWriter(str(folder))


def _tensorboard():
  return packages.require(
    'tensorboardX', extra='tensorboard', use='event files (config: tensorboard)'
  )
