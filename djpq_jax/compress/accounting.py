"""What each layer of a compressed model costs, now or under a plan."""

import dataclasses
import fractions
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from djpq_jax import cost
from djpq_jax.compress import structure as structure_lib
from djpq_jax.compress import wrapped

FLOAT_BITS = 32


def usage(model: wrapped.Compressed) -> list[cost.LayerUse]:
  """What each layer costs now, differentiable in gates and quantizers.

  Products outside of layers, as in attention, count as 32 x 32 bits.
  """
  wrapped.check(model, 'usage')
  structure = model.structure
  masks = structure_lib.open_masks(structure)
  keep: list[Any] = [np.float32(1)] * len(masks)
  for g, mask in enumerate(masks):
    keep[g] = mask.astype(np.float32)
  if structure.plan is None:
    for g, gate in zip(structure.gated, model.gates):
      keep[g] = gate.keep()
  found = {path: operands for path, _, operands in wrapped.hooks(model)}
  uses = []
  for path, layer in structure.graph.layers.items():
    operands = found.get(path)
    uses.append(
      cost.LayerUse(
        name=path,
        macs=layer.macs,
        weights=layer.weights,
        keep_in=_share(layer.in_group, layer.in_channel, keep),
        keep_out=1.0
        if layer.depthwise
        else _share(layer.out_group, layer.out_channel, keep),
        weight_bits=_bits(operands.weight if operands else None),
        act_bits=_bits(operands.act if operands else None),
      )
    )
  return uses + [
    _product_use(product, [_share(*axis, keep) for axis in product.axes])
    for product in structure.graph.products
  ]


def _product_use(product, shares, one=1.0, bits=float(FLOAT_BITS)):
  """What a product outside of the layers costs, given what its axes keep."""
  return cost.LayerUse(
    name=product.name,
    macs=product.macs,
    weights=0,
    keep_in=one,
    keep_out=math.prod(shares, start=one),
    weight_bits=bits,
    act_bits=bits,
  )


def _bits(quantizer):
  return float(FLOAT_BITS) if quantizer is None else quantizer.bits()


def _share(group, channel, keep):
  """Mean of the kept fractions of a layer's channels, 1 where untraced."""
  total: Any = 0.0
  for g in np.unique(group):
    if g < 0:
      total += float(np.count_nonzero(group == g))
    else:
      count = np.bincount(channel[group == g])
      weights = np.zeros(len(keep[g]), np.float32)
      weights[: len(count)] = count
      total += jnp.dot(jnp.asarray(keep[g]), weights)
  return total / len(group)


def planned_usage(
  structure: structure_lib.Structure, plan: structure_lib.Plan
) -> list[cost.LayerUse]:
  """What each layer costs under a plan, in exact whole numbers."""
  masks = structure_lib.open_masks(dataclasses.replace(structure, plan=plan))

  def share(group, channel):
    kept = sum(
      int(masks[g][c]) if g >= 0 else 1 for g, c in zip(group, channel)
    )
    return fractions.Fraction(kept, len(group))

  one = fractions.Fraction(1)
  uses = [
    cost.LayerUse(
      name=path,
      macs=layer.macs,
      weights=layer.weights,
      keep_in=share(layer.in_group, layer.in_channel),
      keep_out=one
      if layer.depthwise
      else share(layer.out_group, layer.out_channel),
      weight_bits=plan.weight_bits.get(path, FLOAT_BITS),
      act_bits=plan.act_bits.get(path, FLOAT_BITS),
    )
    for path, layer in structure.graph.layers.items()
  ]
  return uses + [
    _product_use(
      product, [share(*axis) for axis in product.axes], one, FLOAT_BITS
    )
    for product in structure.graph.products
  ]


class PlanCosts:
  """Relative costs of many plans of one structure.

  All is counted in whole numbers, of which only the last quotient is rounded:
  a plan that spends its budget to the last bit is not above it.

  Args:
    structure: of the model that has all its channels.
  """

  def __init__(self, structure: structure_lib.Structure):
    self.structure = structure
    layers = structure.graph.layers.values()
    self.macs = int(structure.graph.float_macs)
    self.weights = sum(int(layer.weights) for layer in layers)
    self.products = [
      (int(product.macs), [self._channels(*axis) for axis in product.axes])
      for product in structure.graph.products
    ]
    self.rows = []
    for layer in layers:
      axes = [self._channels(layer.in_group, layer.in_channel)]
      if not layer.depthwise:
        axes.append(self._channels(layer.out_group, layer.out_channel))
      row = (layer.path, int(layer.macs), int(layer.weights), axes)
      self.rows.append(row)
    # Every share of channels is a whole number of this one's parts.
    self.parts = math.lcm(
      *(_channels_of(axes) for *_, axes in self.products + self.rows)
    )

  def _channels(self, group, channel):
    """[(group name, channels)] of those with gates, and how many in all."""
    gated = set(self.structure.gated)
    parts = [
      (self.structure.groups[g].name, channel[group == g])
      for g in np.unique(group)
      if g in gated
    ]
    return parts, len(group)

  def _left(self, axes, plan: structure_lib.Plan) -> int:
    """The share that is left of channels on several axes, in parts."""
    left = self.parts // _channels_of(axes)
    for parts, total in axes:
      closed = sum(
        np.count_nonzero(~plan.open[name][index])
        for name, index in parts
        if name in plan.open
      )
      left *= total - int(closed)
    return left

  def relative(self, plan: structure_lib.Plan) -> dict[str, float]:
    """Costs by name, as `cost.relative` has them; bits may be real-valued."""
    size: int | float = 0
    left_macs = sum(
      macs * self._left(axes, plan) for macs, axes in self.products
    )
    bops: int | float = FLOAT_BITS**2 * left_macs
    for path, macs, weights, axes in self.rows:
      left = self._left(axes, plan)
      weight_bits = _number(plan.weight_bits.get(path, FLOAT_BITS))
      act_bits = _number(plan.act_bits.get(path, FLOAT_BITS))
      left_macs += macs * left
      bops += macs * left * (weight_bits * act_bits)
      size += weights * left * weight_bits
    return {
      'bops': bops / (FLOAT_BITS**2 * self.macs * self.parts),
      'macs': left_macs / (self.macs * self.parts),
      'weights': size / (max(FLOAT_BITS * self.weights, 1) * self.parts),
    }


def _channels_of(axes) -> int:
  """How many combinations of channels several axes have."""
  return math.prod(total for _, total in axes)


def _number(bits) -> int | float:
  """Bits as a number of Python, whose whole numbers have no largest one."""
  return int(bits) if bits == int(bits) else float(bits)
