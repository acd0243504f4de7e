"""MobileNetV2 / ImageNet, from a trained float model (torchvision: 71.88 %).

Published: DJPQ 69.3 % at 1/43 of the float32 BOPs; GMPQ-TE 71.2 % at 1/46,
HMQ 70.9 % at 1/64.4, DQ 69.7 % at 1/68.7.
Reproduced so far: nothing; no run has come to its end, and the settings are a
first guess.

Command: djpq train --config configs/mobilenet_v2_imagenet.py \
             --set data.dir=DATA --set model.weights=mobilenet_v2-b0353104.pth \
             --workdir runs/mobilenet_v2
Variants: configs/mobilenet_v2_imagenet.py:w4a4 and the others of
djpq_jax.config.
"""

from djpq_jax import config as config_lib


def get_config():
  config = config_lib.default()
  config.data.name = 'imagenet'
  config.model.name = 'mobilenet_v2'
  config.batch_size = 256
  config.augment.flip = True
  config.budget = 1 / 43

  config.search.epochs = 8.0
  config.search.distill = 0.5
  config.search.optimizer.learning_rate = 1e-4
  config.search.optimizer.quantizer_rate = 1e-3
  config.search.optimizer.gate_rate = 2e-3
  config.search.optimizer.decay_gates = False

  config.finetune.epochs = 32.0
  config.finetune.distill = 0.5
  config.finetune.optimizer.name = 'sgd'
  config.finetune.optimizer.learning_rate = 3e-3
  config.finetune.optimizer.weight_decay = 4e-5
  config.checkpoint_every = 1000
  return config
