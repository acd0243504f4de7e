"""The quantizer against closed forms, an autodiff oracle and its own facts."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djpq_jax.ops import grid
from djpq_jax.ops import quantize

P = jax.sharding.PartitionSpec

EXPONENTS = [1.0, 'array', 0.25, 0.7, 1.3, 4.0]
FLOORS = [0.0, 0.05]
SIGNED = [True, False]


def _exponent(value):
  """The static one, an array of one, or an array."""
  if value == 1.0:
    return 1.0
  return jnp.float32(1.0 if value == 'array' else value)


def _random(shape=(64, 6), seed=0, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def _edges(step=0.25, clip=1.0):
  """Zero, ties, the clip and its neighbours, far outside."""
  clip = np.float32(clip)
  near = [np.nextafter(clip, 0, dtype='f'), np.nextafter(clip, 9, dtype='f')]
  x = [0, 1e-30, step / 2, 1.5 * step, step, clip, *near, 3 * clip, 1e30]
  return jnp.asarray([*x, *(-v for v in x)], jnp.float32)


def _oracle(
  x, step, clip, exponent, *, signed, floor, narrow_range=True, below=None
):
  """Plain jnp whose jax.grad is the documented derivative."""
  fixed = jax.lax.stop_gradient
  if not narrow_range:
    clip = jnp.where(x < 0, clip + step, clip)
  if below is not None:
    clip = jnp.where(x < 0, below * clip, clip)
  size = jnp.abs(x) if signed else jnp.maximum(x, 0.0)
  sign = jnp.sign(x) if signed else jnp.ones_like(x)
  above = size > clip
  inside = ~above if signed else ~above & (x >= 0)
  size = jnp.where(above, clip, fixed(size))
  alive = size > floor
  u = jnp.where(alive, jnp.where(alive, size - floor, 1.0) ** exponent, 0.0)
  level = u / step
  level = level + fixed(jnp.round(level) - level)
  return fixed(sign) * step * level + jnp.where(inside, x - fixed(x), 0.0)


def _values(x, step, clip, exponent, signed, floor):
  """The formula in float64 NumPy."""
  x, step, clip, exponent, floor = (
    np.asarray(v, 'd') for v in (x, step, clip, exponent, floor)
  )
  size = np.abs(x) if signed else np.maximum(x, 0)
  u = np.maximum(np.minimum(size, clip) - floor, 0) ** exponent
  u = np.where(size < floor, 0, u)
  return np.sign(x) * step * np.round(u / step)


def _full(x, *params):
  return [jnp.broadcast_to(jnp.float32(p), x.shape) for p in params]


def _all_grads(f, x, step, clip, exponent):
  """Gradients of a weighted sum; the exponent's too where it is an array."""
  argnums = (0, 1, 2) if isinstance(exponent, float) else (0, 1, 2, 3)
  weight = _random(x.shape, seed=1)

  def loss(*args):
    args = args if args[3:] else (*args, exponent)
    return jnp.sum(weight * f(*args).astype(jnp.float32))

  args = x, step, clip, exponent
  return jax.jit(jax.grad(loss, argnums))(*args[: len(argnums)])


@pytest.mark.parametrize('signed', SIGNED)
@pytest.mark.parametrize('floor', FLOORS)
@pytest.mark.parametrize('exponent', EXPONENTS)
def test_values_follow_the_formula(exponent, floor, signed):
  exponent = _exponent(exponent)
  x = _random()
  got = quantize.quantize(x, 0.0937, 1.3, exponent, signed=signed, floor=floor)
  want = _values(x, 0.0937, 1.3, exponent, signed, floor)
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_ties_round_to_even():
  x = jnp.asarray([0.125, 0.375, 0.625, -0.125, -0.375])
  got = quantize.quantize_to_int(x, 0.25, 1.0)
  np.testing.assert_array_equal(got, [0, 2, 2, 0, -2])


# Each (exponent, sides of zero) that there is.
GRIDS = [
  *((e, dict(signed=signed)) for e in EXPONENTS for signed in SIGNED),
  (1.0, dict(signed=True, narrow_range=False)),
  (1.0, dict(signed=True, below=0.25)),
  (1.0, dict(signed=True, below=0.0)),
]


