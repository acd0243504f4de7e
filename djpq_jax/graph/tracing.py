"""`trace`: finds a model's MAC layers and the channels that go together."""

import dataclasses
import functools

from flax import nnx
import jax
from jax.extend import core as jex_core
import numpy as np

from djpq_jax.graph import grouping
from djpq_jax.graph import interpret
from djpq_jax.graph import marking
from djpq_jax.graph import records
from djpq_jax.graph import surgery


def trace(model: nnx.Module, *args, **kwargs) -> records.ChannelGraph:
  """Traces `model(*args, **kwargs)` and groups its channels.

  Nothing is computed: the model runs on shapes only, and is used in the mode in
  which it is passed (see `flax.nnx.view`). What the trace cannot follow makes a
  group unprunable, with the reason in `ChannelGroup.reason`. Groups that seem
  prunable are tried: slices of them must run, and must run the same program.

  Args:
    model: any `nnx.Module`; it is not changed.
    *args: arrays or `jax.ShapeDtypeStruct`, batch axis first and channels
      last; anything else is passed on as it is.
    **kwargs: likewise.

  Returns:
    The graph of MAC layers and channel groups.

  Raises:
    ValueError: if there is no array argument, if the model's call fails, if
      it calls no MAC layer, or is one.
  """
  batch = batch_size(args, kwargs)
  try:
    program = marking.program(model, args, kwargs)
  except Exception as error:
    shapes = [x.shape for x in jax.tree.leaves((args, kwargs)) if _is_array(x)]
    raise ValueError(
      f'cannot trace {type(model).__name__} on arguments of shapes {shapes}: '
      f'{_first_line(error)}'
    ) from error
  found = interpret.interpret(program, batch)
  if not found.ledger.uses:
    raise ValueError(
      f'{type(model).__name__} calls no MAC layer (Conv, Linear, '
      'LinearGeneral, Einsum, ConvTranspose or a module like them with a '
      'promote_dtype hook and a kernel)'
    )
  if '' in found.ledger.uses:
    raise ValueError(
      f'the model is a layer itself ({type(model).__name__}); put it into one '
      'that holds layers, as nnx.Sequential(layer)'
    )
  graph = dataclasses.replace(
    grouping.build(found, program.kinds),
    arguments=jax.tree.map(marking.shape_of, (args, kwargs)),
  )
  return _verified(graph, model, args, kwargs, program)


def failure_of_slices(model, graph: records.ChannelGraph, names, *args) -> str:
  """Why a model does not run without some channels of groups, in its mode.

  Args:
    model: in the mode in which it is tried, as that of training.
    graph: of the model, as `trace` found it in another mode.
    names: of the groups that lose channels.
    *args: as `trace` has them.

  Returns:
    The error's first line; '' if it runs, or does not with all channels either.
  """
  if not names:
    return ''
  model = marking.abstract(model)
  try:
    sliced = surgery.slice_channels(model, graph, _probe(graph, names))
    marking.program(sliced, args, {})
  except Exception as error:
    failure = _first_line(error)
  else:
    return ''
  try:
    marking.program(model, args, {})
  except Exception:
    return ''
  return failure


_is_array = marking.is_array


def batch_size(args, kwargs) -> int:
  """The leading axis of the first array among a call's arguments."""
  for x in jax.tree.leaves((args, kwargs)):
    if _is_array(x) and x.shape:
      return x.shape[0]
  raise ValueError('there is no array argument with a leading batch axis')


def _first_line(error) -> str:
  lines = str(error).strip().splitlines() or ['']
  return f'{type(error).__name__}: {lines[0]}'


def _verified(graph, model, args, kwargs, program):
  """Freezes groups whose size is written down in the model's own code."""
  model = marking.abstract(model)
  script = _script(program.jaxpr)
  names = tuple(group.name for group in graph.groups if not group.reason)

  @functools.cache
  def failure(names: tuple[str, ...]) -> str:
    keep = _probe(graph, names)
    try:
      sliced = surgery.slice_channels(model, graph, keep)
      again = marking.program(sliced, args, kwargs)
    except Exception as error:
      return _first_line(error)
    if again.outputs != program.outputs:
      was = [x.shape for x in program.outputs]
      now = [x.shape for x in again.outputs]
      return f'outputs of shapes {was} became {now}'
    if _script(again.jaxpr) != script:
      return 'it computes something else with another size'
    return ''

  offenders = _offenders(failure, names)
  rest = tuple(name for name in names if name not in offenders)
  # Groups that can be cut one by one, but not together, all stay.
  offenders |= dict.fromkeys(rest, failure(rest)) if failure(rest) else {}
  groups = tuple(
    dataclasses.replace(
      group,
      reason=f"the model's code fixes this size: {offenders[group.name]}",
    )
    if group.name in offenders
    else group
    for group in graph.groups
  )
  return dataclasses.replace(graph, groups=groups)


def _probe(graph, names):
  """Masks that drop another number of channels in each group.

  Equal or proportional sizes could hide a size that the model computes from
  another group.
  """
  masks = {}
  for i, group in enumerate(graph.groups):
    if group.name in names:
      drop = 1 + (7 * i + 2) % max(1, group.size // 2)
      masks[group.name] = np.arange(group.size) < group.size - drop
  return masks


def _offenders(failure, names) -> dict[str, str]:
  """Bisects the groups that cannot be sliced."""
  if not names or not (error := failure(names)):
    return {}
  if len(names) == 1:
    return {names[0]: error}
  half = len(names) // 2
  return _offenders(failure, names[:half]) | _offenders(failure, names[half:])


def _script(closed) -> list:
  """The primitives and constants of a program: all but the sizes."""
  script: list = []
  jaxpr = getattr(closed, 'jaxpr', closed)
  script.extend(map(_bytes, getattr(closed, 'consts', ())))
  for eqn in jaxpr.eqns:
    script.append(eqn.primitive.name)
    for x in eqn.invars:
      if isinstance(x, jex_core.Literal):
        script.append(_bytes(x.val))
    for inner in _programs(eqn.params):
      script.extend(_script(inner))
  return script


def _bytes(constant) -> bytes:
  dtype = getattr(constant, 'dtype', None)
  if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
    constant = jax.random.key_data(constant)
  return np.asarray(constant).tobytes()


def _programs(params):
  """Programs in an equation, closed where they have constants."""
  for value in params.values():
    for x in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(x, (jex_core.Jaxpr, jex_core.ClosedJaxpr)):
        yield x
