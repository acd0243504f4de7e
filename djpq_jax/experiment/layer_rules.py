"""What a config says of layers: their rules, and bits that they may have."""

import dataclasses
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from djpq_jax import compress
from djpq_jax import graph as graph_lib
from djpq_jax import models


def rules_of(config) -> list[compress.Rule]:
  """The rules that a config states."""
  known = [field.name for field in dataclasses.fields(compress.Rule)]
  rules = [dict(rule) for rule in config.rules]
  for rule in rules:
    unknown = sorted(rule.keys() - set(known), key=str)
    if unknown or 'pattern' not in rule:
      what = f'has no field {unknown[0]!r}' if unknown else 'needs a pattern'
      raise ValueError(f'rule {rule} {what}; known: {", ".join(known)}')
  usual = compress.LayerSettings()
  for name in ('narrow_range', 'asymmetric', 'mid_rise'):
    if config[name] != getattr(usual, name):  # for all layers, rules come later
      rules.insert(0, {'pattern': '*', name: config[name]})
  return [compress.Rule(**rule) for rule in rules]


def choices_of(config) -> dict[str, Any]:
  """Bits that the search computes with, as `compress.compress` takes them.

  Measured, whole ones do better where few bits are left, and real-valued ones
  where more are.
  """
  if config.bit_choices:
    return {'choices': tuple(config.bit_choices), 'real_above': False}
  few = _average_bits(config) < config.search.whole_bits_below
  # Uniform bits are whole ones in any case.
  every = few or config.method == 'uniform'
  most = compress.MAX_BITS if every else 0
  if config.search.whole_bits_to and config.method != 'uniform':
    most = config.search.whole_bits_to
  return {'choices': tuple(range(1, most + 1)), 'real_above': True}


def _average_bits(config) -> float:
  """What the budgets leave each operand, if all had the same and no more."""
  bits = [math.inf]
  if config.budget:
    bits.append(compress.FLOAT_BITS * math.sqrt(config.budget))
  if config.budget_weights:
    bits.append(compress.FLOAT_BITS * config.budget_weights)
  return min(bits)


def dense_structure(config) -> compress.Structure:
  """Layers and channel groups of a config's model, from its shapes alone."""
  spec = config.model
  model = nnx.eval_shape(lambda: models.create(spec.name, **spec.kwargs))
  sample = jax.ShapeDtypeStruct((2, *model.input_shape), jnp.float32)
  graph = graph_lib.trace(compress.eval_view(model), sample)
  one_bit = 1 in choices_of(config)['choices']
  return compress.resolve(graph, rules_of(config), one_bit=one_bit)
