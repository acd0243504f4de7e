"""From a finetuned model to the one that is deployed: integers and scales.

A hardened model is called like the original.  Channels are gone, each kernel
is an integer array with a step, each input has a fixed grid; gates that are
left are per-channel scales, and batch norm is a factor and a summand for each
channel.  Called as it is, it multiplies the steps in first and computes in
float32; `integer.lower` makes it run on the integers themselves, with exact
sums.
"""

from djpq_jax.harden.counting import LayerReport as LayerReport
from djpq_jax.harden.counting import check_rows as check_rows
from djpq_jax.harden.counting import count as count
from djpq_jax.harden.counting import totals as totals
from djpq_jax.harden.hardening import harden as harden
from djpq_jax.harden.parts import Constant as Constant
from djpq_jax.harden.parts import Dequantizer as Dequantizer
from djpq_jax.harden.parts import FixedQuantizer as FixedQuantizer
from djpq_jax.harden.parts import HardenedModel as HardenedModel
from djpq_jax.harden.parts import Scales as Scales
from djpq_jax.harden.parts import bits_between as bits_between
from djpq_jax.harden.parts import kernel_bits as kernel_bits
