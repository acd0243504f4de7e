"""How each JAX primitive is said in ONNX."""

from collections.abc import Callable

import numpy as np

from djpq_jax.export import elementwise
from djpq_jax.export import moving
from djpq_jax.export import products
from djpq_jax.export import translate

Constant = translate.Constant
Kernel = translate.Kernel

_REDUCTIONS = {
  'reduce_sum': 'ReduceSum',
  'reduce_max': 'ReduceMax',
  'reduce_min': 'ReduceMin',
  'reduce_prod': 'ReduceProd',
}


def _reduce(op: str):
  def rule(t, eqn, values):
    axes = eqn.params['axes']
    x = t.full(values[0], eqn.invars[0].aval.shape, values[0].order)
    kept = [axis for axis in x.order if axis not in axes]
    at = sorted(x.order.index(axis) for axis in axes)
    dims = eqn.outvars[0].aval.shape
    order = [sorted(kept).index(axis) for axis in kept]
    if op != 'ReduceSum':
      return t.add(op, [x], dims, order, axes=at, keepdims=0)
    name = t.graph.constant(np.array(at, np.int64))
    return t.add(op, [x, name], dims, order, keepdims=0)

  return rule


def _argmax(t, eqn, values):
  (axis,) = eqn.params['axes']
  x = t.full(values[0], eqn.invars[0].aval.shape)
  dims = eqn.outvars[0].aval.shape
  found = t.add('ArgMax', [x], dims, axis=axis, keepdims=0)
  to = elementwise.cast_type(t, eqn.params['index_dtype'])
  return t.add('Cast', [found], dims, to=to)


# They take a kernel as the integers that it is.
_KERNELS = {'convert_element_type', 'reshape', 'squeeze', 'transpose'}
_KERNELS |= {'conv_general_dilated', 'dot_general', 'djpq_kernel'}


def _dense(name: str, rule):
  """Whatever else a kernel meets takes its floats."""

  def checked(t, eqn, values):
    kernels = [v for v in values if isinstance(v, Kernel)]
    if kernels and name not in _KERNELS:
      for kernel in kernels:
        why = f'its kernel goes through {name!r}'
        t.float_layers.setdefault(kernel.layer, why)
      values = [
        Constant(v.array) if isinstance(v, Kernel) else v for v in values
      ]
      if all(isinstance(v, Constant) for v in values):
        return t.evaluate(eqn, values)
    return rule(t, eqn, values)

  return checked


_ALL: dict[str, Callable] = {
  **elementwise.RULES,
  **moving.RULES,
  **{name: _reduce(op) for name, op in _REDUCTIONS.items()},
  'argmax': _argmax,
  'conv_general_dilated': products.convolution,
  'dot_general': products.dot,
  'reduce_window_max': products.max_pool,
  'reduce_window_sum': products.sum_pool,
  'djpq_input': products.layer_input,
  'djpq_kernel': products.layer_kernel,
}
RULES = {name: _dense(name, rule) for name, rule in _ALL.items()}
