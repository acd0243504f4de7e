"""What goes into a layer: quantizers, gates, and the hook that holds them."""

from djpq_jax.layers.gates import OPEN_LOG_ALPHA
from djpq_jax.layers.gates import Gate
from djpq_jax.layers.gates import GateMean
from djpq_jax.layers.gates import GateParam
from djpq_jax.layers.gates import sample
from djpq_jax.layers.operands import INPUTS
from djpq_jax.layers.operands import KERNELS
from djpq_jax.layers.operands import GateIndex
from djpq_jax.layers.operands import GateValue
from djpq_jax.layers.operands import IntegerParam
from djpq_jax.layers.operands import Operands
from djpq_jax.layers.quantizer import EXPONENT_RANGE
from djpq_jax.layers.quantizer import MID_RISE_TO
from djpq_jax.layers.quantizer import Quantizer
from djpq_jax.layers.quantizer import QuantParam
from djpq_jax.layers.quantizer import bounded

__all__ = [
  'EXPONENT_RANGE',
  'INPUTS',
  'KERNELS',
  'MID_RISE_TO',
  'OPEN_LOG_ALPHA',
  'Gate',
  'GateIndex',
  'GateMean',
  'GateParam',
  'GateValue',
  'IntegerParam',
  'Operands',
  'QuantParam',
  'Quantizer',
  'bounded',
  'sample',
]
