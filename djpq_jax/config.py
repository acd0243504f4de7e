"""The fields of an experiment, their defaults, and how to override them."""

import ast
from collections.abc import Iterable
import difflib
import importlib.util
import math
import pathlib
import pkgutil
import traceback
from typing import Any

import ml_collections

PACKAGED = 'djpq_jax.configs'

# What each variant of an experiment changes; as 'resnet20_cifar10:w4a4'.
VARIANTS: dict[str, dict[str, Any]] = {
  'djpq': {'method': 'djpq'},
  'djpq_restrict': {'method': 'djpq', 'bit_choices': (2, 4, 8, 16, 32)},
  'two_stage': {'method': 'two_stage'},
  'w8a8': {'method': 'uniform', 'uniform_bits': (8, 8)},
  'w4a4': {'method': 'uniform', 'uniform_bits': (4, 4)},
  'w3a3': {'method': 'uniform', 'uniform_bits': (3, 3)},
  'w2a2': {'method': 'uniform', 'uniform_bits': (2, 2)},
  'float': {'method': 'float'},
}

# Fields that say how much of a whole.
PARTS = ('ramp', 'warmup', 'distill', 'smoothing', 'validation')


class ConfigError(ValueError):
  """A config cannot be used; the message names the field."""


def default() -> ml_collections.ConfigDict:
  """Every field there is, with its default; experiments change some."""
  return ml_collections.ConfigDict(
    {
      'seed': 0,  # of weights, data order and noise
      'data': {
        'name': '',  # see djpq_jax.data
        'dir': '',  # where a data set that is not bundled was prepared
        'kwargs': {},  # of its source, as {'size': 160}
      },
      'model': {
        'name': '',  # see djpq_jax.models
        'kwargs': {},  # of its constructor
        'weights': '',  # a torch state dict to start from
      },
      'batch_size': 64,  # over all devices
      'step': {  # how a training step is run
        'devices': 0,  # of this process; 0: all there are
        'wrapper': 'jit',  # or 'pmap', see djpq_jax.parallel
        'dtype': 'float32',  # that layers compute in; or 'bfloat16'
        'accumulate': 1,  # parts of a batch, one after the other
        'remat': False,  # compute again what lies between the products
      },
      'augment': {'shift': 0, 'flip': False},  # pixels; mirror
      'method': 'djpq',  # or 'two_stage', 'uniform', 'float'
      'rules': (),  # dicts with the fields of compress.Rule; loaded as pairs
      'narrow_range': False,  # True: symmetric grids; rules override it
      'asymmetric': True,  # of inputs that are mostly positive; likewise
      'mid_rise': True,  # of kernels of two bits; likewise
      'budget': 0.0,  # BOPs relative to dense float32; 0: none
      'budget_macs': 0.0,  # likewise MACs; no budget at all: coefficient mode
      'budget_weights': 0.0,  # likewise the bits of all kernels
      'bit_choices': (),  # allowed bits, () for all whole numbers
      'uniform_bits': (4, 4),  # weights, activations; for method 'uniform'
      'two_stage_macs': 0.3,  # MACs left after the first of two stages
      'float': {  # training of the model before it is compressed
        'epochs': 0.0,  # passes over the training images; parts, too
        'smoothing': 0.0,  # of labels, towards all classes alike
        'optimizer': _optimizer(),
      },
      'search': {  # for channels and bits
        'epochs': 0.0,
        'bits': 4.0,  # to begin with; more, up to 8, if the budgets allow
        # Bits up to so many are whole ones, of kernels from one on, and above
        # real-valued; 0 for real-valued ones alone, from two on.
        'whole_bits_to': 3,
        'kl_weight': 0.0,  # gamma, of the gates' KL
        'strength': 0.0,  # of log BOPs, in coefficient mode
        'ramp': 0.7,  # of the search: time to reach the budget or strength
        'smoothing': 0.0,
        'distill': 0.0,  # weight of the float model as a teacher
        'temperature': 1.0,  # of that teacher's logits and the model's
        'optimizer': _optimizer(),
      },
      'finetune': {  # of the cut model, its bits fixed
        'epochs': 0.0,
        'rewind': False,  # begin with the float weights, not the searched ones
        'smoothing': 0.0,
        'distill': 0.0,
        'temperature': 1.0,
        'optimizer': _optimizer(),
      },
      'license': '',  # of the weights, as 'CC-BY-4.0'; goes into the artifact
      'evaluate_every': 0.0,  # epochs between looks at accuracy; 0: none
      'validation': 0.0,  # part of the training images to look at, not test
      'keep_best': False,  # of those looks, not the last; needs validation
      'checkpoint_every': 500,  # steps; 0 for only at the end of a phase
      'tensorboard': False,  # event files beside metrics.jsonl
      'statistics_batches': 16,  # batch norm is re-estimated on these
    }
  )


