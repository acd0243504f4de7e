"""Items prepared ahead of time, on a thread of their own."""

from collections.abc import Iterable, Iterator
import contextlib
import dataclasses
import queue
import threading
from typing import TypeVar

T = TypeVar('T')


def prefetch(iterator: Iterable[T], depth: int = 2) -> Iterator[T]:
  """Prepares up to `depth` items ahead on a background thread.

  An exception of `iterator` is raised here, after the items before it.  The
  thread starts with the first item and stops when the iterator is exhausted,
  closed or dropped.

  Raises:
    ValueError: `depth` < 1, at the call.
  """
  if depth < 1:
    raise ValueError(f'depth must be >= 1; got {depth}')
  return _prefetch(iterator, depth)


@dataclasses.dataclass(frozen=True)
class _End:
  """Last thing in the queue; carries the exception, if there was one."""

  error: BaseException | None = None


def _prefetch(iterator, depth):
  items: queue.Queue = queue.Queue(depth)
  stopped = threading.Event()
  worker = threading.Thread(
    target=_produce, args=(iterator, items, stopped), daemon=True
  )
  worker.start()
  try:
    while not isinstance(item := items.get(), _End):
      yield item
    if item.error is not None:
      raise item.error
  finally:
    stopped.set()
    _drain(items)
    worker.join()


def _produce(iterator, items, stopped):
  """Runs on the thread: fills the queue until the end or until `stopped`."""
  end = _End()
  try:
    for item in iterator:
      items.put(item)
      if stopped.is_set():
        return
  except BaseException as error:  # The consumer raises it.
    end = _End(error)
  items.put(end)


def _drain(items):
  """Makes room, so that a producer that waits in `put` sees the stop."""
  with contextlib.suppress(queue.Empty):
    while True:
      items.get_nowait()
