"""Attaches gates and quantizers to a copy of any nnx model."""

from collections.abc import Callable, Iterable, Sequence

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from djpq_jax import graph as graph_lib
from djpq_jax import layers
from djpq_jax.compress import clips
from djpq_jax.compress import quantizers
from djpq_jax.compress import structure as structure_lib
from djpq_jax.compress import wrapped


def compress(
  model,
  rules: Iterable[structure_lib.Rule] = (),
  x=None,
  *,
  bits: float = 8.0,
  choices: Sequence[int] = (),
  whole_to: int = structure_lib.WHOLE_TO,
):
  """Attaches gates and quantizers to a copy of a model.

  Args:
    model: any nnx model, trained or not; it is left as it is.
    rules: what differs from the defaults, see `Rule` and `resolve`.
    x: a batch of real inputs, or a tuple of arguments: activations are
      calibrated on it.  What is no array is passed on as it is.
    bits: bits that every grid begins with, within its bounds.
    choices: whole bits that grids may have while they are searched, and no
      others, see `restrict`; by default any.
    whole_to: without choices, bits up to so many are whole while they are
      searched, and real-valued above [our choice]; 0 for real-valued ones
      alone.  If one bit is among the choices or the whole ones, kernels may
      have it where no rule states their bits and they need no level at zero.

  Returns:
    A `Compressed` model that computes nearly what `model` does.

  Raises:
    ValueError: a rule matches no layer, `x` is missing, has values that are no
      numbers, or makes a layer's inputs infinite, the model cannot be traced,
      is compressed already, or has a part that runs in training alone and reads
      channels that may be cut.
  """
  if isinstance(model, wrapped.Compressed):
    raise ValueError(
      'the model is compressed already, and what its gates have learned would '
      'be lost; pass the model that it was made of, or what '
      'compress.fold_gates makes of it'
    )
  if not isinstance(whole_to, int) or whole_to < 0:
    raise ValueError(f'whole_to takes a whole number from 0 on, not {whole_to}')
  one_bit = 1 in choices if choices else whole_to > 0
  args = x if isinstance(x, tuple) else (x,)
  if x is None or any(isinstance(a, jax.ShapeDtypeStruct) for a in args):
    raise ValueError(
      'compress needs a batch of real inputs x, to calibrate activations on'
    )
  arrays, _ = graph_lib.split_arrays(args)
  if any(leaf.shape and not leaf.shape[0] for leaf in arrays):
    raise ValueError('the calibration batch has no examples')
  for leaf in arrays:
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
      continue
    if np.any(np.isnan(np.asarray(leaf, np.float32))):
      raise ValueError('the calibration batch has values that are not numbers')
  for path, leaf in nnx.to_flat_state(nnx.state(model)):
    value = graph_lib.value_of(leaf)
    if not hasattr(value, 'dtype'):
      raise ValueError(
        f'{"/".join(map(str, path))} holds {type(value).__name__}, which no '
        'artifact can: make it an array, each in a Variable of its own'
      )
  view = wrapped.eval_view(model)
  structure = structure_lib.resolve(
    graph_lib.trace(view, *args), rules, one_bit=one_bit
  )
  _check_training(model, structure, args)
  compressed = assemble(model, structure, bits)
  quantizers.calibrate(compressed, *args)
  quantizers.restrict(compressed, choices, whole_to=whole_to)
  return compressed


def _check_training(model, structure: structure_lib.Structure, args) -> None:
  """Refuses what runs in training alone and reads channels that may be cut."""
  names = [structure.groups[g].name for g in structure.gated]
  view = wrapped.train_view(model)
  error = graph_lib.failure_of_slices(view, structure.graph, names, *args)
  if error:
    raise ValueError(
      'the model has a part that runs in training alone, and cannot without '
      f'channels that may be cut ({error}): compress the model without it, or '
      'state prune=False for all layers'
    )


def assemble(
  model, structure: structure_lib.Structure, bits: float = 8.0
) -> wrapped.Compressed:
  """Attaches operands as `structure` says; activations are not calibrated."""
  model = nnx.clone(model)
  modules = wrapped.layer_modules(model)

  def weight(path):
    settings = structure.layers[path]
    if not settings.quantize:
      return None
    kernel = modules[path].kernel[...]
    start = float(np.clip(bits, *settings.weight_bits))
    grid = layers.Quantizer(
      clips.of_kernel(kernel),
      start,
      signed=True,
      bounds=settings.weight_bits,
      learn_exponent=settings.exponent,
      narrow_range=settings.narrow_range,
      mid_rise=settings.weight_bits[0] < 2,
      may_lack_zero=settings.may_lack_zero,
    )
    # Of one bit the largest magnitude would be that of all weights.
    return quantizers.at_bits(grid, start, [kernel]) if start < 2 else grid

  def act(path):
    settings = structure.layers[path]
    if not settings.quantize:
      return None
    return quantizers.act_quantizer(settings, bits, 1.0, signed=True)

  attach_operands(model, structure, weight, act)
  gates = [
    layers.Gate(g.size, min_open=g.min_channels)
    for g in (structure.groups[i] for i in structure.gated)
  ]
  return wrapped.Compressed(model, gates, structure)


def attach_operands(
  model,
  structure: structure_lib.Structure,
  weight: Callable[[str], nnx.Module | None],
  act: Callable[[str], nnx.Module | None],
) -> None:
  """Puts a hook on every layer that multiplies and accumulates, in place.

  Args:
    model: the model inside of a `Compressed`, cut as `structure` says.
    structure: tells which gates a layer's input has.
    weight: makes the quantizer of a layer's kernel, given its path.
    act: makes the quantizer of a layer's input.
  """
  modules = wrapped.layer_modules(model)
  for path, layer in structure.graph.layers.items():
    promote = modules[path].promote_dtype
    if isinstance(promote, layers.Operands):
      promote = promote.promote
    operands = layers.Operands(
      path,
      weight=weight(path),
      act=act(path),
      gate=_gate_index(layer, structure),
      feature_axis=layer.feature_axis,
      promote=promote,
    )
    modules[path].promote_dtype = nnx.data(operands)


def _gate_index(
  layer, structure: structure_lib.Structure
) -> layers.GateIndex | None:
  """Finds the gates of a layer's inputs in what is left of its groups."""
  if layer.depthwise:  # passes its group on: the next layer gates it
    return None
  group, channel = _left(layer.in_group, layer.in_channel, structure)
  gates = tuple(k for k, g in enumerate(structure.gated) if np.any(group == g))
  if not gates:
    return None
  sizes = _sizes_left(structure)
  index = np.zeros(len(group), int)
  start = 1
  for k in gates:
    g = structure.gated[k]
    index = np.where(group == g, start + channel, index)
    start += sizes[g]
  whole = len(gates) == 1 and np.array_equal(index, np.arange(1, start))
  return layers.GateIndex(gates, None if whole else index)


def _sizes_left(structure: structure_lib.Structure) -> list[int]:
  return [int(mask.sum()) for mask in structure_lib.open_masks(structure)]


def _left(group, channel, structure: structure_lib.Structure):
  """Drops removed channels from a channel map and renumbers the rest."""
  masks = structure_lib.open_masks(structure)
  kept = np.ones(len(group), bool)
  renumbered = np.array(channel)
  for g in np.unique(group[group >= 0]):
    at = group == g
    kept[at] = masks[g][channel[at]]
    renumbered[at] = (np.cumsum(masks[g]) - 1)[channel[at]]
  return group[kept], renumbered[kept]