def _optimizer() -> dict[str, Any]:
  return {
    'name': 'adam',  # or 'sgd'
    'learning_rate': 1e-3,  # of weights, at its peak
    'weight_decay': 1e-4,  # of kernels
    'momentum': 0.9,  # of sgd
    'warmup': 0.05,  # of the phase: time in which the rate rises
    'anneal': True,  # the rate of the weights falls to zero after that
    'quantizer_rate': 1e-2,  # of log clips, steps and exponents
    'gate_rate': 3e-2,  # of the gates' log variances
    'clip_norm': 5.0,  # largest global norm of the weights' gradients, > 0
    'decay_gates': True,  # rates of gates and quantizers fall as the weights'
  }


def load(source: str, overrides: Iterable[str] = ()):
  """Loads a config file and applies overrides.

  Args:
    source: path of a Python file with `get_config()`, or the name of a
      packaged one, as 'digits'; then, if wanted, a colon and one of VARIANTS,
      as 'digits:w4a4'.
    overrides: 'field.subfield=value' each; values are Python literals or
      plain strings.

  Returns:
    A complete ConfigDict, frozen.

  Raises:
    ConfigError: no such file, variant or field, or a value of a wrong type.
  """
  config = default()
  source, variant = _split_variant(source)
  _update(config, _get_config(source), '')
  _update(config, variant, '')
  for override in overrides:
    name, separator, text = override.partition('=')
    if not separator or not name.strip():
      raise ConfigError(f'{override!r} is not of the form field=value')
    _update(config, _nested(name.strip(), _literal(text.strip())), '')
  return ml_collections.FrozenConfigDict(config)


def change(config, **fields):
  """A copy of a config with some of its fields set.

  Raises:
    ConfigError: an unknown field, or a value of a wrong type.
  """
  copy = ml_collections.ConfigDict(config.to_dict())
  _update(copy, fields, '')
  return ml_collections.FrozenConfigDict(copy)


def _get_config(source: str):
  path = pathlib.Path(source)
  if path.suffix == '.py' and path.is_file():
    spec = importlib.util.spec_from_file_location('djpq_config', path)
  elif (
    path.suffix == '.py'
    and path.parent.name == 'configs'
    and not path.is_absolute()  # such a file is meant, and is missing
  ):
    spec = _find_packaged(path.stem, source)
  else:
    spec = _find_packaged(source, source)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as error:  # it is code of others, which may fail in any way
    raise ConfigError(f'{source} {_failure(error, spec.origin)}') from error
  if not hasattr(module, 'get_config'):
    raise ConfigError(f'{source} has no get_config()')
  try:
    config = module.get_config()
  except Exception as error:
    told = _failure(error, spec.origin)
    raise ConfigError(f'get_config() of {source} {told}') from error
  if not hasattr(config, 'items'):
    raise ConfigError(f'get_config() of {source} gives {config!r}, no config')
  return config


def _failure(error: Exception, file: str | None) -> str:
  """What went wrong in a config file, and in which of its lines."""
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if frame.filename == file
  ]
  if isinstance(error, SyntaxError):
    lines.append(error.lineno)
    error = SyntaxError(error.msg)
  line = f' in line {lines[-1]}' if lines else ''
  text = ' '.join(str(error).replace('\\n', ' ').split())
  return f'fails{line}: {text} ({type(error).__name__})'


def _split_variant(source: str) -> tuple[str, dict[str, Any]]:
  rest, colon, name = source.rpartition(':')
  if not colon or pathlib.Path(source).is_file():
    return source, {}
  if name not in VARIANTS:
    raise ConfigError(
      f'unknown variant {name!r}; there are {", ".join(VARIANTS)}'
      f'{_hint(name, VARIANTS)}'
    )
  return rest, VARIANTS[name]


def _find_packaged(name: str, source: str):
  folder = importlib.util.find_spec(PACKAGED)
  places = folder.submodule_search_locations if folder is not None else ()
  names = sorted(module.name for module in pkgutil.iter_modules(places))
  if name not in names:
    raise ConfigError(
      f'{source} is neither a file nor a packaged config; packaged are '
      f'{", ".join(names)}{_hint(name, names)}'
    )
  return importlib.util.find_spec(f'{PACKAGED}.{name}')


