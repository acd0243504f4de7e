"""The training step, pure and jitted, the loop around it, and its checkpoints.

One step serves all phases: the float model, the search for channels and bits,
and the finetuning of what is left.  What differs stands in `Objective`.
"""

from djpq_jax.train.checkpoints import CheckpointError
from djpq_jax.train.checkpoints import Checkpoints
from djpq_jax.train.diagnosis import TrainingError
from djpq_jax.train.diagnosis import check_alive
from djpq_jax.train.loop import Interrupted
from djpq_jax.train.loop import fit
from djpq_jax.train.state import Objective
from djpq_jax.train.state import Program
from djpq_jax.train.state import TrainState
from djpq_jax.train.state import init
from djpq_jax.train.state import model_of
from djpq_jax.train.step import eval_step
from djpq_jax.train.step import jit_step
from djpq_jax.train.step import train_step

__all__ = [
  'CheckpointError',
  'Checkpoints',
  'Interrupted',
  'Objective',
  'Program',
  'TrainState',
  'TrainingError',
  'check_alive',
  'eval_step',
  'fit',
  'init',
  'jit_step',
  'model_of',
  'train_step',
]
