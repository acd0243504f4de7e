"""Counts what a hardened model costs, from what it holds."""

import dataclasses
from typing import Any

from djpq_jax import compress
from djpq_jax import graph as graph_lib
from djpq_jax.harden import parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport:
  """What one layer of a hardened model is and costs."""

  name: str
  kind: str
  in_size: int  # channels of the dense layer's input
  out_size: int
  kept_in: int
  kept_out: int
  weight_bits: int  # 32 for a layer left in float32
  act_bits: int
  macs: int  # multiply-accumulates per example
  float_macs: int  # of the dense layer
  bops: int  # bit operations per example
  weights: int  # kernel elements left


def count(model: parts.HardenedModel, *args) -> list[LayerReport]:
  """Counts a hardened model from what it holds, not from how it was made.

  MACs come from tracing the sliced model, bits from its integers and grids.

  Args:
    model: a hardened model.
    *args: a batch of inputs, or of `jax.ShapeDtypeStruct`.

  Returns:
    One report per layer in execution order; products outside of layers, as in
    attention, are rows of kind 'product' at 32 x 32 bits.

  Raises:
    TypeError: the model is not hardened.
  """
  compress.check(model, 'count', hardened=True)
  dense = model.structure.graph
  traced = graph_lib.trace(model, *args)
  bits = {hook.path: _bits(hook) for hook in compress.hooks(model)}
  rows = []
  for name, was in dense.layers.items():
    now = traced.layers[f'model/{name}']
    weight_bits, act_bits = bits[name]
    rows.append(
      LayerReport(
        name=name,
        kind=was.kind,
        in_size=len(was.in_group),
        out_size=len(was.out_group),
        kept_in=len(now.in_group),
        kept_out=len(now.out_group),
        weight_bits=weight_bits,
        act_bits=act_bits,
        macs=now.macs,
        float_macs=was.macs,
        bops=now.macs * weight_bits * act_bits,
        weights=now.weights,
      )
    )
  # A loop over examples has as many products as there are examples.
  same = len(traced.products) == len(dense.products)
  pairs = zip(traced.products, dense.products if same else traced.products)
  return rows + [_product(now, was.macs) for now, was in pairs]


def _bits(hook: compress.Hook) -> tuple[int, int]:
  """Bits of a layer's kernel and of its input."""
  _, layer, operands = hook
  if not isinstance(operands.weight, parts.Dequantizer):
    return compress.FLOAT_BITS, compress.FLOAT_BITS
  weight_bits = parts.kernel_bits(layer.kernel[...], odd=operands.weight.odd)
  return weight_bits, operands.act.bits()


def check_rows(model: parts.HardenedModel, rows: list[LayerReport]) -> None:
  """Refuses rows that are no count of a model.

  Raises:
    ValueError: says in which layer they differ.
  """
  counted = {row.name: (row.weight_bits, row.act_bits) for row in rows}
  for hook in compress.hooks(model):
    bits = _bits(hook)
    if counted.get(hook.path) != bits:
      raise ValueError(
        f'the rows are no count of this model, whose layer {hook.path} has '
        f'{bits[0]} x {bits[1]} bits; give what harden.count says of it'
      )


def _product(product: graph_lib.Product, float_macs: int) -> LayerReport:
  bits = compress.FLOAT_BITS
  return LayerReport(
    name=product.name,
    kind='product',
    in_size=0,
    out_size=0,
    kept_in=0,
    kept_out=0,
    weight_bits=bits,
    act_bits=bits,
    macs=product.macs,
    float_macs=float_macs,
    bops=product.macs * bits * bits,
    weights=0,
  )


def totals(
  model: parts.HardenedModel, rows: list[LayerReport]
) -> dict[str, Any]:
  """Sums of a count: MACs, BOPs, their dense float32 values, and ratios.

  `relative_weights` is that of the bits of all kernels.
  """
  graph = model.structure.graph
  float_macs = graph.float_macs
  float_bits = compress.FLOAT_BITS * sum(
    layer.weights for layer in graph.layers.values()
  )
  float_bops = compress.FLOAT_BITS**2 * float_macs
  bops = sum(row.bops for row in rows)
  return {
    'macs': sum(row.macs for row in rows),
    'float_macs': float_macs,
    'bops': bops,
    'float_bops': float_bops,
    'relative_bops': bops / float_bops,
    'relative_macs': sum(row.macs for row in rows) / float_macs,
    'relative_weights': sum(r.weights * r.weight_bits for r in rows)
    / float_bits,
  }
