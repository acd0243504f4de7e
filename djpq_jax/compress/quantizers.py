"""The quantizers of a compressed model: their clips, sides and bits."""

from collections.abc import Collection, Sequence

from flax import nnx
import numpy as np

from djpq_jax import layers
from djpq_jax.compress import clips
from djpq_jax.compress import wrapped

CLIP_PERCENTILE = 99.99
ONE_SIDED = 0.5  # reach below zero over reach above it
SPARSE = 0.01  # share of zeros from which on they are there for a reason


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
    act = act_quantizer(settings, bits[path], clip, signed=signed, below=below)
    operands.act = nnx.data(act)


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


def act_quantizer(
  settings, bits, clip, *, signed, below: float | None = None
) -> layers.Quantizer:
  """The grid of an input that `LayerSettings` speak of."""
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
