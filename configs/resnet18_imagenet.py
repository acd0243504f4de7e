"""ResNet-18 / ImageNet, from a trained float model (torchvision: 69.76 %).

Published: DJPQ 69.27 % at 1/53 of the float32 BOPs, DJPQ-restrict 69.1 % at
1/52.3, VIB pruning and then learned bits 68.52 %; but also 71.0 % (from float
70.7 %) for four bits with learned steps everywhere, at 1/53.5.
Reproduced so far: nothing; no run has come to its end, and the settings are a
first guess.

Command: djpq train --config configs/resnet18_imagenet.py \
             --set data.dir=DATA --set model.weights=resnet18-f37072fd.pth \
             --workdir runs/resnet18
Variants: configs/resnet18_imagenet.py:two_stage and the others of
djpq_jax.config.
"""

from djpq_jax import config as config_lib


def get_config():
  config = config_lib.default()
  config.data.name = 'imagenet'
  config.model.name = 'resnet18'
  config.batch_size = 256
  config.augment.flip = True
  config.budget = 1 / 53

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
  config.checkpoint_every = 1000
  return config
