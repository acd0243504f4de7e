"""Places of an array are taken where the array is, with or without NumPy."""

import jax
from jax import sharding
import jax.numpy as jnp
import numpy as np
import pytest

from djpq_jax import places

ROWS = np.array([2, 0])


def _mesh():
  return sharding.Mesh(jax.devices()[:2], 'rows')


def _placed(where: str):
  x = jnp.arange(12.0).reshape(4, 3)
  if where == 'anywhere':
    return x
  if where == 'second device':
    return jax.device_put(x, jax.devices()[1])
  axis = 'rows' if where == 'in parts' else None
  spec = sharding.PartitionSpec(axis)
  return jax.device_put(x, sharding.NamedSharding(_mesh(), spec))


@pytest.mark.parametrize('where', ['anywhere', 'second device', 'on both'])
def test_an_array_stays_where_it_is(where):
  x = _placed(where)
  found = places.pick(lambda v: v[ROWS], x)
  np.testing.assert_array_equal(found, np.asarray(x)[ROWS])
  assert found.sharding == x.sharding
  assert found.committed == x.committed


def test_an_array_in_parts_is_left_to_jax():
  seen = []

  def rows(v):
    seen.append(v)
    return v[ROWS]

  x = _placed('in parts')
  np.testing.assert_array_equal(places.pick(rows, x), np.asarray(x)[ROWS])
  assert isinstance(seen[0], jax.Array)


def test_one_that_is_traced_too():
  found = jax.jit(lambda x: places.pick(lambda v: v[ROWS], x))(jnp.arange(4.0))
  np.testing.assert_array_equal(found, [2, 0])


def test_the_result_keeps_nothing_of_the_array():
  x = jnp.arange(4096.0)
  found = places.pick(lambda v: v[:2].reshape(2, 1), x)
  np.testing.assert_array_equal(found, [[0], [1]])
  assert found.unsafe_buffer_pointer() != x.unsafe_buffer_pointer()
