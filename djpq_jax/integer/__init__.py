"""Runs a hardened model on its integers, exactly.

Three executions compute the same int32 accumulator for every output of every
layer: 'simulated' and 'float' carry integers in float32, 'int8' multiplies
int8 by int8.  docs/integer.md says how, and what stays float.
"""

from djpq_jax.integer.lowering import EXECUTIONS as EXECUTIONS
from djpq_jax.integer.lowering import accumulators as accumulators
from djpq_jax.integer.lowering import left_float as left_float
from djpq_jax.integer.lowering import lower as lower
from djpq_jax.integer.lowering import plans as plans
from djpq_jax.integer.planning import Plan as Plan
