"""Moves the statistics of batch norms into their scales and biases.

A norm's mean is 0 then and its variance 1, so that what it computes is one
product and one sum: the same everywhere, where square roots are not.  A norm
whose variables something else reads, or that is called for the statistics of
the batch, stays as it is.
"""

import collections
from typing import Any

from flax import nnx
import jax
from jax.interpreters import partial_eval
import jax.numpy as jnp
import numpy as np

from djpq_jax import graph as graph_lib
from djpq_jax.harden import parts


def settle(model: parts.HardenedModel) -> None:
  """Settles the batch norms of a hardened model, in place."""
  holders = collections.Counter(
    id(value)
    for _, module in nnx.iter_modules(model)
    for value in vars(module).values()
    if isinstance(value, nnx.Variable)
  )
  others = _for_others(model)
  for path, module in nnx.iter_modules(model):
    # A class of one's own may compute something else.
    if type(module) is not nnx.BatchNorm or path in others:
      continue
    if all(holders[id(v)] == 1 for v in _variables(module)):
      _settle(module)


def _variables(norm: nnx.BatchNorm) -> list[nnx.Variable]:
  found = (norm.mean, norm.var, norm.scale, norm.bias)
  return [v for v in found if v is not None]


def _for_others(model: parts.HardenedModel) -> set[tuple]:
  """Paths of the norms that do more than use their running averages.

  They are called for the statistics of the batch, or the model's own code reads
  a variable of theirs.
  """
  found: set[tuple] = set()
  arguments = model.structure.graph.arguments
  if arguments is None:
    return found

  class Noting(nnx.BatchNorm):
    """Notes what is asked for, and reads none of its variables."""

    noted_as: tuple = ()  # its path

    def __call__(self, x, use_running_average=None, **kwargs):
      running = use_running_average
      if running is None:
        running = self.use_running_average
      if not running:
        found.add(self.noted_as)
      norm = nnx.clone(self)
      for variable in _variables(norm):
        variable.set_value(jnp.zeros_like(variable.get_value()))
      return nnx.BatchNorm.__call__(norm, x, use_running_average, **kwargs)

  graphdef, state = nnx.split(model)
  flat = nnx.to_flat_state(nnx.as_pure(state))
  paths, values = zip(*flat, strict=True)
  arrays, whole = graph_lib.split_arrays(arguments)
  norms = set()

  def call(values, arrays):
    state = nnx.from_flat_state(zip(paths, values, strict=True))
    copy = nnx.merge(graphdef, state)
    found_norms: list[tuple[tuple, Any]] = [
      (path, module)
      for path, module in nnx.iter_modules(copy)
      if type(module) is nnx.BatchNorm
    ]
    for path, module in found_norms:
      module.__class__, module.noted_as = Noting, path
      norms.add(path)
    args, kwargs = whole(arrays)
    return graph_lib.split_arrays(copy(*args, **kwargs))[0]

  jaxpr = jax.make_jaxpr(call)(values, arrays).jaxpr
  # Programs inside are handed whole modules, of which they read what they need.
  _, read = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  used = iter(read)
  for path, value in zip(paths, values, strict=True):
    if sum(next(used) for _ in jax.tree.leaves(value)):
      found |= norms & {path[:-1]}
  return found


def _settle(norm: nnx.BatchNorm) -> None:
  if norm.scale is None or norm.bias is None:
    return  # nowhere to put them
  if any(v[...].dtype != jnp.float32 for v in (norm.scale, norm.bias)):
    return  # nor exactly enough
  mean, var, scale, bias = (
    np.asarray(v[...], np.float64)
    for v in (norm.mean, norm.var, norm.scale, norm.bias)
  )
  factor = scale / np.sqrt(var + norm.epsilon)
  for variable, value in (
    (norm.scale, factor),
    (norm.bias, bias - mean * factor),
    (norm.mean, np.zeros_like(mean)),
    (norm.var, np.full_like(var, _rest_of_one(norm.epsilon))),
  ):
    variable.set_value(jnp.asarray(value, variable.get_value().dtype))


def _rest_of_one(epsilon: float) -> np.float32:
  """The float32 that is exactly 1 once epsilon is added in float32."""
  one, added = np.float32(1), np.float32(epsilon)
  rest = one - added
  while rest + added != one:
    rest = np.nextafter(rest, one if rest + added < one else np.float32(0))
  return rest
