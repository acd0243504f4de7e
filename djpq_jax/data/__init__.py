"""Images in memory or on disk, and batches: functions of (seed, step)."""

from djpq_jax.data.background import prefetch as prefetch
from djpq_jax.data.hold_out import hold_out as hold_out
from djpq_jax.data.pipeline import Augment as Augment
from djpq_jax.data.pipeline import check_augment as check_augment
from djpq_jax.data.pipeline import eval_batches as eval_batches
from djpq_jax.data.pipeline import steps_per_epoch as steps_per_epoch
from djpq_jax.data.pipeline import train_batch as train_batch
from djpq_jax.data.sources import arguments as arguments
from djpq_jax.data.sources import load as load
from djpq_jax.data.split import Pixels as Pixels
from djpq_jax.data.split import Split as Split
