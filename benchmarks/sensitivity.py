"""Bits by measured sensitivities: an alternative to the bits that are learned.

What a grid's bits cost in accuracy is measured: the divergence of the outputs
when this grid alone has them, and all others have eight.  An integer program
then finds the bits whose divergences add up to the least within a budget.
This is how mixed precision is planned without a search; here it takes the
channels that a search has kept, and its weights.
"""

import dataclasses
import functools
import itertools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from djpq_jax import compress
from djpq_jax import layers
from djpq_jax.compress import frozen
from djpq_jax.compress import quantizers
from djpq_jax.compress import wrapped

FINE = 8.0  # bits of the grids that are not measured
KINDS = ('weight', 'act')


def divergences(
  model: compress.Compressed,
  plan: compress.Plan,
  bounds: dict[tuple[str, str], tuple[int, int]],
  images,
) -> dict[tuple[str, str], dict[int, float]]:
  """What each whole number of bits of each grid costs.

  Args:
    model: a searched model.
    plan: its channels count, its bits do not.
    bounds: (kind, layer path) -> the fewest and the most bits.
    images: a batch to measure on.

  Returns:
    (kind, layer path) -> bits -> nats between the outputs with all grids fine
    and those with this one at so many bits, a mean over the images.
  """
  fine = {kind: dict.fromkeys(plan.weight_bits, int(FINE)) for kind in KINDS}
  net = compress.freeze(
    model,
    dataclasses.replace(plan, weight_bits=fine['weight'], act_bits=fine['act']),
    images,
  )
  places = [layers.INPUTS, layers.KERNELS]
  inputs, kernels = wrapped.look(net, places, images)
  tensors, grids = {}, {}
  for path, module, operands in compress.hooks(net):
    if operands.weight is None:
      continue
    tensors['weight', path] = [module.kernel[...]]
    tensors['act', path] = inputs[path]
    for kind in KINDS:
      grid = _fine(getattr(operands, kind))
      grids[kind, path] = operands, grid
      setattr(operands, kind, nnx.data(grid))

  @functools.partial(jax.jit, static_argnums=0)
  def log_probabilities(graphdef, state):
    return jax.nn.log_softmax(nnx.merge(graphdef, state)(images))

  reference = log_probabilities(*nnx.split(net))
  found: dict[tuple[str, str], dict[int, float]] = {}
  for (kind, path), (operands, grid) in grids.items():
    found[kind, path] = {}
    low, high = bounds[kind, path]
    for bits in range(low, high + 1):
      mid_rise = kind == 'weight' and frozen.is_mid_rise(
        net.structure.layers[path],
        bits,
        tensors[kind, path][0],
        kernels[path],
      )
      tried = _fine(grid, mid_rise=True) if mid_rise else grid
      moved = quantizers.at_bits(tried, float(bits), tensors[kind, path])
      setattr(operands, kind, nnx.data(moved))
      logits = log_probabilities(*nnx.split(net))
      apart = jnp.sum(jnp.exp(reference) * (reference - logits), axis=-1)
      found[kind, path][bits] = float(jnp.mean(apart))
    setattr(operands, kind, nnx.data(grid))
  return found


def _fine(old: layers.Quantizer, *, mid_rise: bool = False):
  """A grid with learned bits: all numbers of them are one compiled program."""
  return layers.Quantizer(
    jnp.exp(old.log_clip[...]),
    FINE,
    signed=old.signed,
    bounds=(1 + (old.signed and not mid_rise), 16),
    narrow_range=old.narrow_range,
    below=old.below,
    mid_rise=mid_rise,
  )


def least(
  structure: compress.Structure,
  plan: compress.Plan,
  costs: dict[tuple[str, str], dict[int, float]],
  budget: float,
) -> compress.Plan:
  """The plan of the same channels whose bits cost the least within a budget.

  Args:
    structure: of the model that the plan is for.
    plan: its channels are kept.
    costs: what `divergences` gives.
    budget: largest relative BOPs.

  Raises:
    ValueError: there is no such plan.
  """
  uses = {use.name: use for use in compress.planned_usage(structure, plan)}
  total = sum(use.macs for use in uses.values()) * 32**2
  rows, price, loss = [], [], []
  left = budget
  for name, use in uses.items():
    kept = float(use.keep_in) * float(use.keep_out)
    share = use.macs * kept / total
    if ('weight', name) not in costs:
      left -= share * 32**2
      continue
    pairs = itertools.product(costs['weight', name], costs['act', name])
    for weight_bits, act_bits in pairs:
      rows.append((name, weight_bits, act_bits))
      price.append(share * weight_bits * act_bits)
      loss.append(
        costs['weight', name][weight_bits] + costs['act', name][act_bits]
      )
  names = sorted({name for name, *_ in rows})
  one_each = np.array([[row[0] == name for row in rows] for name in names], int)
  found = scipy.optimize.milp(
    np.array(loss),
    integrality=np.ones(len(rows)),
    bounds=scipy.optimize.Bounds(0, 1),
    constraints=[
      scipy.optimize.LinearConstraint(one_each, 1, 1),
      # In units of the budget, which the solver's tolerance is for.
      scipy.optimize.LinearConstraint(np.array([price]) / left, 0, 1 - 1e-6),
    ],
  )
  if found.x is None:
    raise ValueError(f'no bits meet {budget:.4%} of the BOPs: {found.message}')
  chosen = [row for row, x in zip(rows, found.x) if x > 0.5]
  return dataclasses.replace(
    plan,
    weight_bits={name: bits for name, bits, _ in chosen},
    act_bits={name: bits for name, _, bits in chosen},
  )
