"""Looks at arrays inside of a model while it runs."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import contextvars
import functools
import itertools
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex_core
import numpy as np

Seen = dict[str, list[Any]]

_taps: dict[str, 'Tap'] = {}
# JAX keeps the inner programs of a model. Those that were traced while nobody
# looked show nothing, so each look has programs of its own.
_looks = itertools.count(1)
_look = jax.make_user_context(0)


class _Looking(NamedTuple):
  """Where a tap puts what it sees."""

  seen: Seen
  late: Seen | None  # what inner programs show when they run
  trace: Any  # the one that `seen` belongs to


class Tap:
  """A place that shows arrays to whoever has opened it.

  Args:
    name: of the place; no other has it.
  """

  def __init__(self, name: str):
    self._looking: contextvars.ContextVar[_Looking | None]
    self._looking = contextvars.ContextVar(name, default=None)
    _taps[name] = self

  @contextlib.contextmanager
  def open(self, late: Seen | None = None) -> Iterator[Seen]:
    """Collects what passes: yields a dict, layer -> list of arrays.

    To use it under `jax.jit`, open it inside of the jitted function and return
    the dict.

    Args:
      late: gets what passes in an inner program (of a jit, a remat or a loop),
        when it has run.  Without it that is an error.
    """
    looking = _Looking({}, late, _trace())
    token = self._looking.set(looking)
    try:
      yield looking.seen
    finally:
      self._looking.reset(token)

  @property
  def is_open(self) -> bool:
    """Whether anybody looks."""
    return self._looking.get() is not None

  @property
  def late(self) -> Seen | None:
    """What inner programs are to fill, if anybody looks and wants it."""
    looking = self._looking.get()
    return None if looking is None else looking.late

  def see(self, name: str, value: Any) -> None:
    """Shows one array of a layer, if anybody looks."""
    looking = self._looking.get()
    if looking is None:
      return
    if looking.trace == _trace():
      _append(looking.seen, name, value)
    elif looking.late is None:
      raise ValueError(
        f'layer {name} runs in an inner program, as that of a jit, a remat or '
        'a loop; only a look from outside sees into it'
      )
    else:
      # NumPy would wait for a copy that, on one core, waits for this callback.
      add = functools.partial(_append, looking.late, name)
      jax.debug.callback(add, value)


def look(taps: Sequence[Tap], function: Callable, *args) -> list[Seen]:
  """Runs a function as one program; what passes some taps, for each of them.

  Args:
    taps: where to look.
    function: of arrays; its result is not used.
    *args: what it is called with.
  """
  for x in jax.tree.leaves(args):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      raise ValueError(
        'a look inside needs arrays that this process holds whole; gather them '
        'first, as djpq_jax.parallel.gather does'
      )
  late: list[Seen] = [{} for _ in taps]

  @jax.jit
  def run(*args):
    with contextlib.ExitStack() as stack:
      stack.enter_context(_look(next(_looks)))
      seen = [
        stack.enter_context(tap.open(into)) for tap, into in zip(taps, late)
      ]
      function(*args)
    return seen

  try:
    found = run(*args)
    jax.effects_barrier()
    for seen, more in zip(found, late):
      for name, values in more.items():
        seen.setdefault(name, []).extend(map(np.asarray, values))
  finally:
    for more in late:  # inner programs that JAX keeps hold on to it
      more.clear()
  return found


def _append(seen: Seen, name: str, value: Any) -> None:
  seen.setdefault(name, []).append(value)


def _trace() -> Any:
  """Tells a trace from those inside of it and around it."""
  return jex_core.get_opaque_trace_state(convention='djpq_jax')


def collecting(function: Callable) -> Callable[..., tuple[Any, dict]]:
  """For a function that is traced on its own: its taps' arrays as results.

  Returns:
    A function that returns (the result, what to give to `show` outside of the
    trace).
  """

  def call(*args, **kwargs):
    with contextlib.ExitStack() as stack:
      seen = {
        name: stack.enter_context(tap.open(tap.late))
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
