"""VGG7 / CIFAR-10, trained from scratch: the network of the literature's table.

Published: 93.23 % at 0.51 % of the float32 BOPs and 91.96 % at 0.29 %
(Bayesian Bits), 92.57 % at 0.41 % (GETA), 91.5 % at 1/210 (DJPQ).
Reproduced so far: nothing; no run has come to its end, and the settings are a
first guess.

Command: djpq train --config configs/vgg7_cifar10.py --set data.dir=DATA \
             --workdir runs/vgg7
Variants: configs/vgg7_cifar10.py:w4a4 and the others of djpq_jax.config.
"""

from djpq_jax import config as config_lib


def get_config():
  config = config_lib.default()
  config.data.name = 'cifar10'
  config.model.name = 'vgg7'
  config.batch_size = 128
  config.augment.shift = 4
  config.augment.flip = True
  config.budget = 0.003

  config.float.epochs = 100.0
  config.float.optimizer.learning_rate = 1e-3

  config.search.epochs = 30.0
  config.search.distill = 0.5
  config.search.temperature = 2.0
  config.search.optimizer.learning_rate = 1e-3
  config.search.optimizer.decay_gates = False

  config.finetune.epochs = 70.0
  config.finetune.distill = 0.5
  config.finetune.temperature = 2.0
  config.finetune.optimizer.learning_rate = 1e-3
  return config
