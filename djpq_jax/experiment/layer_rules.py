"""What a config says of layers: their rules, and bits that they may have."""

import dataclasses
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


def bits_of(config) -> dict[str, Any]:
  """Bits that the search computes with, as `compress.compress` takes them."""
  if config.bit_choices:
    return {'choices': tuple(config.bit_choices)}
  # Uniform bits are whole ones in any case.
  uniform = config.method == 'uniform'
  most = compress.MAX_BITS if uniform else config.search.whole_bits_to
  return {'whole_to': most}


def dense_structure(config) -> compress.Structure:
  """Layers and channel groups of a config's model, from its shapes alone."""
  spec = config.model
  model = nnx.eval_shape(lambda: models.create(spec.name, **spec.kwargs))
  sample = jax.ShapeDtypeStruct((2, *model.input_shape), jnp.float32)
  graph = graph_lib.trace(compress.eval_view(model), sample)
  bits = bits_of(config)
  one_bit = bits.get('whole_to', 0) > 0 or 1 in bits.get('choices', ())
  return compress.resolve(graph, rules_of(config), one_bit=one_bit)
