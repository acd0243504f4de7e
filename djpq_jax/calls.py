"""What JAX programs call: the inner programs of their equations."""

from typing import Any

from jax.extend import core as jex_core

# Each runs an inner program once, on its own operands.
PRIMITIVES = frozenset(
  """call checkpoint closed_call composite core_call custom_jvp_call custom_lin
  custom_vjp_call custom_vjp_call_jaxpr eval_jaxpr jit pjit remat remat2
  xla_call""".split()
)


def inner(eqn) -> tuple[Any, tuple] | None:
  """(jaxpr, its constants) of an equation that is a call; else None."""
  if eqn.primitive.name not in PRIMITIVES and not eqn.primitive.call_primitive:
    return None
  jaxpr, *_ = jex_core.jaxprs_in_params(eqn.params)
  for value in eqn.params.values():
    if getattr(value, 'jaxpr', None) is jaxpr:
      return jaxpr, tuple(value.consts)
  return jaxpr, ()
