"""Attaches gates and quantizers to a copy of any nnx model."""

from collections.abc import Callable, Collection, Iterable, Sequence

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from djpq_jax import graph as graph_lib
from djpq_jax import layers
from djpq_jax.compress import clips
from djpq_jax.compress import structure as structure_lib
from djpq_jax.compress import wrapped

CLIP_PERCENTILE = 99.99
ONE_SIDED = 0.5  # reach below zero over reach above it
SPARSE = 0.01  # share of zeros from which on they are there for a reason


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
  calibrate(compressed, *args)
  restrict(compressed, choices, whole_to=whole_to)
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
    return at_bits(grid, start, [kernel]) if start < 2 else grid

  def act(path):
    settings = structure.layers[path]
    if not settings.quantize:
      return None
    return _act_quantizer(settings, bits, 1.0, signed=True)

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


def restrict(
  model: wrapped.Compressed,
  choices: Sequence[int] = (),
  *,
  whole_to: int = 0,
) -> None:
  """Says which bits a model that is searched may have, in place.

  Args:
    model: compressed, and not frozen.
    choices: allowed bits, as (2, 4, 8, 16, 32), and no others; where they leave
      a layer nothing within its bounds, `allocate.plan` refuses them.
    whole_to: without choices, bits up to so many are whole, and real-valued
      above.
  """
  whole = choices or range(1, whole_to + 1)
  for _, _, operands in wrapped.hooks(model):
    for quantizer in (operands.weight, operands.act):
      if quantizer is not None:
        low, high = quantizer.bounds
        within = [float(b) for b in whole if low <= b <= high]
        quantizer.choices = tuple(sorted(within))
        quantizer.real_above = bool(within) and not choices


def regrid(
  model: wrapped.Compressed,
  bits: float,
  *args,
  kinds: Collection[str] = ('weight', 'act'),
) -> None:
  """Gives all grids the same bits, within their bounds, in place.

  Args:
    model: compressed, and not frozen.
    bits: of each grid, real-valued.
    *args: a batch of inputs, on which the clips are fitted to the bits.
    kinds: of which grids, those of kernels or of inputs.
  """
  inputs = wrapped.inputs_of(model, *args)
  wrapped.check_seen(model, inputs)
  for path, module, operands in wrapped.hooks(model):
    if operands.weight is not None and 'weight' in kinds:
      kernel = module.kernel[...]
      operands.weight = nnx.data(at_bits(operands.weight, bits, [kernel]))
    if operands.act is not None and 'act' in kinds:
      operands.act = nnx.data(at_bits(operands.act, bits, inputs[path]))


def at_bits(
  quantizer,
  bits: float,
  tensors,
  clip=None,
  *,
  fixed: bool = False,
  mid_rise: bool | None = None,
) -> layers.Quantizer:
  """A quantizer of the same kind, its clip (or clips) of least squared error.

  Args:
    quantizer: of one tensor.
    bits: that it gets; within its bounds, unless they are `fixed`.
    tensors: values that it quantizes, of any shapes.
    clip: what to begin with, by default its own; see `clips.of_least_error`.
    fixed: whether the bits stay as they are.
    mid_rise: whether its levels lie half a step beside whole steps; by
      default, whether they did.
  """
  if not fixed:
    bits = float(np.clip(bits, *quantizer.bounds))
  if mid_rise is None:
    mid_rise = quantizer.mid_rise
  _, found, exponent = quantizer.grid()
  clip = np.asarray(found if clip is None else clip)

  def made(clip, below) -> layers.Quantizer:
    return layers.Quantizer(
      clip,
      bits,
      signed=quantizer.signed,
      bounds=(bits, bits) if fixed else quantizer.bounds,
      learn_exponent=quantizer.log_exponent is not None,
      fixed=fixed,
      exponent=exponent,
      choices=quantizer.choices,
      real_above=quantizer.real_above,
      narrow_range=quantizer.narrow_range,
      below=below,
      mid_rise=mid_rise,
      may_lack_zero=quantizer.may_lack_zero and not fixed,
    )

  grid = made(clip, quantizer.below)
  if grid.log_exponent is not None:  # it is no copy of the tensor
    return grid
  if fixed and grid.sides['below'] is not None:  # whole levels on both sides
    return made(*clips.asymmetric(clip, round(bits), tensors))
  found = clips.of_least_error(
    clip,
    *grid.levels(grid.nearest(bits)),
    tensors,
    mid_rise=grid.lacks_zero(grid.nearest(bits)),
  )
  return made(found, quantizer.below)


