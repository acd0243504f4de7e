"""Carries a plan out: cuts channels, fixes bits, folds gates."""

import dataclasses

from flax import nnx
import numpy as np

from djpq_jax import graph as graph_lib
from djpq_jax import layers
from djpq_jax import places as places_lib
from djpq_jax.compress import attach
from djpq_jax.compress import clips
from djpq_jax.compress import quantizers
from djpq_jax.compress import structure as structure_lib
from djpq_jax.compress import wrapped


def freeze(
  model: wrapped.Compressed, plan: structure_lib.Plan, *args
) -> wrapped.Compressed:
  """Carries a plan out: cuts channels and fixes bits.

  Args:
    model: a compressed model whose channels are all still there.
    plan: open channels per group and bits per layer.
    *args: a batch of inputs, on which each grid's clip is fitted to its bits.

  Returns:
    A new, smaller `Compressed` model.  Its gates are the kept channels'
    means, now learned scales without noise; its quantizers keep their bits.

  Raises:
    TypeError: no compressed model, or no plan.
    ValueError: the model is frozen already, or the plan is another model's.
  """
  _check(model, plan)
  structure = dataclasses.replace(model.structure, plan=plan)
  inner = graph_lib.slice_channels(
    model.model, structure.graph, dict(plan.open)
  )
  gates = []
  masks = structure_lib.open_masks(structure)
  for g, gate in zip(structure.gated, model.gates):
    kept = np.flatnonzero(masks[g])
    scale = places_lib.pick(lambda mu, kept=kept: mu[kept], gate.mu[...])
    gates.append(layers.Gate(len(kept), scale=scale, noisy=False))
  frozen = wrapped.Compressed(inner, gates, structure)
  found = {path: operands for path, _, operands in wrapped.hooks(frozen)}
  attach.attach_operands(
    inner, structure, lambda p: found[p].weight, lambda p: found[p].act
  )
  places = [layers.INPUTS, layers.KERNELS]
  inputs, kernels = wrapped.look(frozen, places, *args)
  for path, module, operands in wrapped.hooks(frozen):
    if operands.weight is None:
      continue
    kernel, clip = module.kernel[...], None
    if structure.layers[path].per_channel:
      clip = clips.of_kernel(kernel, structure.graph.layers[path].out_axes)
    bits = plan.weight_bits[path]
    if bits < 2 and bits < operands.weight.bounds[0]:
      raise ValueError(
        f'the plan gives the kernel of {path} one bit, and it has two or more: '
        f'weight_bits=(1, {operands.weight.bounds[1]:g}) of a rule allows one, '
        'unless the kernel needs a level at zero'
      )
    mid_rise = is_mid_rise(structure.layers[path], bits, kernel, kernels[path])
    # Nor one whose kernel had zeros when it was searched.
    mid_rise &= bits < 2 or operands.weight.may_lack_zero
    operands.weight = nnx.data(
      quantizers.at_bits(
        operands.weight, bits, [kernel], clip, fixed=True, mid_rise=mid_rise
      )
    )
    operands.act = nnx.data(
      quantizers.at_bits(
        operands.act, plan.act_bits[path], inputs[path], fixed=True
      )
    )
  return frozen


def _check(model, plan) -> None:
  """Refuses what cannot be frozen, and a plan that is not one of the model."""
  if isinstance(model, wrapped.Compressed) and model.structure.plan is not None:
    raise ValueError(
      'the model is frozen already, and its channels are no longer those that '
      'plans speak of; freeze the model that it was made of'
    )
  wrapped.check(model, 'freeze')
  if not isinstance(plan, structure_lib.Plan):
    raise TypeError(
      'freeze takes a plan, as from allocate.plan, after the model, not a '
      f'{type(plan).__name__}'
    )
  for path, _, operands in wrapped.hooks(model):
    if operands.weight is not None and not (
      path in plan.weight_bits and path in plan.act_bits
    ):
      raise ValueError(f'the plan has no bits for layer {path}')
    for bits in (plan.weight_bits.get(path, 1), plan.act_bits.get(path, 1)):
      if bits != int(bits) or not 1 <= bits <= structure_lib.MAX_BITS:
        raise ValueError(
          f'the plan gives layer {path} {bits} bits, which are whole numbers '
          f'from 1 to {structure_lib.MAX_BITS}'
        )


def is_mid_rise(
  settings: structure_lib.LayerSettings, bits: float, held, handed
) -> bool:
  """Whether the settled grid of a kernel has no level at zero.

  Args:
    settings: of its layer.
    bits: that it gets.
    held: the kernel.
    handed: as that of `quantizers.needs_zero`.
  """
  if bits < 2:  # there is no other grid
    return True
  if bits > layers.MID_RISE_TO or not settings.may_lack_zero:
    return False
  return not quantizers.needs_zero(held, handed)


def fold_gates(model: wrapped.Compressed):
  """The plain float model that a frozen model without quantizers stands for.

  Each gate's scale goes into the kernels that read its channels.  Layers that
  share a kernel have one each afterwards, since their scales can differ.

  Raises:
    ValueError: the model is not frozen, or a layer of it is quantized.
  """
  if model.structure.plan is None:
    raise ValueError('fold_gates needs a model that was frozen with a plan')
  values = [gate.mean() for gate in model.gates]
  plain = nnx.clone(model.model)
  modules = wrapped.layer_modules(plain)
  for path, layer in model.structure.graph.layers.items():
    module = modules[path]
    operands = module.promote_dtype
    if operands.weight is not None or operands.act is not None:
      raise ValueError(f'layer {path} is quantized: its gates cannot be folded')
    if operands.gate is not None:
      shape = [1] * module.kernel.ndim
      assert layer.in_axis is not None  # else its group has no gate
      shape[layer.in_axis] = -1
      scale = operands.gate.pick(values).reshape(shape)
      # A Variable of its own: what others share must not be scaled again.
      module.kernel = module.kernel.replace(module.kernel[...] * scale)
    module.promote_dtype = nnx.static(operands.promote)
  return plain
