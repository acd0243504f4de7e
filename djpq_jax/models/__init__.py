"""Plain nnx models, NHWC, that know nothing of compression.

`create` makes one by name.  All of them map images `[B, *model.input_shape]` to
logits [B, num_classes], start in train mode, and switch with `model.eval()`
and `model.train()`.
"""

from collections.abc import Callable
import difflib
import inspect
import numbers
from typing import Any

from flax import nnx

from djpq_jax.models import cnn
from djpq_jax.models import efficientnet
from djpq_jax.models import imagenet_resnet
from djpq_jax.models import mobilenet
from djpq_jax.models import resnet
from djpq_jax.models import vgg
from djpq_jax.models import vit

MODELS: dict[str, Callable[..., nnx.Module]] = {
  'digits_cnn': cnn.DigitsCNN,
  'lenet5': cnn.LeNet5,
  'vgg7': vgg.VGG7,
  'vgg11': vgg.vgg11,
  'vgg16': vgg.vgg16,
  'resnet8': resnet.resnet8,
  'resnet20': resnet.resnet20,
  'resnet32': resnet.resnet32,
  'resnet44': resnet.resnet44,
  'resnet56': resnet.resnet56,
  'cifar_resnet': resnet.CifarResNet,
  'resnet18': imagenet_resnet.resnet18,
  'resnet34': imagenet_resnet.resnet34,
  'resnet50': imagenet_resnet.resnet50,
  'mobilenet_v2': mobilenet.MobileNetV2,
  'efficientnet_lite0': efficientnet.EfficientNetLite0,
  'vit_s16': vit.vit_s16,
  'vision_transformer': vit.VisionTransformer,
}


def create(name: str, *, seed: int = 0, **kwargs: Any) -> Any:
  """Builds the model `name` with fresh weights, in train mode.

  Args:
    name: a key of `MODELS`.
    seed: of the initial weights.
    **kwargs: arguments of the constructor, such as `num_classes`.

  Returns:
    The model, with `input_shape` = (height, width, channels) of one image.

  Raises:
    ValueError: no such model or no such argument, no class, or the constructor
      refuses a value.

  >>> create('digits_cnn').input_shape
  (8, 8, 1)
  """
  if name not in MODELS:
    raise ValueError(f'no model {name!r}{_hint(name, MODELS)}')
  constructor = MODELS[name]
  known = _arguments(constructor)
  for key in kwargs:
    if key not in known:
      raise ValueError(f'{name} takes no argument {key!r}{_hint(key, known)}')
  classes = kwargs.get('num_classes', 1)
  if not isinstance(classes, numbers.Integral) or classes < 1:
    raise ValueError(
      f'num_classes of {name} must be a whole number, at least 1; '
      f'got {classes!r}'
    )
  try:
    return constructor(**kwargs, rngs=nnx.Rngs(seed))
  except (TypeError, ArithmeticError) as error:
    raise ValueError(f'{name} refuses {kwargs}: {error}') from error


def _arguments(constructor):
  """Names of the arguments that a user may pass."""
  # The metaclass of nnx.Module hides the signature of __init__.
  if inspect.isclass(constructor):
    constructor = constructor.__init__
  parameters = inspect.signature(constructor).parameters
  return [p for p in parameters if p not in ('self', 'rngs')]


def _hint(name, known):
  """The nearest known name, if one is near, and the list of all."""
  near = difflib.get_close_matches(str(name), known, n=1)
  nearest = f'; did you mean {near[0]!r}?' if near else ';'
  return f'{nearest} known: {", ".join(sorted(known))}'