@pytest.mark.parametrize(('exponent', 'sides'), GRIDS)
@pytest.mark.parametrize('floor', FLOORS)
@pytest.mark.parametrize('params', ['scalar', 'channel', 'element'])
def test_gradients_equal_the_oracle(params, floor, exponent, sides):
  exponent = _exponent(exponent)
  x = jnp.concatenate([_random((32, 5)), _edges().reshape(4, 5)])
  step, clip = jnp.float32(0.25), jnp.float32(1.0)
  if params == 'channel':
    step = jnp.asarray([0.25, 0.125, 0.5, 0.0625, 2.0])
    clip = jnp.asarray([1.0, 0.5, 2.0, 1.0, 1.5])
  if params == 'element':
    step, clip = _full(x, step, clip)
  if params != 'scalar' and not isinstance(exponent, float):
    exponent = jnp.broadcast_to(exponent, clip.shape)
  settings = dict(floor=floor, **sides)
  got = _all_grads(
    functools.partial(quantize.quantize, **settings), x, step, clip, exponent
  )
  want = _all_grads(
    lambda *args: _oracle(args[0], *_full(x, *args[1:]), **settings),
    x, step, clip, exponent,
  )  # fmt: skip
  for g, w in zip(got, want, strict=True):
    assert g.shape == w.shape
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('sign', [1.0, -1.0])
def test_gradients_in_closed_form(sign):
  step, clip, t, floor = 0.1, 1.0, 1.5, 0.2
  x = sign * jnp.asarray([0.1, 0.2, 0.77, 2.0])
  params = _full(x, step, clip, t)
  got = jax.grad(
    lambda *args: jnp.sum(quantize.quantize(*args, floor=floor)),
    (0, 1, 2, 3),
  )(x, *params)
  u = np.asarray([0.0, 0.0, 0.57**t, 0.8**t])
  log = np.log([1.0, 1.0, 0.57, 0.8])
  d_clip = np.asarray([0, 0, 0, t * 0.8 ** (t - 1)])
  np.testing.assert_array_equal(got[0], [1, 1, 1, 0])
  d_step = np.round(u / step) - u / step
  np.testing.assert_allclose(got[1], sign * d_step, atol=2e-6)
  np.testing.assert_allclose(got[2], sign * d_clip, rtol=1e-5)
  np.testing.assert_allclose(got[3], sign * u * log, rtol=1e-5, atol=1e-7)


SIDES = [
  dict(signed=True),
  dict(signed=False),
  dict(signed=True, narrow_range=False),
  dict(signed=True, below=0.5),
  dict(signed=True, below=0.0),
  dict(signed=True, mid_rise=True),
]


@pytest.mark.parametrize('sides', SIDES)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('per_channel', [False, True])
def test_lsq_is_the_quantizer_whose_step_follows_its_clip(
  per_channel, bits, dtype, sides
):
  clip = jnp.asarray([1.0, 0.5, 2.0, 1.0, 1.5]) if per_channel else 1.3
  x = jnp.concatenate([_random((32, 5)), _edges().reshape(4, 5)]).astype(dtype)
  weight = _random(x.shape, seed=1)

  def lsq(x, clip):
    return quantize.quantize_lsq(x, clip, bits, **sides)

  def general(x, clip):
    levels = 2.0 ** (bits - sides['signed']) - 1
    if 'below' in sides:
      levels = (2.0**bits - 1) / (1 + sides['below'])
    if 'mid_rise' in sides:
      levels = (2.0**bits - 1) / 2
    step = clip / levels
    return quantize.quantize(x, step, clip, **sides)

  np.testing.assert_array_equal(lsq(x, clip), general(x, clip))

  def gradients(f):
    loss = lambda *args: jnp.sum(weight * f(*args).astype(jnp.float32))
    return jax.grad(loss, (0, 1))(x, jnp.float32(clip))

  got, want = gradients(lsq), gradients(general)
  np.testing.assert_array_equal(got[0], want[0])
  np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-5)


def test_unsigned_drops_negative_values_and_their_gradient():
  x = jnp.asarray([-3.0, -0.3, 0.3])
  grad = jax.grad(
    lambda *args: jnp.sum(quantize.quantize(*args, signed=False)), (0, 1, 2)
  )(x, *_full(x, 0.25, 1.0))
  out = quantize.quantize(x, 0.25, 1.0, signed=False)
  np.testing.assert_array_equal(out, [0.0, 0.0, 0.25])
  np.testing.assert_array_equal(grad[0], [0.0, 0.0, 1.0])
  np.testing.assert_array_equal(grad[1][:2], [0.0, 0.0])
  np.testing.assert_array_equal(grad[2], [0.0, 0.0, 0.0])


