"""Joint structured pruning and mixed-precision quantization of Flax models.

The names below load what they need when they are first used, so that the
primitives (`quantize`, `sample_gate`, ...) come without flax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from djpq_jax.compress import Compressed as Compressed
  from djpq_jax.compress import Plan as Plan
  from djpq_jax.compress import Rule as Rule
  from djpq_jax.compress import fold_gates as fold_gates
  from djpq_jax.compress import freeze as freeze
  from djpq_jax.compress import usage as usage
  from djpq_jax.cost import LayerUse as LayerUse
  from djpq_jax.cost import bops as bops
  from djpq_jax.cost import float_bops as float_bops
  from djpq_jax.cost import macs as macs
  from djpq_jax.cost import relative_bops as relative_bops
  from djpq_jax.cost import size_bits as size_bits
  from djpq_jax.graph import slice_channels as slice_channels
  from djpq_jax.graph import trace as trace
  from djpq_jax.harden import HardenedModel as HardenedModel
  from djpq_jax.ops.gate import gate_kl as gate_kl
  from djpq_jax.ops.gate import is_open as is_open
  from djpq_jax.ops.gate import keep_prob as keep_prob
  from djpq_jax.ops.gate import sample_gate as sample_gate
  from djpq_jax.ops.grid import bit_width as bit_width
  from djpq_jax.ops.grid import step_for_bits as step_for_bits
  from djpq_jax.ops.quantize import quantize as quantize
  from djpq_jax.ops.quantize import quantize_to_int as quantize_to_int

__version__ = '0.1.0'

_HOMES = {
  'compress': 'Compressed Plan Rule fold_gates freeze usage',
  'cost': 'LayerUse bops float_bops macs relative_bops size_bits',
  'graph': 'slice_channels trace',
  'harden': 'HardenedModel',
  'ops.gate': 'gate_kl is_open keep_prob sample_gate',
  'ops.grid': 'bit_width step_for_bits',
  'ops.quantize': 'quantize quantize_to_int',
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = ['__version__', *sorted(_HOME)]


def __getattr__(name: str) -> Any:
  if name not in _HOME:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module = importlib.import_module(f'{__name__}.{_HOME[name]}')
  return getattr(module, name)


def __dir__() -> list[str]:
  return __all__
