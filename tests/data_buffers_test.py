"""Memory is used again, and never while anyone can still see it."""

import gc

import jax
import numpy as np
import pytest

from djpq_jax.data import buffers


@pytest.fixture(autouse=True)
def nothing_free(monkeypatch):
  monkeypatch.setattr(buffers, '_free', {})


def place(array):
  return array.__array_interface__['data'][0]


def test_memory_is_used_again():
  array = buffers.empty((3, 5))
  assert (array.shape, array.dtype) == ((3, 5), np.float32)
  assert array.flags.writeable
  assert array.flags.c_contiguous
  before = place(array)
  del array
  assert place(buffers.empty((5, 3))) == before


@pytest.mark.parametrize(
  'view',
  [
    lambda x: x[1],
    lambda x: x[1:].T,
    lambda x: x.reshape(-1)[3:4],
    lambda x: x.view(np.uint8)[0],
    lambda x: memoryview(x),
    lambda x: np.asarray(x)[::2],
    lambda x: np.broadcast_to(x[0], (4, 5)),
  ],
)
def test_never_while_there_is_a_view(view):
  array = buffers.empty((3, 5))
  before, kept = place(array), view(array)
  del array
  assert place(buffers.empty((3, 5))) != before
  del kept
  gc.collect()
  assert before in [place(a) for a in [buffers.empty((3, 5)) for _ in 'ab']]


def test_what_jax_made_of_it_does_not_change():
  """On a CPU it may use the memory itself, instead of a copy."""
  seen = []
  for i in range(6):
    array = buffers.empty((1000, 64))
    array[:] = i
    seen.append(jax.device_put(array))
    del array
  for i, array in enumerate(seen):
    np.testing.assert_array_equal(array, np.full((1000, 64), i, np.float32))


def test_little_is_kept():
  many = [buffers.empty((7,)) for _ in range(3 * buffers.KEPT)]
  assert len({place(a) for a in many}) == len(many)
  many.clear()
  assert len(buffers._free[28]) == buffers.KEPT


def test_nothing_has_no_memory():
  assert buffers.empty((0, 3)).shape == (0, 3)
