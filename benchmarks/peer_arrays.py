"""What a peer begins with: float weights, images, and what the layers are."""

import itertools
from typing import Any

import numpy as np

from djpq_jax import data
from djpq_jax import evaluation
from djpq_jax import experiment
from djpq_jax.data import pipeline


def arrays(model, config) -> dict[str, Any]:
  """Float weights, what the layers are, and the images with their labels.

  Of the digits all shifts, with the teacher's logits; of other images there
  are too many, so they come as bytes that a peer moves itself.
  """
  train, test = images_of(config)
  optimizer = config.finetune.optimizer
  graph = experiment.dense_structure(config).graph
  found = weights(model) | {
    'network': config.model.name,
    'macs': [layer.macs for layer in graph.layers.values()],
    'rate': optimizer.learning_rate,
    'scale_rate': optimizer.quantizer_rate,
    'statistics_batches': config.statistics_batches,
    'labels': train.labels,
    'test': pipeline.normalize(np.asarray(test.images), test),
  }
  if config.data.name == 'digits':
    found['shifted'] = shifts(np.asarray(train.images), config.augment.shift)
    found['teacher'] = np.stack(
      [evaluation.predict(model, [images]) for images in found['shifted']]
    )
  else:
    found |= {'images': train.images, 'mean': train.mean, 'std': train.std}
    found |= {'batch': config.batch_size}
    found |= {'shift': config.augment.shift, 'flip': config.augment.flip}
  return {name: np.asarray(value) for name, value in found.items()}


def weights(model) -> dict[str, Any]:
  """Of the layers in their order: kernels, batch norm, strides."""
  pairs = convolutions(model)
  found: dict[str, Any] = {
    'layers': len(pairs) + 1,
    'strides': [int(np.max(conv.strides)) for conv, _ in pairs] + [1],
  }
  for k, (conv, bn) in enumerate(pairs):
    found[f'kernel{k}'] = np.asarray(conv.kernel[...])
    # y = scale * (x - mean) / deviation + bias
    deviation = np.sqrt(bn.var[...] + bn.epsilon)
    found[f'norm{k}'] = np.stack(
      [bn.scale[...], bn.bias[...], bn.mean[...], deviation]
    )
  found[f'kernel{len(pairs)}'] = np.asarray(model.linear.kernel[...])
  found[f'bias{len(pairs)}'] = np.asarray(model.linear.bias[...])
  return found


def convolutions(model) -> list[tuple[Any, Any]]:
  """Each convolution and its batch norm, in the order they are called."""
  if hasattr(model, 'block1'):
    blocks = [model.block1, model.block2, model.block3, model.block4]
    return [(block.conv, block.bn) for block in blocks]
  found = [(model.conv1, model.bn1)]
  for block in [*model.layer1, *model.layer2, *model.layer3]:
    found += [(block.conv1, block.bn1), (block.conv2, block.bn2)]
  return found


def images_of(config):
  """(training, test) images of a config."""
  return data.load(
    config.data.name,
    data_dir=config.data.dir or None,
    **config.data.kwargs,
  )


def shifts(images: np.ndarray, reach: int) -> np.ndarray:
  """[shifts, N, H, W, C]: moved by up to `reach` pixels, zeros come in."""
  height, width = images.shape[1:3]
  edge = (reach, reach)
  padded = np.pad(images, [(0, 0), edge, edge, (0, 0)])
  corners = itertools.product(range(2 * reach + 1), repeat=2)
  return np.stack(
    [padded[:, y : y + height, x : x + width] for y, x in corners]
  )
