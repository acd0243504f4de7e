"""How channel identity goes through the primitives between MAC layers.

Each rule takes (units, equation, operands) and returns the outputs. A primitive
without a rule freezes the channels that go in: the tracer never guesses.
"""

from djpq_jax.graph import arrays
from djpq_jax.graph import layout

ELEMENTWISE = frozenset(
  """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e
  bessel_i1e cbrt ceil clamp clz complex conj convert_element_type copy
  copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor
  ge gt igamma igammac imag integer_pow is_finite le le_to lgamma log log1p
  log2 logistic lt lt_to max mesh_cast min mul mulhi name ne neg nextafter
  not one_minus_square or polynomial population_count pow pvary real
  reduce_precision rem reshard round rsqrt select_n sharding_constraint
  shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt
  square stop_gradient sub tan tanh xor""".split()
)
REDUCTIONS = frozenset(
  """argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod
  reduce_sum reduce_xor""".split()
)
CUMULATIVE = frozenset('cumlogsumexp cummax cummin cumprod cumsum'.split())
WINDOWS = frozenset(
  'reduce_window_max reduce_window_min reduce_window_sum'.split()
)
# Noise is equally distributed along each axis, so any extent will do.
RANDOM = frozenset(
  """random_bits random_clone random_fold_in random_seed random_split
  random_unwrap random_wrap rng_bit_generator rng_uniform
  threefry2x32""".split()
)


def elementwise(units, eqn, operands):
  """Operands of equal rank (or scalars) meet axis by axis."""
  shape = arrays.out_shape(eqn)
  full = [x for x in operands if len(x.shape) == len(shape)]
  axes = [
    units.join([x.axes[d] for x in full], [x.shape[d] for x in full], size)
    for d, size in enumerate(shape)
  ]
  tags = [x.tag for x in operands if x.tag is not None]
  return arrays.single(eqn, operands, axes, tags[0] if len(tags) == 1 else None)


def same(units, eqn, operands):
  """Outputs are the operands, one to one."""
  del units, eqn
  return list(operands)


def bitcast(units, eqn, operands):
  """Elementwise, unless the new dtype has another width."""
  same_shape = operands[0].shape == arrays.out_shape(eqn)
  return (elementwise if same_shape else opaque)(units, eqn, operands)


def reduction(units, eqn, operands):
  """A reduction over channels (mean, softmax, norm) mixes them all."""
  x, gone = operands[0], {int(d) for d in eqn.params['axes']}
  reason = (
    'normalised over the channel axis, or reduced over it '
    f'({eqn.primitive.name})'
  )
  for d in gone:
    units.freeze(x.axes[d], reason)
  kept = [d for d in range(len(x.shape)) if d not in gone]
  return arrays.single(
    eqn, operands, [x.axes[d] for d in kept], arrays.moved(x.tag, kept)
  )


def cumulative(units, eqn, operands):
  """A running sum over channels depends on their order and number."""
  x = operands[0]
  units.freeze(x.axes[eqn.params['axis']], 'accumulated over the channel axis')
  return arrays.single(eqn, operands, x.axes)


def window(units, eqn, operands):
  """Pooling keeps the axes that the window does not touch."""
  x, p = operands[0], eqn.params
  axes = []
  for d, size in enumerate(arrays.out_shape(eqn)):
    touched = (
      p['window_dimensions'][d] != 1
      or p['window_strides'][d] != 1
      or tuple(p['padding'][d]) != (0, 0)
      or p.get('base_dilation', (1,) * (d + 1))[d] != 1
    )
    if touched:
      units.freeze(x.axes[d], 'pooled over the channel axis')
    axes.append(units.opaque(size, layout.POSITION) if touched else x.axes[d])
  return arrays.single(eqn, operands, axes)


def reduce_window(units, eqn, operands):
  """The general form: one array and the initial value of its reduction."""
  rule = window if len(operands) == 2 else opaque
  return rule(units, eqn, operands)


def sort(units, eqn, operands):
  """Sorting mixes the channels along its axis, and follows its keys."""
  axis = eqn.params['dimension']
  for x in operands:
    units.freeze(x.axes[axis], 'sorted')
  keyed = elementwise(units, eqn, operands)[0]
  return [keyed] * len(operands)


def iota(units, eqn, operands):
  """A range of numbers, as long as its axis is now."""
  del operands
  shape, d = arrays.out_shape(eqn), eqn.params['dimension']
  axes = [None] * len(shape)
  axes[d] = units.opaque(shape[d], 'combined with a fixed range of numbers')
  return [arrays.Traced(shape, tuple(axes))]


def noise(units, eqn, operands):
  """Noise, and memory that is still empty, has no identity."""
  del units, operands
  return [arrays.uniform(v.aval.shape) for v in eqn.outvars]


def opaque(units, eqn, operands, reason=None):
  """What is not understood freezes what goes in, and hides what comes out."""
  reason = reason or (
    f'passes through "{eqn.primitive.name}", which the tracer does not follow'
  )
  for x in operands:
    for label in x.axes:
      units.freeze(label, reason)
  family = arrays.heritage(operands)
  return [
    arrays.Traced(
      arrays.out_shape(eqn, i),
      tuple(units.opaque(n, reason) for n in arrays.out_shape(eqn, i)),
      **family,
    )
    for i in range(len(eqn.outvars))
  ]


RULES = {
  **dict.fromkeys(ELEMENTWISE, elementwise),
  **dict.fromkeys(REDUCTIONS, reduction),
  **dict.fromkeys(CUMULATIVE, cumulative),
  **dict.fromkeys(WINDOWS, window),
  **dict.fromkeys(RANDOM, noise),
  'bitcast_convert_type': bitcast,
  'broadcast_in_dim': layout.broadcast_in_dim,
  'concatenate': layout.concatenate,
  'device_put': same,
  'dynamic_slice': layout.dynamic_slice,
  'dynamic_update_slice': layout.dynamic_update_slice,
  'empty': noise,
  'empty2': noise,
  'gather': layout.gather,
  'iota': iota,
  'optimization_barrier': same,
  'pad': layout.pad,
  'reduce_window': reduce_window,
  'reshape': layout.reshape,
  'rev': layout.rev,
  'slice': layout.slice_,
  'sort': sort,
  'split': layout.split,
  'squeeze': layout.squeeze,
  'stack': layout.stack,
  'tile': layout.tile,
  'transpose': layout.transpose,
  'unstack': layout.unstack,
}
