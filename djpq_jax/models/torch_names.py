"""Where torch keeps the weights of each module here.

Models whose attributes bear torch's names need no entry: the CIFAR and the
ImageNet ResNets.  The others follow torchvision (MobileNetV2, VGG), timm or
torchvision, as a file does (ViT), and the port that EfficientNet-Lite0's
weights were released with.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from djpq_jax.models import efficientnet
from djpq_jax.models import mobilenet
from djpq_jax.models import vgg
from djpq_jax.models import vit


def _unchanged(value: np.ndarray) -> np.ndarray:
  return value


class Source(NamedTuple):
  """A module's tensors in a torch state dict.

  Attributes:
    name: of torch's module, or of a lone parameter.
    part: takes what belongs here out of one of its tensors, in torch's order
      of axes.
    parts: how many modules here share the outputs of torch's one.
  """

  name: str
  part: Callable[[np.ndarray], np.ndarray] = _unchanged
  parts: int = 1


def layouts(model) -> Iterable[dict[str, Source]]:
  """The ways to name a model's tensors, the usual one first.

  Each is a '/'-joined path -> source, where they differ; {} for models whose
  attributes bear torch's names.
  """
  for kind, find in _FINDERS.items():
    if isinstance(model, kind):
      return [
        {
          path: Source(name) if isinstance(name, str) else name
          for path, name in found.items()
        }
        for found in find(model)
      ]
  return [{}]


def _pair(path, conv, norm):
  """A convolution and its norm."""
  return {f'{path}/conv': conv, f'{path}/bn': norm}


def _mobilenet_v2(model):
  names = _pair('stem', 'features.0.0', 'features.0.1')
  for i, block in enumerate(model.blocks):
    conv = f'features.{i + 1}.conv'
    # Those with a relu6 are packed with it, and so are one level deeper.
    packed = ['depthwise'] if block.expand is None else ['expand', 'depthwise']
    for j, part in enumerate(packed):
      names |= _pair(f'blocks/{i}/{part}', f'{conv}.{j}.0', f'{conv}.{j}.1')
    j = len(packed)
    names |= _pair(f'blocks/{i}/project', f'{conv}.{j}', f'{conv}.{j + 1}')
  last = f'features.{len(model.blocks) + 1}'
  names |= _pair('head', f'{last}.0', f'{last}.1')
  yield names | {'classifier': 'classifier.1'}


def _efficientnet_lite(model):
  names = _pair('stem', '_conv_stem', '_bn0')
  for i in range(len(model.blocks)):
    for j, part in enumerate(('expand', 'depthwise', 'project')):
      block = f'_blocks.{i}.'
      names |= _pair(
        f'blocks/{i}/{part}', f'{block}_{part}_conv', f'{block}_bn{j}'
      )
  names |= _pair('head', '_conv_head', '_bn1')
  yield names | {'classifier': '_fc'}


def _vgg(model):
  names: dict[str, str | Source] = {}
  index = 0
  for i, stage in enumerate(model.stages):
    for j, block in enumerate(stage):
      path, normed = f'stages/{i}/{j}', block.bn is not None
      names |= _pair(path, f'features.{index}', f'features.{index + 1}')
      index += 2 + normed  # with its relu
    index += 1  # the pool

  def channels_last(value):
    """Torch flattens [C, H, W]; here it is [H, W, C]."""
    if value.ndim == 1:
      return value
    split = value.reshape(-1, *model.map_shape)
    return split.transpose(0, 2, 3, 1).reshape(len(value), -1)

  yield names | {
    'fc1': Source('classifier.0', channels_last),
    'fc2': 'classifier.3',
    'fc3': 'classifier.6',
  }


def _vision_transformer(model):
  yield _vit_of_timm(model)
  # Older files have the second pair; torchvision renames it as it loads them.
  for layers in (('mlp.0', 'mlp.3'), ('mlp.linear_1', 'mlp.linear_2')):
    yield _vit_of_torchvision(model, layers)


def _vit_of_timm(model):
  names: dict[str, str | Source] = {
    'patches': 'patch_embed.proj',
    'class_token': 'cls_token',
    'positions': 'pos_embed',
  }
  for i in range(len(model.blocks)):
    ours, theirs = f'blocks/{i}', f'blocks.{i}'
    for j, operand in enumerate(OPERANDS):
      names[f'{ours}/attention/{operand}'] = Source(
        f'{theirs}.attn.qkv', _third(j), parts=3
      )
    names[f'{ours}/attention/out'] = f'{theirs}.attn.proj'
    names[f'{ours}/fc1'] = f'{theirs}.mlp.fc1'
    names[f'{ours}/fc2'] = f'{theirs}.mlp.fc2'
  return names


def _vit_of_torchvision(model, layers):
  names: dict[str, str | Source] = {
    'patches': 'conv_proj',
    'positions': 'encoder.pos_embedding',
    'norm': 'encoder.ln',
    'head': 'heads.head',
  }
  for i in range(len(model.blocks)):
    ours, theirs = f'blocks/{i}', f'encoder.layers.encoder_layer_{i}'
    attention = f'{theirs}.self_attention'
    for j, operand in enumerate(OPERANDS):
      # Parameters of the attention itself, not of a layer in it.
      for leaf, name in (('kernel', 'weight'), ('bias', 'bias')):
        names[f'{ours}/attention/{operand}/{leaf}'] = Source(
          f'{attention}.in_proj_{name}', _third(j), parts=3
        )
    names[f'{ours}/attention/out'] = f'{attention}.out_proj'
    names[f'{ours}/norm1'] = f'{theirs}.ln_1'
    names[f'{ours}/norm2'] = f'{theirs}.ln_2'
    names[f'{ours}/fc1'] = f'{theirs}.{layers[0]}'
    names[f'{ours}/fc2'] = f'{theirs}.{layers[1]}'
  return names


OPERANDS = ('query', 'key', 'value')  # in the order of torch's one layer


def _third(index):
  """Outputs of one of three layers that torch keeps as one."""
  return lambda value: np.split(value, 3)[index]


# Each yields the layouts of a model.
_FINDERS: dict[type, Callable[..., Iterable[dict[str, str | Source]]]] = {
  mobilenet.MobileNetV2: _mobilenet_v2,
  efficientnet.EfficientNetLite0: _efficientnet_lite,
  vgg.VGG: _vgg,
  vit.VisionTransformer: _vision_transformer,
}
