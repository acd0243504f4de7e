"""Tensors into models: names, order of axes, and what does not fit."""

import hashlib

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from djpq_jax import models
from djpq_jax.models import torch_weights
from djpq_jax.models import vgg
from djpq_jax.models import vit


class TestSafetensors:
  def state(self):
    numbers = np.arange(6, dtype=np.float32)
    return {'conv.weight': numbers.reshape(3, 2, 1, 1), 'n': np.array(3)}

  def read(self, folder, raw):
    path = folder / 'some.safetensors'
    path.write_bytes(raw)
    return torch_weights.read_state_dict(path)

  def refused(self, folder, raw) -> str:
    with pytest.raises(torch_weights.WeightsError) as caught:
      self.read(folder, raw)
    assert 'some.safetensors' in str(caught.value)
    assert '\n' not in str(caught.value)
    return str(caught.value)

  def test_tensors(self, tmp_path):
    found = self.read(tmp_path, safetensors.numpy.save(self.state()))
    assert found.keys() == self.state().keys()
    for name, array in self.state().items():
      np.testing.assert_array_equal(found[name], array, strict=True)

  def test_truncated_anywhere(self, tmp_path):
    raw = safetensors.numpy.save(self.state())
    for end in range(0, len(raw), 7):
      self.refused(tmp_path, raw[:end])

  def test_a_torch_file_is_none(self, tmp_path):
    message = self.refused(tmp_path, b'PK\3\4 and so on')
    assert 'no safetensors file' in message

  def test_an_unknown_dtype(self, tmp_path):
    raw = safetensors.numpy.save({'x': np.ones(2, np.float16)})
    self.refused(tmp_path, raw.replace(b'"F16"', b'"F8X"'))


def abstract(name, **kwargs):
  return nnx.eval_shape(lambda: models.create(name, **kwargs))


def numbered(model):
  """Each tensor that the model needs, filled with numbers of its own."""
  rng = np.random.default_rng(0)
  shapes = torch_weights.shapes(model)
  return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


def as_torchvision(name, layers) -> str:
  """A name of timm's ViT as torchvision's has it."""
  first, second = layers
  for theirs, name_there in (
    ('patch_embed.proj', 'conv_proj'),
    ('cls_token', 'class_token'),
    ('pos_embed', 'encoder.pos_embedding'),
    ('blocks.', 'encoder.layers.encoder_layer_'),
    ('norm1', 'ln_1'),
    ('norm2', 'ln_2'),
    ('attn.qkv.', 'self_attention.in_proj_'),
    ('attn.proj', 'self_attention.out_proj'),
    ('mlp.fc1', first),
    ('mlp.fc2', second),
  ):
    name = name.replace(theirs, name_there)
  if name.startswith('norm.'):
    return f'encoder.ln.{name.removeprefix("norm.")}'
  return f'heads.{name}' if name.startswith('head.') else name


def digest(shapes) -> str:
  lines = sorted(f'{name} {tuple(shape)}' for name, shape in shapes.items())
  return hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:16]


# (name, arguments, tensors, digest of names and shapes), computed from the
# state dicts of torchvision 0.29.2 and timm 1.0.31 (vit_small_patch16_224), and
# from the files of models_released_test.py.
RELEASED = [
  ('resnet18', {}, 102, '2bb53b15765c4651'),
  ('resnet34', {}, 182, 'b945021fb00b779b'),
  ('resnet50', {}, 267, 'cf11dad974eadeaa'),
  ('mobilenet_v2', {}, 262, 'd613ea65450d5318'),
  ('vgg11', {}, 22, 'b11acd4f90d9643f'),
  ('vgg11', dict(batch_norm=True), 54, 'eb52f2d89ad478d4'),
  ('vgg16', {}, 32, 'ba63c2556d912509'),
  ('vit_s16', {}, 152, '02ef580c167435d6'),
  ('efficientnet_lite0', {}, 247, 'e8b5afc66056b920'),
  ('resnet20', {}, 97, '0568102414842bc6'),
  ('resnet56', {}, 277, '19075f64564218d1'),
]


