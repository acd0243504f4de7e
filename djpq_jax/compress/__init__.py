"""Rules, and the surgery that turns a model into a compressible one.

`compress` attaches gates and quantizers to a copy of any nnx model, `usage`
says what each layer costs now, and `freeze` carries a `Plan` out: channels are
cut, bits are fixed, and what is left is a smaller model to finetune.
"""

from djpq_jax.compress.accounting import FLOAT_BITS as FLOAT_BITS
from djpq_jax.compress.accounting import PlanCosts as PlanCosts
from djpq_jax.compress.accounting import planned_usage as planned_usage
from djpq_jax.compress.accounting import usage as usage
from djpq_jax.compress.attach import assemble as assemble
from djpq_jax.compress.attach import attach_operands as attach_operands
from djpq_jax.compress.attach import compress as compress
from djpq_jax.compress.frozen import fold_gates as fold_gates
from djpq_jax.compress.frozen import freeze as freeze
from djpq_jax.compress.quantizers import calibrate as calibrate
from djpq_jax.compress.quantizers import regrid as regrid
from djpq_jax.compress.quantizers import restrict as restrict
from djpq_jax.compress.structure import MAX_BITS as MAX_BITS
from djpq_jax.compress.structure import WHOLE_TO as WHOLE_TO
from djpq_jax.compress.structure import GroupSettings as GroupSettings
from djpq_jax.compress.structure import LayerSettings as LayerSettings
from djpq_jax.compress.structure import Plan as Plan
from djpq_jax.compress.structure import Rule as Rule
from djpq_jax.compress.structure import Structure as Structure
from djpq_jax.compress.structure import open_masks as open_masks
from djpq_jax.compress.structure import resolve as resolve
from djpq_jax.compress.wrapped import Compressed as Compressed
from djpq_jax.compress.wrapped import Hook as Hook
from djpq_jax.compress.wrapped import check as check
from djpq_jax.compress.wrapped import eval_view as eval_view
from djpq_jax.compress.wrapped import hooks as hooks
from djpq_jax.compress.wrapped import inputs_of as inputs_of
from djpq_jax.compress.wrapped import layer_modules as layer_modules
from djpq_jax.compress.wrapped import train_view as train_view