@pytest.mark.parametrize('signed', SIGNED)
@pytest.mark.parametrize('floor', FLOORS)
def test_a_traced_exponent_of_one_gives_the_same(floor, signed):
  x = jnp.concatenate([_random((4096,)), _edges()])
  f = functools.partial(quantize.quantize, signed=signed, floor=floor)
  fast = f(x, 0.0937, 1.3)
  np.testing.assert_array_equal(fast, f(x, 0.0937, 1.3, jnp.float32(1.0)))
  fast = _all_grads(f, x, *_full(x, 0.0937, 1.3), 1.0)
  general = _all_grads(f, x, *_full(x, 0.0937, 1.3, 1.0))
  for a, b in zip(fast, general, strict=False):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_fast_kernel_has_no_powers():
  fast = jax.make_jaxpr(jax.grad(lambda x: quantize.quantize(x, 0.1, 1.0)))
  general = jax.make_jaxpr(
    jax.grad(lambda x: quantize.quantize(x, 0.1, 1.0, 1.5))
  )
  assert ' pow' not in str(fast(0.5))
  assert ' pow' in str(general(0.5))


@pytest.mark.parametrize('signed', SIGNED)
@pytest.mark.parametrize('floor', FLOORS)
@pytest.mark.parametrize('exponent', EXPONENTS)
def test_everything_is_finite(exponent, floor, signed):
  exponent = _exponent(exponent)
  f = functools.partial(quantize.quantize, signed=signed, floor=floor)
  x = jnp.concatenate([_edges(), jnp.asarray([jnp.inf, -jnp.inf])])
  x = jnp.stack([x, x, x, jnp.zeros_like(x)])
  step = jnp.asarray([[0.25], [0.9], [5.0], [0.25]])
  args = x, step, jnp.float32(1.0), exponent
  for a in (f(*args), *_all_grads(f, *args)):
    assert bool(jnp.all(jnp.isfinite(a)))


def test_infinity_saturates_and_nan_stays():
  x = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan])
  for exponent in (1.0, jnp.float32(1.0)):
    signed = quantize.quantize(x, 0.25, 1.0, exponent)
    np.testing.assert_array_equal(signed, [1.0, -1.0, np.nan])
    unsigned = quantize.quantize(x, 0.25, 1.0, exponent, signed=False)
    np.testing.assert_array_equal(unsigned, [1.0, 0.0, np.nan])


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
@pytest.mark.parametrize('exponent', [1.0, 1.3])
def test_low_precision_is_computed_in_float32(exponent, dtype):
  x = _random((4096,)).astype(dtype)
  step, clip, t = jnp.asarray([0.03, 1.7, exponent]).astype(dtype)
  t = 1.0 if exponent == 1.0 else t
  out = quantize.quantize(x, step, clip, t)
  wide = quantize.quantize(*(jnp.float32(v) for v in (x, step, clip)), t)
  assert out.dtype == x.dtype
  np.testing.assert_array_equal(out, wide.astype(dtype))

  def loss(*args):
    return jnp.sum(quantize.quantize(*args, t).astype(jnp.float32))

  got = jax.grad(loss, (0, 1, 2))(x, step, clip)
  want = jax.grad(loss, (0, 1, 2))(*map(jnp.float32, (x, step, clip)))
  assert [g.dtype for g in got] == [x.dtype] * 3
  for g, w in zip(got, want, strict=True):
    tolerance = 8 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.float32(g), w, rtol=tolerance)


