"""The compressed model, called like the one it wraps."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from flax import nnx
import jax

from djpq_jax import graph as graph_lib
from djpq_jax import layers
from djpq_jax import taps
from djpq_jax.compress import structure as structure_lib


class Compressed(nnx.Module):
  """A model with gates and quantizers; called like the model it wraps."""

  hardened = False  # whether it is one of integers, which trains no more

  def __init__(
    self,
    model,
    gates: Sequence[Any],  # layers.Gate, or what harden leaves of them
    structure: structure_lib.Structure,
  ):
    self.model = model
    self.gates = nnx.List(gates)
    self.structure = structure

  def __call__(self, *args, gate_key=None, **kwargs):
    """Calls the model.

    Args:
      *args: the model's arguments; the first array is the batch.
      gate_key: draws noisy gates, one per example; without it the gates are
        at their means and closed ones at 0.
      **kwargs: likewise, after them.
    """
    if gate_key is None:
      values = [gate.mean() for gate in self.gates]
    else:
      batch = graph_lib.batch_size(args, kwargs)
      values = layers.sample(self.gates, gate_key, batch)
    # Variables of a view, so that a jit or remat inside of the model sees them.
    model = nnx.view(self.model, raise_if_not_found=False)
    for _, module in nnx.iter_modules(model):
      if isinstance(module, layers.Operands) and module.gate is not None:
        module.values = layers.GateValue(module.gate.pick(values))
    return model(*args, **kwargs)


def check(model, what: str, *, hardened: bool = False) -> None:
  """Refuses a model of another kind than is needed, as a plain one.

  Args:
    model: what was given.
    what: was to be done with it.
    hardened: whether that needs a hardened model, or one that trains.

  Raises:
    TypeError: says what was given instead.
  """
  if isinstance(model, Compressed) and model.hardened == hardened:
    return
  wanted = 'a compressed model, from compress.compress or compress.freeze'
  if hardened:
    wanted = 'a hardened model, from harden.harden'
  raise TypeError(f'{what} takes {wanted}, not a {type(model).__name__}')


class Hook(NamedTuple):
  """A layer that carries operands, with its path."""

  path: str
  layer: Any
  operands: layers.Operands


def eval_view(model):
  """`model` as it is used for prediction, sharing its arrays."""
  return _view(model, deterministic=True, use_running_average=True)


def train_view(model):
  """`model` as it is trained, sharing its arrays."""
  return _view(model, deterministic=False, use_running_average=False)


def _view(model, **mode: bool):
  view = nnx.view(model, **mode, raise_if_not_found=False)
  # Classes of one's own may know no views, but what `Module.eval` sets.
  view.set_attributes(**mode, raise_if_not_found=False)
  return view


def layer_modules(model) -> dict[str, Any]:
  """The layers that multiply and accumulate, by path."""
  return {
    '/'.join(map(str, path)): module
    for path, module in nnx.iter_modules(model)
    if hasattr(module, 'promote_dtype') and hasattr(module, 'kernel')
  }


def hooks(model: Compressed) -> Iterator[Hook]:
  """The layers of a compressed (or hardened) model that carry operands."""
  modules = layer_modules(model.model)
  for path in model.structure.graph.layers:
    operands = modules[path].promote_dtype
    if isinstance(operands, layers.Operands):
      yield Hook(path, modules[path], operands)


def inputs_of(model: Compressed, *args) -> dict[str, list[jax.Array]]:
  """What enters each layer in prediction, gated, before its quantizer."""
  return look(model, [layers.INPUTS], *args)[0]


def look(
  model: Compressed, places: Sequence[taps.Tap], *args
) -> list[taps.Seen]:
  """What passes some taps in prediction, for each of them."""
  graphdef, state = nnx.split(eval_view(model))
  arrays, whole = graph_lib.split_arrays(args)  # the code asks what others are

  def run(state, arrays):
    nnx.merge(graphdef, state)(*whole(arrays))

  return taps.look(places, run, nnx.as_pure(state), arrays)


def check_seen(model: Compressed, seen: taps.Seen) -> None:
  """Refuses a batch on which a quantized layer does not run."""
  for path, _, operands in hooks(model):
    if operands.weight is not None and path not in seen:
      raise ValueError(
        f'layer {path} was not run on the calibration batch, so nobody knows '
        'what enters it; give a batch on which it runs'
      )