class TestAssign:
  def model(self):
    return abstract('cifar_resnet', depth=8, num_classes=3)

  def refused(self, model, arrays) -> str:
    with pytest.raises(torch_weights.WeightsError) as caught:
      torch_weights.assign(model, arrays)
    assert '\n' not in str(caught.value)
    return str(caught.value)

  def test_order_of_axes(self):
    model = self.model()
    arrays = numbered(model)
    torch_weights.assign(model, arrays)
    block = model.layer2[0]
    kernel = arrays['layer2.0.conv1.weight']
    assert kernel.shape == (32, 16, 3, 3)
    found = block.conv1.kernel[...]
    np.testing.assert_array_equal(found, np.einsum('oihw->hwio', kernel))
    np.testing.assert_array_equal(
      model.linear.kernel[...], arrays['linear.weight'].T
    )
    for ours, theirs in (
      (model.linear.bias, 'linear.bias'),
      (block.bn1.scale, 'layer2.0.bn1.weight'),
      (block.bn1.bias, 'layer2.0.bn1.bias'),
      (block.bn1.mean, 'layer2.0.bn1.running_mean'),
      (block.bn1.var, 'layer2.0.bn1.running_var'),
    ):
      np.testing.assert_array_equal(ours[...], arrays[theirs])

  def test_dtype_stays_that_of_the_model(self):
    model = self.model()
    arrays = {k: v.astype(np.float64) for k, v in numbered(model).items()}
    torch_weights.assign(model, arrays)
    assert model.conv1.kernel.dtype == jnp.float32

  def test_counts_of_batches_are_not_needed(self):
    model = self.model()
    count = {'bn1.num_batches_tracked': np.array(5)}
    torch_weights.assign(model, numbered(model) | count)

  def test_missing(self):
    model = self.model()
    arrays = numbered(model)
    del arrays['layer1.0.bn2.running_var']
    message = self.refused(model, arrays)
    assert message == 'the weights lack layer1.0.bn2.running_var'
    del arrays['conv1.weight'], arrays['linear.bias']
    assert self.refused(model, arrays).endswith(' and 2 more')

  def test_misshapen(self):
    model = self.model()
    arrays = numbered(model)
    arrays['linear.weight'] = np.zeros((10, 64), np.float32)
    assert self.refused(model, arrays) == (
      'linear.weight has shape (10, 64), the model needs (3, 64)'
    )

  def test_left_over(self):
    model = self.model()
    arrays = numbered(model) | {'layer4.0.conv1.weight': np.zeros(1)}
    message = self.refused(model, arrays)
    assert message == 'the model has no place for layer4.0.conv1.weight'

  def test_a_refusal_leaves_the_model_as_it_was(self):
    model = self.model()
    arrays = numbered(model)
    torch_weights.assign(model, arrays)
    other = {k: -v for k, v in arrays.items()}
    del other['linear.bias']
    self.refused(model, other)
    found = np.einsum('hwio->oihw', model.conv1.kernel[...])
    np.testing.assert_array_equal(found, arrays['conv1.weight'])

  def test_third_of_attention(self):
    make = lambda: vit.VisionTransformer(
      2, (4, 4, 1), 2, 6, 1, 2, 4, rngs=nnx.Rngs(0)
    )
    model = nnx.eval_shape(make)
    arrays = numbered(model)
    assert arrays['blocks.0.attn.qkv.weight'].shape == (18, 6)
    torch_weights.assign(model, arrays)
    attention = model.blocks[0].attention
    for i, layer in enumerate(
      (attention.query, attention.key, attention.value)
    ):
      rows = slice(6 * i, 6 * i + 6)
      np.testing.assert_array_equal(
        layer.kernel[...], arrays['blocks.0.attn.qkv.weight'][rows].T
      )
      np.testing.assert_array_equal(
        layer.bias[...], arrays['blocks.0.attn.qkv.bias'][rows]
      )
    np.testing.assert_array_equal(
      model.positions[...], arrays['pos_embed'], strict=True
    )
    arrays['blocks.0.attn.qkv.weight'] = np.zeros((17, 6))
    message = self.refused(model, arrays)
    assert 'has shape (17, 6), the model needs (18, 6)' in message

  @pytest.mark.parametrize(
    'layers', ['mlp.0 mlp.3', 'mlp.linear_1 mlp.linear_2']
  )
  def test_vit_under_the_names_of_torchvision(self, layers):
    make = lambda: vit.VisionTransformer(
      3, (4, 4, 1), 2, 6, 2, 2, 8, rngs=nnx.Rngs(0)
    )
    model, other = nnx.eval_shape(make), nnx.eval_shape(make)
    arrays = numbered(model)
    renamed = {as_torchvision(k, layers.split()): v for k, v in arrays.items()}
    assert len(renamed) == len(arrays)
    assert not set(renamed) & set(arrays)
    torch_weights.assign(model, arrays)
    torch_weights.assign(other, renamed)
    images = np.random.default_rng(1).normal(size=(2, 4, 4, 1))
    images = images.astype(np.float32)
    np.testing.assert_array_equal(other(images), model(images))

    # What does not fit is called by the name that its file should have.
    block = 'encoder.layers.encoder_layer_1.'
    for name in (
      'class_token',
      'conv_proj.bias',
      'encoder.ln.weight',
      'encoder.pos_embedding',
      'heads.head.weight',
      block + 'ln_2.bias',
      block + 'self_attention.in_proj_bias',
      block + layers.split()[1] + '.weight',
    ):
      short = {k: v for k, v in renamed.items() if k != name}
      assert self.refused(other, short) == f'the weights lack {name}'
    name = block + 'self_attention.in_proj_weight'
    assert self.refused(other, renamed | {name: np.zeros((17, 6))}) == (
      f'{name} has shape (17, 6), the model needs (18, 6)'
    )
    message = self.refused(other, renamed | {'heads.pre_logits.bias': 1})
    assert message == 'the model has no place for heads.pre_logits.bias'

  def test_first_linear_layer_of_vgg_reads_channels_last(self):
    make = lambda: vgg.VGG(
      [[2], [3]], 2, (8, 12, 1), True, hidden=4, rngs=nnx.Rngs(0)
    )
    model = nnx.eval_shape(make)
    arrays = numbered(model)
    torch_weights.assign(model, arrays)
    features = np.random.default_rng(1).normal(size=(1, 2, 3, 3))
    features = features.astype(np.float32)  # [B, H, W, C]
    theirs = features.transpose(0, 3, 1, 2).reshape(1, -1)
    np.testing.assert_allclose(
      features.reshape(1, -1) @ np.array(model.fc1.kernel[...]),
      theirs @ arrays['classifier.0.weight'].T,
      rtol=1e-5,
    )
    assert 'features.5.running_mean' in arrays  # conv, norm, relu, pool, conv

  @pytest.mark.parametrize(('name', 'kwargs', 'count', 'expected'), RELEASED)
  def test_names_and_shapes_of_released_weights(
    self, name, kwargs, count, expected
  ):
    shapes = torch_weights.shapes(abstract(name, **kwargs))
    assert len(shapes) == count
    assert digest(shapes) == expected
