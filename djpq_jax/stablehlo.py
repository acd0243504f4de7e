"""Programs of `jax.export`: StableHLO that one file holds for all devices."""

from collections.abc import Callable
import contextlib
import re

import jax
import jax.export
import jax.numpy as jnp

PLATFORMS = ('cpu', 'cuda', 'tpu')
BATCH = 'batch'
# All that programs of ours may call; other custom calls can do anything.
CALLS = {'shape_assertion'}


class NotExportable(ValueError):
  """A function has no such program; the message says why."""


def images(input_shape, batch: int | None) -> jax.ShapeDtypeStruct:
  """A batch of float32 examples.

  Args:
    input_shape: of one example, as (8, 8, 1).
    batch: how many, or None for any number.
  """
  if batch is not None and batch < 1:
    raise ValueError(f'a batch has at least one example, not {batch}')
  first = batch or jax.export.symbolic_shape(BATCH)[0]
  return jax.ShapeDtypeStruct((first, *input_shape), jnp.float32)


def as_float32(outputs):
  """All floating outputs of a model in float32, the others as they are."""

  def converted(y):
    y = jnp.asarray(y)
    floating = jnp.issubdtype(y.dtype, jnp.floating)
    return y.astype(jnp.float32) if floating else y

  return jax.tree.map(converted, outputs)


def export(function: Callable, *args) -> jax.export.Exported:
  """Exports a function for CPU, GPU and TPU.

  Args:
    function: pure; what it closes over becomes constants.
    *args: shapes and dtypes of its arguments.

  Raises:
    NotExportable: it cannot be traced, or it calls what is outside of XLA.
  """
  try:
    with _no_locations():
      exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(
        *args
      )
  except Exception as error:  # of many kinds, from the model's own code
    first = (str(error).splitlines() or [''])[0]
    raise NotExportable(
      f'it cannot be traced: {type(error).__name__}: {first:.200}'
    ) from error
  check(exported)
  return exported


def check(exported: jax.export.Exported) -> None:
  """Refuses a program that calls anything but what XLA itself computes.

  Raises:
    NotExportable: names what it calls.
  """
  text = exported.mlir_module()
  calls = set(re.findall(r'custom_call @"?([^"(]+)', text))
  calls |= set(re.findall(r'call_target_name = "([^"]*)"', text))
  if calls - CALLS:
    raise NotExportable(f'it calls {", ".join(sorted(calls - CALLS))}')


@contextlib.contextmanager
def _no_locations():
  """Keeps the paths of source files out of what is traced anew."""
  name = 'jax_traceback_in_locations_limit'
  before = getattr(jax.config, name)
  jax.config.update(name, 0)
  try:
    yield
  finally:
    jax.config.update(name, before)
