"""Kernels to begin with are those of JAX's initializers."""

from unittest import mock

import jax
import numpy as np
import pytest

from djpq_jax import models
from djpq_jax.models import kernels

# The last is longer than the longest vector that shapes share.
SHAPES = [(3, 3, 3, 16), (1, 1, 7, 5), (9, 4), (1, 1), (1100, 1000)]


@pytest.mark.parametrize('name', ['he_normal', 'lecun_normal'])
@pytest.mark.parametrize('shape', SHAPES)
def test_values_are_those_of_jax(name, shape):
  key = jax.random.key(3)
  got = getattr(kernels, name)(key, shape)
  want = getattr(jax.nn.initializers, name)()(key, shape)
  # The last bits are those of the vector instructions that compilers choose.
  np.testing.assert_array_max_ulp(got, want, 4)
  assert (got.dtype, got.shape) == (want.dtype, want.shape)


def test_values_of_a_given_deviation_are_those_of_jax():
  key, shape = jax.random.key(4), (1, 5, 6)
  got = kernels.truncated_normal(key, shape, deviation=0.02)
  want = jax.nn.initializers.truncated_normal(0.02)(key, shape)
  np.testing.assert_array_max_ulp(got, want, 4)


def test_they_can_be_traced():
  key, shape = jax.random.key(5), (3, 3, 2, 4)
  got = jax.jit(kernels.he_normal, static_argnums=1)(key, shape)
  np.testing.assert_allclose(got, kernels.he_normal(key, shape), rtol=1e-6)
  shapes = jax.eval_shape(lambda: kernels.he_normal(key, shape))
  assert shapes.shape == shape


def test_shapes_share_the_lengths_of_their_vectors():
  """Else a generator would be compiled for each shape of a model."""
  draw = jax.random.truncated_normal
  with mock.patch.object(jax.random, 'truncated_normal', wraps=draw) as drawn:
    models.create('resnet20')
  lengths = [call.args[3] for call in drawn.call_args_list]
  assert len(lengths) == 20  # one for each layer
  assert set(lengths) == {(4096,), (16384,), (65536,)}
