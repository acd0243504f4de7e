"""Changes of the method that no config has, each alone.

Variants of crossvalidate.py, and contestants 'DJPQ NAME @BUDGET' of compare.py.
"""

import contextlib
import dataclasses
import functools
import math
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sensitivity

from djpq_jax import allocate
from djpq_jax import budget as budget_lib
from djpq_jax import compress
from djpq_jax import layers
from djpq_jax import optim
from djpq_jax import train
from djpq_jax.compress import structure as structure_lib
from djpq_jax.experiment import phases
from djpq_jax.ops import grid
from djpq_jax.train import step as step_lib

DAMPING = 1e-4  # per weight, of its squared distance from the grid, in steps
SAMPLE: dict[str, Any] = {}  # 'images' that a plan is measured on
LOOKING_BACK = 10.0  # steps, of a running mean of the cost
AVERAGED = 0.05  # of a phase's steps: what an average of weights looks back on


def _bits_held(held: int):
  """Bits whose gradient misses one part of a grid: 0 the step, 1 the clip."""

  def bits(self, *, restricted: bool = True):
    if self.fixed_bits is not None:
      return self.fixed_bits
    whole = _BITS(self, restricted=restricted)
    parts = list(self.grid(restricted=restricted))
    parts[held] = jax.lax.stop_gradient(parts[held])
    found = jnp.max(grid.bit_width(*parts, **self.extent))
    return found + jax.lax.stop_gradient(whole - found)

  return bits


def _let_through(self, x):
  """Beyond the level of one bit x has its gradient, unlike beyond clips."""
  out = _QUANTIZE(self, x)
  if self.fixed_bits is None and self.signed and 1 in self.choices:
    clip = jnp.exp(self.log_clip[...])
    *_, bits = self._grid()
    far = (jnp.abs(x) > clip) & (bits < 2) & jnp.isfinite(x)
    beyond = jnp.where(far, x, 0)
    out += (beyond - jax.lax.stop_gradient(beyond)).astype(x.dtype)
  return out


def _means(found, key, batch: int):
  """Gates without noise; the cost still closes them."""
  del key, batch
  return [gate.mean() for gate in found]


def _damped_loss(params, state, batch, key):
  """The loss, with weights drawn to the middle of their cells.

  Weights between two cells swing from one to the other; the term that keeps
  them from it is that of Nagel et al. 2022, in units of the step, and rises
  from 0 over the finetuning.
  """
  total, rest = _TOTAL_LOSS(params, state, batch, key)
  program = state.program
  if not program.compressed or program.objective.noisy:
    return total, rest
  model = optim.merge(program.train_graph, params, state.rest)
  for _, layer, operands in compress.hooks(model):
    if operands.weight is None:
      continue
    step, clip, _ = jax.lax.stop_gradient(operands.weight.grid())
    kernel = layer.kernel[...]
    cell = jax.lax.stop_gradient(operands.weight(kernel))
    lowest = -clip if operands.weight.symmetric else -clip - step
    distance = (jnp.clip(kernel, lowest, clip) - cell) / step
    total += DAMPING * state.step / _STEPS['finetune'] * jnp.sum(distance**2)
  return total, rest


def _noting_steps(run, model, teacher, *, steps: int):
  """The state that the finetuning begins with; its steps are kept."""
  _STEPS['finetune'] = steps
  return _FINETUNE_STATE(run, model, teacher, steps=steps)


class _Average(NamedTuple):
  params: dict


def _averaging(config, steps: int):
  """The optimizer, with an average of the weights in its state."""
  inner = _MAKE(config, steps)
  decay = 1 - 1 / max(1.0, AVERAGED * steps)

  def init(params):
    # A copy, since a step is given the buffers of both.
    return inner.init(params), _Average(jax.tree.map(jnp.copy, params))

  def update(updates, state, params=None):
    updates, moved = inner.update(updates, state[0], params)
    after = optax.apply_updates(params, updates)
    average = optax.incremental_update(after, state[1].params, 1 - decay)
    return updates, (moved, _Average(average))

  return optax.GradientTransformation(init, update)


