"""Changes of the method that no config has, each alone: crossvalidate.py."""

import contextlib
from unittest import mock

import jax
import jax.numpy as jnp

from djpq_jax import layers
from djpq_jax.ops import quantize


def _steps_alone(self, *, restricted: bool = True):
  """Bits whose gradient reaches the step alone."""
  if self.fixed_bits is not None:
    return self.fixed_bits
  step, clip, exponent = self.grid(restricted=restricted)
  clip = jax.lax.stop_gradient(clip)
  return jnp.max(quantize.bit_width(step, clip, exponent, signed=self.signed))


def _clips_alone(self, *, restricted: bool = True):
  """Bits whose gradient reaches the clip (and the exponent) alone."""
  if self.fixed_bits is not None:
    return self.fixed_bits
  step, clip, exponent = self.grid(restricted=restricted)
  step = jax.lax.stop_gradient(step)
  return jnp.max(quantize.bit_width(step, clip, exponent, signed=self.signed))


def _means(found, key, batch: int):
  """Gates without noise; the cost still closes them."""
  del key, batch
  return [gate.mean() for gate in found]


PATCHES = {
  'BOPs move steps alone': (layers.Quantizer, 'bits', _steps_alone),
  'BOPs move clips alone': (layers.Quantizer, 'bits', _clips_alone),
  'gates without noise': (layers, 'sample', _means),
}


def patched(name: str):
  """A context in which the method is changed as `name` says, if it is known."""
  if name not in PATCHES:
    return contextlib.nullcontext()
  return mock.patch.object(*PATCHES[name])
