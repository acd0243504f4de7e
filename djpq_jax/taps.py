"""Looks at arrays inside of a model while it runs."""

from collections.abc import Callable, Iterator
import contextlib
import contextvars
from typing import Any

Seen = dict[str, list[Any]]

_taps: dict[str, 'Tap'] = {}


class Tap:
  """A place that shows arrays to whoever has opened it.

  Args:
    name: of the place; no other has it.
  """

  def __init__(self, name: str):
    self._seen: contextvars.ContextVar[Seen | None]
    self._seen = contextvars.ContextVar(name, default=None)
    _taps[name] = self

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

  @property
  def is_open(self) -> bool:
    """Whether anybody looks."""
    return self._seen.get() is not None

  def see(self, name: str, value: Any) -> None:
    """Shows one array of a layer, if anybody looks."""
    seen = self._seen.get()
    if seen is not None:
      seen.setdefault(name, []).append(value)


def collecting(function: Callable) -> Callable[..., tuple[Any, dict]]:
  """For a function that is traced on its own: its taps' arrays as results.

  Returns:
    A function that returns (the result, what to give to `show` outside of the
    trace).
  """

  def call(*args, **kwargs):
    with contextlib.ExitStack() as stack:
      seen = {
        name: stack.enter_context(tap.open())
        for name, tap in _taps.items()
        if tap.is_open
      }
      return function(*args, **kwargs), seen

  return call


def show(seen: dict[str, Seen]) -> None:
  """Shows again what `collecting` has collected."""
  for name, layers in seen.items():
    for layer, arrays in layers.items():
      for array in arrays:
        _taps[name].see(layer, array)