def _model_of_average(state):
  """The model with the averages of its weights; grids and gates are the last.

  A phase that was trained before, without averages, is taken as it is.
  """
  found = state.opt_state
  if isinstance(found, tuple) and isinstance(found[-1], _Average):
    weights = found[-1].params['weights']
    params = dict(state.params) | {'weights': weights}
    return optim.merge(state.program.eval_graph, params, state.rest)
  return _MODEL_OF(state)


def _noting_sample(run, *args, **kwargs):
  """The search; the images that a plan is measured on are kept."""
  SAMPLE['images'] = run.sample()
  return _SEARCH(run, *args, **kwargs)


def _measured_plan(model, budgets, choices=None):
  """The plan's channels, with bits by measured sensitivities."""
  plan = _PLAN(model, budgets, choices)
  bounds = {}
  for path, _, operands in compress.hooks(model):
    if operands.weight is not None:
      for kind in sensitivity.KINDS:
        low, high = getattr(operands, kind).bounds
        bounds[kind, path] = math.ceil(low), math.floor(high)
  images = SAMPLE['images']
  costs = sensitivity.divergences(model, plan, bounds, images)
  structure = model.structure
  most = budgets['bops']
  return sensitivity.least(structure, plan, costs, most)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Watching:
  """The controller's state, and where it saw the cost, float32 scalars."""

  log_strength: jax.Array
  log_cost: jax.Array  # a running mean


def _watching(self):
  start = jnp.asarray(np.log(max(self.start, self.budget)), jnp.float32)
  strength = _INIT(self).log_strength
  return _Watching(log_strength=strength, log_cost=start)


def _update_unless_it_falls(self, control, step, relative):
  """No more strength while the cost falls half as fast as its target, or more.

  Bits and gates move at the rates of their optimizer however hard they are
  pushed, and what is pushed harder meanwhile is all the rest.
  """
  cost = jax.lax.stop_gradient(jnp.log(relative))
  mean = control.log_cost + (cost - control.log_cost) / LOOKING_BACK
  falls = (mean - control.log_cost) < jnp.log(
    self.target(step + 1) / self.target(step)
  ) / 2
  strength, found = _UPDATE(self, control, step, relative)
  held = jnp.minimum(found.log_strength, control.log_strength)
  total = jnp.where(falls, held, found.log_strength)
  return strength, _Watching(log_strength=total, log_cost=mean)


_STEPS = {'finetune': 1}
_SEARCH = phases.search
_PLAN = allocate.plan
_BITS = layers.Quantizer.bits
_QUANTIZE = layers.Quantizer.__call__
_TOTAL_LOSS = step_lib.total_loss
_FINETUNE_STATE = phases.finetune_state
_MAKE = optim.make
_MODEL_OF = train.model_of
_UPDATE = budget_lib.Controller.update
_INIT = budget_lib.Controller.init

# Name -> what is replaced: (where, attribute, by what).
PATCHES: dict[str, list[tuple[Any, str, Any]]] = {
  'BOPs move steps alone': [(layers.Quantizer, 'bits', _bits_held(1))],
  'BOPs move clips alone': [(layers.Quantizer, 'bits', _bits_held(0))],
  'one bit let through': [(layers.Quantizer, '__call__', _let_through)],
  'no push while it falls': [
    (budget_lib.Controller, 'init', _watching),
    (budget_lib.Controller, 'update', _update_unless_it_falls),
  ],
  'gates without noise': [(layers, 'sample', _means)],
  'damped weights': [
    (step_lib, 'total_loss', _damped_loss),
    (phases, 'finetune_state', _noting_steps),
  ],
  'measured plan': [
    (phases, 'search', _noting_sample),
    (allocate, 'plan', _measured_plan),
  ],
  'inputs of one bit': [
    (
      structure_lib,
      'LayerSettings',
      functools.partial(structure_lib.LayerSettings, act_bits=(1, 8)),
    ),
  ],
  'averaged weights': [
    (optim, 'make', _averaging),
    (train, 'model_of', _model_of_average),
  ],
}


@contextlib.contextmanager
def patched(name: str):
  """A context in which the method is changed.

  Args:
    name: one of PATCHES, with or without 'DJPQ ' before it; any other changes
      nothing.
  """
  with contextlib.ExitStack() as stack:
    for where, attribute, new in PATCHES.get(name.removeprefix('DJPQ '), []):
      stack.enter_context(mock.patch.object(where, attribute, new))
    yield
