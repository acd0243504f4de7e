"""What goes into a layer: quantizers, gates, and the hook that holds them."""

from djpq_jax.layers.gates import OPEN_LOG_ALPHA as OPEN_LOG_ALPHA
from djpq_jax.layers.gates import Gate as Gate
from djpq_jax.layers.gates import GateMean as GateMean
from djpq_jax.layers.gates import GateParam as GateParam
from djpq_jax.layers.gates import sample as sample
from djpq_jax.layers.operands import GateIndex as GateIndex
from djpq_jax.layers.operands import GateValue as GateValue
from djpq_jax.layers.operands import IntegerParam as IntegerParam
from djpq_jax.layers.operands import Operands as Operands
from djpq_jax.layers.operands import tap as tap
from djpq_jax.layers.quantizer import EXPONENT_RANGE as EXPONENT_RANGE
from djpq_jax.layers.quantizer import Quantizer as Quantizer
from djpq_jax.layers.quantizer import QuantParam as QuantParam
from djpq_jax.layers.quantizer import bounded as bounded
