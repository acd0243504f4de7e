"""Looks at arrays inside of a model while it runs."""

from collections.abc import Iterator
import contextlib
import contextvars
from typing import Any

Seen = dict[str, list[Any]]


class Tap:
  """A place that shows arrays to whoever has opened it.

  Args:
    name: of the place, for debuggers.
  """

  def __init__(self, name: str):
    self._seen: contextvars.ContextVar[Seen | None]
    self._seen = contextvars.ContextVar(name, default=None)

  @contextlib.contextmanager
  def open(self) -> Iterator[Seen]:
    """Collects what passes: yields a dict, layer -> list of arrays.

    To use it under `jax.jit`, open it inside of the jitted function and return
    the dict.
    """
    seen: Seen = {}
    token = self._seen.set(seen)
    try:
      yield seen
    finally:
      self._seen.reset(token)

  def see(self, name: str, value: Any) -> None:
    """Shows one array of a layer, if anybody looks."""
    seen = self._seen.get()
    if seen is not None:
      seen.setdefault(name, []).append(value)
