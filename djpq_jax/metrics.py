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
  so that no step is there twice.  What is there stays until there is a row to
  write: a run that cannot go on loses none.

  Args:
    folder: gets `metrics.jsonl` and the folder `tensorboard`; it must exist.
    tensorboard: whether to write event files, which needs tensorboardX.

  Raises:
    ImportError: tensorboardX is asked for and missing; says what to install.
  """

  def __init__(self, folder: pathlib.Path, *, tensorboard: bool = False):
    check(tensorboard=tensorboard)
    self._folder = folder
    self._path = folder / 'metrics.jsonl'
    self._tensorboard = tensorboard
    self._known: list[Row] = []
    self._lines: list[str] = []
    self._events = None
    self._begun = False

  def restore(self, rows: Sequence[Row]) -> None:
    """Adds rows of a checkpoint; they are written before the next new one."""
    self._known += rows

  def write(self, rows: Sequence[Row]) -> None:
    """Adds rows: 'phase', 'step' over all phases, and numbers by name."""
    rows, self._known = [*self._known, *rows], []
    begins, self._begun = not self._begun, True
    if begins:
      self._begin_events()
    lines = [json.dumps(row) + '\n' for row in rows]
    if begins or files.is_remote(self._path):  # no object can be added to
      self._lines += lines
      files.replace(self._path, ''.join(self._lines))
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
    """Writes what is not written yet, and closes the event file."""
    if self._known or not self._begun:
      self.write([])
    if self._events is not None:
      self._events.close()

  def _begin_events(self) -> None:
    events = self._folder / 'tensorboard'
    if events.exists():
      files.remove(events)
    if self._tensorboard:
      self._events = _event_writer(events)


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