def test_a_parameter_keeps_its_own_dtype_in_the_gradient():
  x = _random().astype(jnp.bfloat16)
  grads = jax.grad(
    lambda *args: jnp.sum(quantize.quantize(*args).astype(jnp.float32)),
    (0, 1, 2, 3),
  )(x, jnp.float32(0.1), jnp.bfloat16(1.0), jnp.float16(1.2))
  dtypes = [g.dtype for g in grads]
  assert dtypes == [jnp.bfloat16, jnp.float32, jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize('exponent', [1.0, 1.3])
def test_jit_equals_eager_bit_for_bit(exponent):
  x = _random((100_000,))
  step, clip = jnp.float32(0.0371), jnp.float32(1.4)
  # A grid through the data's own ties, where one last bit moves a level.
  x = jnp.concatenate([x, (jnp.arange(-40.0, 40.0) + 0.5) * step])
  f = functools.partial(quantize.quantize_to_int, exponent=exponent)
  eager = f(x, step, clip)
  np.testing.assert_array_equal(eager, jax.jit(f)(x, step, clip))
  closed = jax.jit(lambda x: f(x, step, clip))
  np.testing.assert_array_equal(eager, closed(x))


@pytest.mark.parametrize('exponent', [1.0, 1.3])
def test_vmap_over_data_and_parameters(exponent):
  x, step, clip = _random((4, 7)), jnp.asarray([0.1, 0.2, 0.3, 0.4]), 1.0
  f = functools.partial(quantize.quantize, exponent=exponent)
  got = jax.vmap(f, in_axes=(0, 0, None))(x, step, clip)
  np.testing.assert_array_equal(got, f(x, step[:, None], clip))

  def grad(x, step):
    return jax.grad(lambda s: jnp.sum(f(x, s, clip)))(step)

  got = jax.jit(jax.vmap(grad))(x, step)
  want = jnp.stack([grad(*row) for row in zip(x, step, strict=True)])
  np.testing.assert_allclose(got, want, rtol=1e-6)


def _mesh(axis_type=jax.sharding.AxisType.Auto):
  devices = jax.device_count()
  return jax.make_mesh((devices,), ('data',), axis_types=(axis_type,))


def _sharded_cases():
  clip = jnp.linspace(0.5, 2.0, 6, dtype=jnp.float32)
  return [(jnp.float32(1.0), 1.0), (clip, 1.0), (clip, jnp.float32(1.3))]


def _loss(x, step, clip, exponent):
  x_q = quantize.quantize(x, step, clip, exponent, floor=0.01)
  return jnp.sum(jnp.sin(x_q))


def _assert_trees_close(got, want):
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('check_vma', [True, False])
@pytest.mark.parametrize('case', range(3))
def test_shard_map_sums_parameter_gradients(case, check_vma):
  clip, exponent = _sharded_cases()[case]
  x, step = _random((8 * jax.device_count(), 6)), jnp.float32(0.1)

  @functools.partial(
    jax.shard_map, mesh=_mesh(), in_specs=(P('data'), P(), P()), out_specs=P(),
    check_vma=check_vma,
  )  # fmt: skip
  def loss(x, step, clip):
    return jax.lax.psum(_loss(x, step, clip, exponent), 'data')

  got = jax.jit(jax.grad(loss, (0, 1, 2)))(x, step, clip)
  want = jax.grad(_loss, (0, 1, 2))(x, step, clip, exponent)
  _assert_trees_close(got, want)


@pytest.mark.parametrize('check_vma', [True, False])
def test_shard_map_with_sharded_clip_and_whole_data(check_vma):
  x, clips = _random((5, 6)), jnp.linspace(0.5, 2.0, jax.device_count())

  @functools.partial(
    jax.shard_map, mesh=_mesh(), in_specs=(P(), P('data')), out_specs=P(),
    check_vma=check_vma,
  )  # fmt: skip
  def loss(x, clip):
    return jax.lax.psum(_loss(x, 0.1, clip[0], 1.0), 'data')

  got = jax.jit(jax.grad(loss, (0, 1)))(x, clips)
  want = jax.grad(lambda x, c: sum(_loss(x, 0.1, v, 1.0) for v in c), (0, 1))
  _assert_trees_close(got, want(x, clips))


@pytest.mark.parametrize('axis_type', ['Auto', 'Explicit'])
@pytest.mark.parametrize('case', range(3))
def test_global_arrays_under_jit(case, axis_type):
  clip, exponent = _sharded_cases()[case]
  x, step = _random((8 * jax.device_count(), 6)), jnp.float32(0.1)
  want = jax.grad(_loss, (0, 1, 2))(x, step, clip, exponent)
  mesh = _mesh(getattr(jax.sharding.AxisType, axis_type))
  with jax.set_mesh(mesh):
    x = jax.device_put(x, jax.NamedSharding(mesh, P('data')))
    grad = jax.jit(jax.grad(lambda *a: _loss(*a, exponent), (0, 1, 2)))
    got = grad(x, step, clip)
  _assert_trees_close(got, want)


@pytest.mark.parametrize('case', range(3))
def test_pmap_gives_each_device_its_gradient(case):
  clip, exponent = _sharded_cases()[case]
  n = jax.device_count()
  x, step = _random((n, 4, 6)), jnp.float32(0.1)

  def grads(x, step, clip):
    grad = jax.grad(_loss, (0, 1, 2))(x, step, clip, exponent)
    return grad[0], jax.lax.psum(grad[1], 'data'), jax.lax.psum(grad[2], 'data')

  got = jax.pmap(grads, axis_name='data', in_axes=(0, None, None))(
    x, step, clip
  )
  want = jax.grad(_loss, (0, 1, 2))(x.reshape(-1, 6), step, clip, exponent)
  np.testing.assert_allclose(got[0].reshape(-1, 6), want[0], rtol=1e-5)
  _assert_trees_close([g[0] for g in got[1:]], want[1:])


def test_integers_of_a_clip_that_is_a_large_whole_number():
  found = quantize.quantize_to_int(jnp.array([-7.0, 3.0]), 1, 10**10)
  np.testing.assert_array_equal(found, [-7, 3])


@pytest.mark.parametrize('signed', SIGNED)
@pytest.mark.parametrize('exponent', EXPONENTS)
def test_integers_times_step_are_the_output(exponent, signed):
  exponent = _exponent(exponent)
  x = jnp.concatenate([_random((4096,)), _edges()])
  args = x, jnp.float32(0.0371), jnp.float32(1.4), exponent
  kwargs = dict(signed=signed, floor=0.02)
  level = quantize.quantize_to_int(*args, **kwargs)
  assert level.dtype == jnp.int32
  want = args[1] * level.astype(jnp.float32)
  np.testing.assert_array_equal(quantize.quantize(*args, **kwargs), want)
  jitted = jax.jit(lambda *a: quantize.quantize(*a, exponent, **kwargs))
  np.testing.assert_array_equal(jitted(*args[:3]), want)


@pytest.mark.parametrize('signed', SIGNED)
@pytest.mark.parametrize('exponent', EXPONENTS)
@pytest.mark.parametrize('floor', FLOORS)
def test_levels_fit_their_bits(floor, exponent, signed):
  exponent = _exponent(exponent)
  kwargs = dict(signed=signed, floor=floor)
  clip = jnp.float32(1.37)
  bits = jnp.asarray([[2], [3], [4], [8]])
  step = grid.step_for_bits(bits, clip, exponent, **kwargs)
  x = jnp.broadcast_to(jnp.linspace(-2.0, 2.0, 20_001), (4, 20_001))
  level = np.asarray(
    quantize.quantize_to_int(x, step, clip, exponent, **kwargs)
  )
  top = 2 ** (np.ravel(bits) - signed) - 1
  np.testing.assert_array_equal(level.max(1), top)
  np.testing.assert_array_equal(level.min(1), -top if signed else 0)
  for row, b in zip(level, np.ravel(bits), strict=True):
    assert len(np.unique(row)) <= 2**b


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_grid_that_is_not_narrow_has_all_levels(bits, dtype):
  clip = jnp.float32(1.37)
  step = grid.step_for_bits(float(bits), clip)
  x = jnp.linspace(-4.0, 4.0, 20_001).astype(dtype)
  level = quantize.quantize_to_int(x, step, clip, narrow_range=False)
  want = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
  np.testing.assert_array_equal(np.unique(level), want)
  assert grid.bit_width(step, clip) == pytest.approx(bits)
  out = (step * level.astype(jnp.float32)).astype(dtype)
  for f in (
    lambda x: quantize.quantize(x, step, clip, narrow_range=False),
    lambda x: quantize.quantize_lsq(x, clip, bits, narrow_range=False),
  ):
    np.testing.assert_array_equal(f(x), out)
    np.testing.assert_array_equal(jax.jit(f)(x), out)
  # Above zero it is the symmetric grid.
  symmetric = quantize.quantize_to_int(x, step, clip)
  np.testing.assert_array_equal(
    symmetric, np.maximum(level, 1 - 2 ** (bits - 1))
  )


def test_a_grid_that_is_not_narrow_at_its_edges():
  """Infinity and NaN as on any grid, and nothing changes unsigned."""
  x = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan])
  got = quantize.quantize(x, 0.25, 1.0, narrow_range=False)
  np.testing.assert_array_equal(got, [1.0, -1.25, np.nan])
  got = quantize.quantize(x, 0.25, 1.0, signed=False, narrow_range=False)
  np.testing.assert_array_equal(got, [1.0, 0.0, np.nan])


