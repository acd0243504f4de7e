"""Arrays in memory, and batches that are a function of (seed, step)."""

from djpq_jax.data.pipeline import Augment as Augment
from djpq_jax.data.pipeline import eval_batches as eval_batches
from djpq_jax.data.pipeline import prefetch as prefetch
from djpq_jax.data.pipeline import steps_per_epoch as steps_per_epoch
from djpq_jax.data.pipeline import train_batch as train_batch
from djpq_jax.data.sources import Split as Split
from djpq_jax.data.sources import load as load