def _hint(name: str, names: Iterable[str], prefix: str = '') -> str:
  """Asks whether the nearest one was meant, if any is near."""
  close = difflib.get_close_matches(name, list(names), 1)
  return f'; did you mean {prefix}{close[0]}?' if close else ''


def _nested(name: str, value):
  for part in reversed(name.split('.')):
    value = {part: value}
  return value


def _literal(text: str):
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text


def _update(config, given, prefix: str) -> None:
  """Copies `given` into `config`, refusing fields that it does not have."""
  for key, value in given.items():
    name = f'{prefix}{key}'
    if not isinstance(key, str):
      raise ConfigError(f'names of fields are text, got {name}')
    if key not in config:
      hint = _hint(key, config, prefix)
      raise ConfigError(f'unknown config field {name}{hint}')
    nested = isinstance(config[key], ml_collections.ConfigDict)
    if nested and not hasattr(value, 'items'):
      raise ConfigError(f'{name} has fields of its own, got {value!r}')
    if name in ELSEWHERE:
      _check_kwargs(value, name)
      config[key] = ml_collections.ConfigDict({**config[key], **value})
    elif name == 'rules':
      config[key] = _pairs(value)
    elif nested:
      _update(config[key], value, f'{name}.')
    else:
      config[key] = _converted(config[key], value, name)


def _check_kwargs(given, name: str) -> None:
  for key in given:
    if not isinstance(key, str):
      raise ConfigError(f'names of arguments are text, got {name}.{key}')
    if key in ELSEWHERE[name]:
      raise ConfigError(f'{name}.{key} is the field {ELSEWHERE[name][key]}')
    _check_plain(given[key], f'{name}.{key}')


def _check_plain(value, name: str) -> None:
  """Refuses what `config.json` and a frozen config cannot hold."""
  if isinstance(value, (list, tuple)):
    for part in value:
      if hasattr(part, 'items'):
        raise ConfigError(f'{name} has fields in a list, which no config has')
      _check_plain(part, name)
  elif hasattr(value, 'items'):
    for key, part in value.items():
      _check_plain(part, f'{name}.{key}')
  elif value is not None and not isinstance(value, (bool, int, float, str)):
    raise ConfigError(
      f'{name} takes numbers, text, lists and fields of Python, got a value of '
      f'type {type(value).__name__}'
    )


def _pairs(rules):
  """Rules as tuples of pairs: a frozen config cannot hold dicts in a list."""
  try:
    pairs = tuple(tuple(dict(rule).items()) for rule in rules)
  except (TypeError, ValueError):
    raise ConfigError(f'rules takes dicts in a list, got {rules!r}') from None
  for rule in pairs:
    for key, value in rule:
      _check_plain(value, f'{key} of a rule')
  return pairs


def _converted(now, value, name: str):
  """`value` as the type that the field has."""
  if isinstance(now, tuple) and isinstance(value, (list, tuple)):
    for bits in value:  # all that a config has lists of
      if type(bits) is not int:
        raise ConfigError(
          f'{name} takes whole numbers in a list, got {bits!r} there'
        )
      _check_range(bits, name)
    return tuple(value)
  if type(now) is float and type(value) is int:
    value = float(value)
  if type(now) is not type(value):
    kind = _KINDS.get(type(now), type(now).__name__)
    raise ConfigError(f'{name} takes {kind}, got {value!r}')
  if type(now) in (int, float):
    _check_range(value, name)
  return value


# Arguments of models and data that have a field of their own, not one in these.
ELSEWHERE = {
  'model.kwargs': {'name': 'model.name', 'seed': 'seed'},
  'data.kwargs': {'name': 'data.name', 'data_dir': 'data.dir'},
}

_KINDS = {
  int: 'a whole number',
  float: 'a number',
  str: 'text',
  bool: 'True or False',
  tuple: 'a list',
}


def _check_range(value: float, name: str) -> None:
  """No number of a config is negative, and parts of a whole are at most 1.

  Of a seed, JAX takes 32 bits: others that share them would not be others.
  """
  if not 0 <= value < math.inf:
    raise ConfigError(f'{name} takes a number from 0 on, got {value!r}')
  if name.rpartition('.')[2] in PARTS and value > 1:
    raise ConfigError(f'{name} takes a number from 0 to 1, got {value!r}')
  if name == 'seed' and value >= 2**32:
    raise ConfigError(f'seed takes a number below 2**32, got {value!r}')
