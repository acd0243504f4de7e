"""What orbax is made to do otherwise than it does by itself."""

import asyncio
from collections.abc import Iterator
import contextlib
import errno

import orbax.checkpoint as ocp


class Manager(ocp.CheckpointManager):
  """Leaves it to `parallel.Preemption` to ask JAX whether to stop.

  Orbax would ask, too, at each save and with the number of the step.  JAX says
  yes for one number, which follows the last that it was asked with, so either
  could miss the one that is meant for the other.
  """

  def reached_preemption(self, step: int) -> bool:
    """Not to be known here."""
    del step
    return False


class Committed(ocp.path.step.NameFormat):
  """The steps that orbax says it has finished; named 0, 1, 2...

  Orbax itself takes every folder with the name of a number for a step: an empty
  one that somebody made, or a part of one that a copy has left.  Such a folder
  would be resumed from if its number were the highest, and it would count
  among those to keep in place of a whole one.
  """

  def __init__(self):
    self._names = ocp.path.step.standard_name_format()

  def build_name(self, step: int) -> str:
    """The name of a step's folder."""
    return self._names.build_name(step)

  def find_all(self, base_path) -> Iterator[ocp.path.step.Metadata]:
    """All finished steps."""
    return filter(_is_committed, self._names.find_all(base_path))

  def find_step(self, base_path, step: int) -> ocp.path.step.Metadata:
    """One of them; ValueError if it is none."""
    found = self._names.find_step(base_path, step)
    if not _is_committed(found):
      raise ValueError(f'{found.path} is no checkpoint')
    return found


def _is_committed(found: ocp.path.step.Metadata) -> bool:
  """Whether orbax has written down when all of a step was there."""
  # Asked for first, since orbax warns about every file that it does not find.
  there = (found.path / '_CHECKPOINT_METADATA').exists()
  return there and found.commit_timestamp_nsecs is not None


# As the system and TensorStore say it; shorter, it could be a folder's name.
_LASTING = (
  ('no space left', errno.ENOSPC),
  ('quota exceeded', errno.EDQUOT),
  ('permission denied', errno.EACCES),
  ('permission_denied', errno.EACCES),
  ('read-only file system', errno.EROFS),
)


@contextlib.contextmanager
def written(folder):
  """Where orbax writes: what goes wrong, of many kinds, is an OSError."""
  try:
    yield
  except OSError:
    raise
  except Exception as error:
    text = str(error).lower()  # in the middle of which TensorStore says why
    number = next((n for said, n in _LASTING if said in text), errno.EIO)
    raise OSError(
      number, f'a checkpoint cannot be written ({said(error)})', str(folder)
    ) from error


def said(error: Exception) -> str:
  """What an error of orbax says, without what only its authors understand."""
  text = str(error).strip().partition('\n')[0]
  text = text.partition('See full TensorStore')[0].strip()
  return f'{type(error).__name__}: {text:.200}'


@contextlib.contextmanager
def reads_end():
  """Where one read of orbax fails, the others end before that is seen.

  Orbax closes its event loop while they wait.  What they have read then finds
  no loop, and what waits turns its own end into an error: pages on stderr,
  after the one sentence that says what happened.
  """
  whole = asyncio.new_event_loop
  asyncio.new_event_loop = _EventLoop
  try:
    yield
  finally:
    asyncio.new_event_loop = whole


class _EventLoop(asyncio.SelectorEventLoop):
  """One that waits for all its tasks when it is closed."""

  def close(self) -> None:
    """Waits, then closes."""
    waiting = asyncio.all_tasks(self)
    if waiting:  # not cancelled: TensorStore would still answer to the loop
      self.run_until_complete(_ended(waiting))
    super().close()


async def _ended(tasks) -> None:
  await asyncio.gather(*tasks, return_exceptions=True)