@pytest.mark.parametrize(
  ('bits', 'count'),
  [(b, n) for b in (1, 2, 3, 4, 7) for n in (0, 1, 2, 5) if n < 2**b - 1],
)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_grid_with_any_number_of_levels_below_zero(bits, count, dtype):
  top = 2**bits - 1 - count
  sides: Any = dict(below=count / top)
  clip = jnp.float32(1.37)
  step = clip / grid.levels_above(bits, **sides)
  assert float(clip / step) == pytest.approx(top)
  other = grid.step_for_bits(float(bits), clip, **sides)
  assert float(other) == pytest.approx(float(step))
  assert grid.bit_width(step, clip, **sides) == pytest.approx(bits)
  x = jnp.linspace(-4.0, 4.0, 20_001).astype(dtype)
  level = quantize.quantize_to_int(x, step, clip, **sides)
  np.testing.assert_array_equal(np.unique(level), np.arange(-count, top + 1))
  out = (step * level.astype(jnp.float32)).astype(dtype)
  for f in (
    lambda x: quantize.quantize(x, step, clip, **sides),
    lambda x: quantize.quantize_lsq(x, clip, bits, **sides),
  ):
    np.testing.assert_array_equal(f(x), out)
    np.testing.assert_array_equal(jax.jit(f)(x), out)
  edges = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan])
  want = np.float32([top, -count, np.nan]) * np.float32(step)
  got = quantize.quantize(edges, step, clip, **sides)
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize('bits', [1, 2, 3, 4, 7])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_mid_rise_grid_has_all_levels_and_none_at_zero(bits, dtype):
  clip = jnp.float32(1.37)
  step = grid.step_for_bits(float(bits), clip, mid_rise=True)
  top = grid.levels_above(bits, mid_rise=True)
  assert float(clip / step) == pytest.approx(top) == (2**bits - 1) / 2
  bits_again = grid.bit_width(step, clip, mid_rise=True)
  assert bits_again == pytest.approx(bits)
  x = jnp.linspace(-4.0, 4.0, 20_001).astype(dtype)
  level = quantize.quantize_to_int(x, step, clip, mid_rise=True)
  want = np.arange(1 - 2**bits, 2**bits, 2)
  np.testing.assert_array_equal(np.unique(level), want)
  out = (step / 2 * level.astype(jnp.float32)).astype(dtype)
  for f in (
    lambda x: quantize.quantize(x, step, clip, mid_rise=True),
    lambda x: quantize.quantize_lsq(x, clip, bits, mid_rise=True),
  ):
    np.testing.assert_array_equal(f(x), out)
    np.testing.assert_array_equal(jax.jit(f)(x), out)
  # No value inside is further than half a step from its level.
  inside = np.abs(np.asarray(x, np.float32)) <= float(clip)
  error = np.abs(np.asarray(out - x, np.float32))[inside]
  rounding = 2.0**-8 * float(clip) if dtype == jnp.bfloat16 else 1e-6
  assert error.max() <= float(step) / 2 + rounding


