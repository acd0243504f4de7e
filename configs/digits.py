"""DJPQ on handwritten digits: the demo.

Command: djpq train --config configs/digits.py --workdir runs/digits
Variants: configs/digits.py:w4a4 and the others of djpq_jax.config.
"""

from djpq_jax import config as config_lib


def get_config():
  config = config_lib.default()
  config.data.name = 'digits'
  config.model.name = 'digits_cnn'
  config.augment.shift = 1
  config.budget = 0.002
  # What the last layer rounds away no later layer can mend.
  config.rules = (
    {'pattern': 'linear', 'weight_bits': (6, 8), 'act_bits': (6, 8)},
  )

  config.float.epochs = 40.0
  config.float.smoothing = 0.1
  config.float.optimizer.learning_rate = 3e-3

  # This, the teacher and the rule were chosen by cross-validation within the
  # training images: benchmarks/crossvalidate.py.
  config.search.epochs = 20.0
  config.search.distill = 0.5
  config.search.temperature = 2.0
  config.search.optimizer.learning_rate = 1e-3
  config.search.optimizer.quantizer_rate = 2e-2
  config.search.optimizer.gate_rate = 5e-2
  config.search.optimizer.decay_gates = False

  config.finetune.epochs = 80.0
  config.finetune.distill = 0.5
  config.finetune.temperature = 2.0
  config.finetune.optimizer.learning_rate = 2e-3
  return config
