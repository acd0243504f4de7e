"""Turns SIGTERM and Ctrl-C into a question that a training loop can ask."""

import signal
import threading

# 128 + SIGTERM, as of a process that the signal ended: what restarts failed
# jobs on a cluster has to restart this one.
EXIT_STATUS = 143


class Signals:
  """While it is open, the first signal is only noted.

  A second Ctrl-C interrupts at once.  In other threads than the main one,
  where Python allows no handlers, it notes nothing.
  """

  def __init__(self):
    self._seen = False
    self._before = {}

  def seen(self) -> bool:
    """Whether a signal came."""
    return self._seen

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _note(self, number, frame):
    del frame
    if self._seen and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._seen = True