def _check_kernel(path: str, held, handed) -> None:
  """Refuses a layer that computes with another kernel than it holds."""
  # In NumPy, so that no program is compiled for each shape.
  held = np.asarray(held)
  for kernel in map(np.asarray, handed):
    same = False
    if kernel.shape == held.shape:
      with np.errstate(over='ignore'):  # of float16
        own = held.astype(kernel.dtype)
      # A mask leaves zeros.
      same = (
        (kernel == own) | (kernel == 0) | (np.isnan(own) & np.isnan(kernel))
      )
    if not np.all(same):
      raise ValueError(
        f'{path} cannot be quantized, since it multiplies by another kernel '
        'than it holds, as nnx.WeightNorm makes one; give it the kernel that '
        f'it uses, or leave it as it is by a rule with pattern={path!r}, '
        'quantize=False and prune=False'
      )


def needs_zero(held, handed) -> bool:
  """Whether a kernel has zeros that are there for a reason.

  Args:
    held: the kernel.
    handed: what its layer multiplies by at each call: the kernel, or what a
      mask leaves of it.
  """
  zero = np.asarray(held) == 0
  masked = any(np.any((np.asarray(k) == 0) & ~zero) for k in handed)
  # An input or an output that nothing comes of, however wide the layer is.
  dead = False
  if zero.ndim > 1:
    matrix = zero.reshape(-1, *zero.shape[-2:])
    dead = matrix.all(axis=(0, 1)).any() or matrix.all(axis=(0, 2)).any()
  return masked or bool(dead or zero.mean() >= SPARSE)


def _with_zero(path: str, kernel, quantizer) -> layers.Quantizer:
  """The grid of a kernel that needs a level at zero: of two bits at least."""
  low, high = quantizer.bounds
  if high < 2:
    raise ValueError(
      f'the kernel of {path} cannot have one bit, of which no level is at '
      'zero, since it is masked or has zeros: a rule with '
      f'pattern={path!r} and weight_bits=(1, 8) allows more'
    )
  bounds = (max(2.0, low), high)
  return layers.Quantizer(
    clips.of_kernel(kernel),
    float(np.clip(quantizer.bits(restricted=False), *bounds)),
    signed=True,
    bounds=bounds,
    learn_exponent=quantizer.log_exponent is not None,
    narrow_range=quantizer.narrow_range,
  )


def _act_quantizer(
  settings, bits, clip, *, signed, below: float | None = None
) -> layers.Quantizer:
  bounds = settings.act_bits
  if signed:  # a sign and one magnitude need two bits
    bounds = (max(2, bounds[0]), max(2, bounds[1]))
  return layers.Quantizer(
    clip,
    float(np.clip(bits, *bounds)),
    signed=signed,
    bounds=bounds,
    narrow_range=settings.narrow_range,
    below=below,
  )


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


def calibrate(
  model: wrapped.Compressed, *args, percentile: float = CLIP_PERCENTILE
):
  """Sets every input quantizer's clip and sides from one batch, in place.

  The clip is a percentile of the magnitudes that enter the layer while no
  input is quantized; how far they reach below zero, likewise.
  """
  quantized = [hook for hook in wrapped.hooks(model) if hook.operands.act]
  bits = {hook.path: float(hook.operands.act.bits()) for hook in quantized}
  for hook in quantized:
    hook.operands.act = nnx.data(None)
  places = [layers.INPUTS, layers.KERNELS]
  inputs, kernels = wrapped.look(model, places, *args)
  wrapped.check_seen(model, inputs)
  for path, module, operands in quantized:
    held = module.kernel[...]
    _check_kernel(path, held, kernels[path])
    if needs_zero(held, kernels[path]):
      operands.weight = nnx.data(_with_zero(path, held, operands.weight))
    values = [np.asarray(v, np.float32) for v in inputs[path]]
    x = np.concatenate([v.ravel() for v in values])
    if not np.all(np.isfinite(x)):
      raise ValueError(
        f'inputs of {path} are not finite on the calibration batch: values of '
        'the batch or weights of the model are not'
      )
    kept = percentile
    clip = np.percentile(np.abs(x), kept)
    if not clip:  # hardly anything but zeros
      kept = 100.0
      clip = np.abs(x).max() or 1.0
    settings = model.structure.layers[path]
    signed = bool(x.min() < 0)
    below = None
    if signed and settings.asymmetric and not settings.narrow_range:
      reach = max(0.0, -float(np.percentile(x, 100 - kept) / clip))
      # Rounded, as it is a constant of what all processes compile.
      below = round(reach, 3) if reach < ONE_SIDED else None
    act = _act_quantizer(settings, bits[path], clip, signed=signed, below=below)
    operands.act = nnx.data(act)