def test_a_mid_rise_grid_at_its_edges():
  x = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan, 0.0, -0.0, -1e-30, 1e-30])
  got = quantize.quantize(x, 1.0, 1.5, mid_rise=True)
  want = [1.5, -1.5, np.nan, 0.5, 0.5, -0.5, 0.5]
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('fixed', [False, True])
def test_gradients_of_a_mid_rise_grid_equal_the_oracle(fixed):
  x, weight = 2 * _random((400,)), _random((400,), seed=1)
  step, clip = jnp.float32(0.6), jnp.float32(0.9)

  def oracle(x, step, clip):
    stop = jax.lax.stop_gradient
    u = jnp.clip(x, -clip, clip) / step
    level = jnp.where(x < 0, -1, 1) * (jnp.floor(jnp.abs(u)) + 0.5)
    return jnp.sum(weight * step * (u + stop(level - u)))

  def got(x, step, clip):
    found = quantize.quantize(x, step, clip, mid_rise=True)
    return jnp.sum(weight * found)

  if fixed:
    of_step = oracle
    oracle = lambda x, clip: of_step(x, clip / 1.5, clip)
    got = lambda x, clip: jnp.sum(
      weight * quantize.quantize_lsq(x, clip, 2, mid_rise=True)
    )
  args = (x, clip) if fixed else (x, step, clip)
  numbers = tuple(range(len(args)))
  for a, b in zip(
    jax.grad(got, argnums=numbers)(*args),
    jax.grad(oracle, argnums=numbers)(*args),
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('per_channel', [False, True])
def test_of_one_bit_all_values_and_the_level_learn(per_channel, dtype):
  """However far values are from their level."""
  clip = jnp.asarray([1.0, 0.5, 2.0, 1.0, 1.5]) if per_channel else 0.75
  clip = jnp.asarray(clip, jnp.float32)
  x = (4 * _random((64, 5))).astype(dtype)
  weight = _random(x.shape, seed=1)

  def got(x, clip):
    out = quantize.quantize_lsq(x, clip, 1, mid_rise=True)
    assert out.dtype == dtype
    return jnp.sum(weight * out.astype(jnp.float32))

  def oracle(x, clip):
    stop = jax.lax.stop_gradient
    x = x.astype(jnp.float32)
    level = jnp.broadcast_to(clip, x.shape) * jnp.where(x < 0, -1, 1)
    out = level + x - stop(x)
    return jnp.sum(weight * out.astype(dtype).astype(jnp.float32))

  for a, b in zip(
    jax.grad(got, (0, 1))(x, clip), jax.grad(oracle, (0, 1))(x, clip)
  ):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(
      np.float32(a), np.float32(b), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
  'settings',
  [
    dict(signed=False),
    dict(exponent=1.3),
    dict(exponent=jnp.float32(1.0)),
    dict(floor=0.1),
    dict(below=0.5),
  ],
)
def test_a_mid_rise_grid_has_no_other_ends(settings):
  with pytest.raises(ValueError, match='mid_rise is for signed grids without'):
    quantize.quantize(jnp.ones(3), 0.25, 1.0, mid_rise=True, **settings)


def test_nothing_is_below_zero_unsigned():
  x = _random()
  got = quantize.quantize(x, 0.25, 1.0, signed=False, below=0.5)
  want = quantize.quantize(x, 0.25, 1.0, signed=False)
  np.testing.assert_array_equal(got, want)
  for f in (grid.bit_width, grid.step_for_bits):
    got = f(0.5, 1.0, signed=False, below=0.5)
    assert float(got) == float(f(0.5, 1.0, signed=False))


@pytest.mark.parametrize('below', [-0.1, float('nan'), float('inf')])
def test_levels_below_zero_that_make_no_sense(below):
  with pytest.raises(ValueError, match='below must be a number from 0 on'):
    quantize.quantize(jnp.ones(3), 0.25, 1.0, below=below)


def test_levels_below_zero_with_an_exponent_are_refused():
  with pytest.raises(ValueError, match='below is for grids with exponent'):
    quantize.quantize(jnp.ones(3), 0.25, 1.0, 1.3, below=0.5)


@pytest.mark.parametrize('f', [quantize.quantize, quantize.quantize_to_int])
@pytest.mark.parametrize('exponent', [1.3, jnp.float32(1.0)])
def test_a_level_more_with_an_exponent_is_refused(exponent, f):
  with pytest.raises(ValueError, match='narrow_range=False is for grids'):
    f(jnp.ones(3), 0.25, 1.0, exponent, narrow_range=False)


@pytest.mark.parametrize('signed', SIGNED)
@pytest.mark.parametrize('exponent', EXPONENTS)
def test_ceil_of_the_bit_width_holds_the_integers(exponent, signed):
  exponent = _exponent(exponent)
  step = jnp.geomspace(0.003, 4.0, 999)
  level = quantize.quantize_to_int(
    jnp.full_like(step, 9.0), step, 1.37, exponent, signed=signed
  )
  bits = grid.bit_width(step, 1.37, exponent, signed=signed)
  assert np.all(np.asarray(level) <= 2 ** (np.ceil(bits) - signed) - 1)


@pytest.mark.parametrize('signed', SIGNED)
@pytest.mark.parametrize('exponent', EXPONENTS)
def test_monotone_in_x(exponent, signed):
  x = jnp.linspace(-2.0, 2.0, 10_001)
  out = quantize.quantize(
    x, 0.07, 1.4, _exponent(exponent), signed=signed, floor=0.03
  )
  assert bool(jnp.all(jnp.diff(out) >= 0))


@pytest.mark.parametrize('signed', SIGNED)
def test_idempotent_for_exponent_one(signed):
  f = functools.partial(quantize.quantize, signed=signed)
  # The clip is a whole number of steps: else the top level may lie above it.
  step, clip = 0.0371, 37 * 0.0371
  once = f(_random((10_000,)), step, clip)
  np.testing.assert_array_equal(f(once, step, clip), once)


def test_odd_in_x():
  x = _random((1000,))
  for exponent in (1.0, 0.7):
    out = quantize.quantize(x, 0.07, 1.4, exponent, floor=0.03)
    other = quantize.quantize(-x, 0.07, 1.4, exponent, floor=0.03)
    np.testing.assert_array_equal(out, -other)


@pytest.mark.parametrize('signed', SIGNED)
@pytest.mark.parametrize('floor', FLOORS)
@pytest.mark.parametrize('exponent', EXPONENTS)
def test_bit_width_inverts_step_for_bits(exponent, floor, signed):
  exponent = _exponent(exponent)
  kwargs = dict(signed=signed, floor=floor)
  bits = jnp.asarray([1.5, 2.0, 3.3, 4.0, 8.0, 12.0, 16.0])
  step = grid.step_for_bits(bits, 0.93, exponent, **kwargs)
  back = grid.bit_width(step, 0.93, exponent, **kwargs)
  assert back.dtype == jnp.float32
  np.testing.assert_allclose(back, bits, rtol=1e-6)


def test_bit_width_gradients_in_closed_form():
  d, q, t = 0.03, 1.7, 1.2
  r = q**t / d
  c = 1 / ((r + 1) * np.log(2))
  want = [-c * r / d, c * t * r / q, c * r * np.log(q)]
  got = jax.grad(grid.bit_width, (0, 1, 2))(d, q, t)
  np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize('f', [grid.bit_width, grid.step_for_bits])
@pytest.mark.parametrize('exponent', EXPONENTS)
def test_bits_and_steps_have_finite_gradients(exponent, f):
  exponent = _exponent(exponent)
  argnums = (0, 1) if isinstance(exponent, float) else (0, 1, 2)
  for first in (1.5, 4.0, 30.0):
    for clip in (1e-3, 1.0, 100.0):
      grads = jax.grad(f, argnums)(first, clip, exponent)
      assert all(np.isfinite(g) and g.dtype == jnp.float32 for g in grads)


def test_bit_width_broadcasts_and_takes_low_precision():
  step = jnp.asarray([0.1, 0.2], jnp.bfloat16)
  bits = grid.bit_width(step, jnp.ones((3, 1), jnp.bfloat16))
  assert bits.shape == (3, 2)
  assert bits.dtype == jnp.float32


def test_the_floor_gets_no_gradient():
  def value(floor):
    return quantize.quantize(0.7, 0.1, 1.0, 1.2, floor=floor)

  def bits(floor):
    return grid.bit_width(0.1, 1.0, 1.2, floor=floor)

  assert float(jax.grad(value)(0.1)) == 0.0
  assert float(jax.grad(bits)(0.1)) == 0.0


def test_what_does_not_broadcast_raises_with_shapes():
  x = jnp.ones((2, 3))
  with pytest.raises(ValueError, match=r'clip of shape \(2,\).*\(2, 3\)'):
    quantize.quantize(x, 0.1, jnp.ones(2))
  for f in (quantize.quantize, quantize.quantize_to_int):
    with pytest.raises(ValueError, match=r'step_size of shape \(2,\)'):
      f(x, jnp.ones(2), 1.0)
  with pytest.raises(ValueError, match=r'clip of shape \(2,\)'):
    quantize.quantize_lsq(x, jnp.ones(2), 4)
  with pytest.raises(ValueError, match='a signed grid of 1 bits has no level'):
    quantize.quantize_lsq(x, 1.0, 1)
  with pytest.raises(ValueError, match=r'step_size of shape \(4, 2, 3\)'):
    quantize.quantize_to_int(x, jnp.ones((4, 2, 3)), 1.0)
  with pytest.raises(ValueError, match=r'\(2,\), \(3,\)'):
    grid.bit_width(jnp.ones(2), jnp.ones(3))
  with pytest.raises(TypeError, match='int32'):
    quantize.quantize(jnp.arange(3), 0.1, 1.0)


def test_float64_is_computed_in_float64():
  with jax.enable_x64(True):
    x = jnp.asarray([0.3, 1.7], jnp.float64)
    step = jnp.float64(0.1)
    out = quantize.quantize(x, step, 1.0, jnp.float64(1.1))
    bits = grid.bit_width(step, 1.0)
    assert out.dtype == bits.dtype == jnp.float64
    np.testing.assert_allclose(out, _values(x, 0.1, 1.0, 1.1, True, 0.0))
