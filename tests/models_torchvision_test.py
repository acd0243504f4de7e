"""Logits of torchvision and timm, where they are installed (they need torch).

Each of their models is made with random weights and statistics, saved by torch,
read here, and asked for the logits of the same images.
"""

from flax import nnx
import numpy as np
import pytest

from djpq_jax import evaluation
from djpq_jax import models
from djpq_jax.models import torch_weights

torch = pytest.importorskip('torch')
pytestmark = pytest.mark.slow

# Name here, arguments here and there, the size of the images.
TORCHVISION = [
  ('resnet18', 'resnet18', {}, {}, 64),
  ('resnet34', 'resnet34', {}, {}, 64),
  ('resnet50', 'resnet50', {}, {}, 64),
  ('mobilenet_v2', 'mobilenet_v2', {}, {}, 64),
  ('mobilenet_v2', 'mobilenet_v2', dict(width=0.5), dict(width_mult=0.5), 64),
  ('vgg11', 'vgg11_bn', dict(batch_norm=True), {}, 224),
  ('vgg11', 'vgg11', {}, {}, 224),
  ('vgg16', 'vgg16', {}, {}, 224),
]


def randomized(model):
  """Other numbers in place of the ones and zeros of a fresh model."""
  torch.manual_seed(0)
  for name, value in model.state_dict().items():
    if name.endswith('running_var'):
      value.uniform_(0.5, 1.5)
    elif value.ndim == 1:
      value.add_(0.1 * torch.randn_like(value))
    elif name.endswith(('_token', 'pos_embed', 'pos_embedding')):
      value.normal_(0, 0.5)
  return model.eval()


def assert_agree(ours, kwargs, theirs, size, path):
  theirs = randomized(theirs)
  torch.save(theirs.state_dict(), path)
  shape = (2, size, size, 3)
  images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  with torch.no_grad():
    expected = theirs(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
  make = lambda: models.create(ours, **kwargs, input_shape=shape[1:])
  model = nnx.eval_shape(make)
  torch_weights.assign(model, torch_weights.read_state_dict(path))
  logits = evaluation.predict(model, [images])
  scale = np.abs(expected).max()
  np.testing.assert_allclose(logits / scale, expected / scale, atol=1e-5)


@pytest.mark.parametrize(
  ('ours', 'theirs', 'kwargs', 'their_kwargs', 'size'), TORCHVISION
)
def test_torchvision(ours, theirs, kwargs, their_kwargs, size, tmp_path):
  torchvision = pytest.importorskip('torchvision')
  made = getattr(torchvision.models, theirs)(**their_kwargs)
  assert_agree(ours, kwargs, made, size, tmp_path / 'weights.pth')


def test_vit_of_torchvision(tmp_path):
  """Of the size of ViT-S/16, which it has no name for."""
  torchvision = pytest.importorskip('torchvision')
  made = torchvision.models.VisionTransformer(224, 16, 12, 6, 384, 1536)
  assert_agree('vit_s16', {}, made, 224, tmp_path / 'weights.pth')


def test_vit_s16_of_timm(tmp_path):
  timm = pytest.importorskip('timm')
  made = timm.create_model('vit_small_patch16_224')
  assert_agree('vit_s16', {}, made, 224, tmp_path / 'weights.pth')
