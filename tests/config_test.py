"""A config is complete, checked by name and type, and then it stands still."""

import json

import pytest
import tiny

from djpq_jax import compress
from djpq_jax import config as config_lib
from djpq_jax import experiment
from djpq_jax import models
from djpq_jax import optim
from djpq_jax.data import sources

HEAD = 'from djpq_jax import config as c\n\n\ndef get_config():\n'


@pytest.fixture
def write(tmp_path):
  """Writes a config file whose get_config() has these lines."""

  def write(*lines):
    path = tmp_path / 'mine.py'
    body = ['config = c.default()', *lines, 'return config']
    path.write_text(HEAD + ''.join(f'  {line}\n' for line in body))
    return str(path)

  return write


def test_defaults_are_complete():
  config = config_lib.default()
  for phase in ('float', 'search', 'finetune'):
    optim.OptimizerConfig(**config[phase].optimizer)
    assert config[phase].epochs == 0
  assert config.method in experiment.METHODS
  assert config.budget == 0
  assert config_lib.default() is not config
  json.dumps(config.to_dict())


def test_defaults_are_those_of_the_optimizer():
  """Two places state them; they agree."""
  stated = config_lib.default().search.optimizer.to_dict()
  for name, value in stated.items():
    assert getattr(optim.OptimizerConfig(), name) == value


def test_a_file_changes_what_it_says(write):
  config = config_lib.load(write('config.budget = 0.25', 'config.seed = 3'))
  assert (config.budget, config.seed) == (0.25, 3)
  rest = config_lib.default().to_dict() | {'budget': 0.25, 'seed': 3}
  assert config.to_dict() == rest


def test_a_file_may_return_a_dict(tmp_path):
  path = tmp_path / 'plain.py'
  path.write_text('get_config = lambda: {"search": {"ramp": 0.5}}\n')
  config = config_lib.load(str(path))
  assert config.search.ramp == 0.5
  assert config.search.temperature == 1


@pytest.mark.parametrize(
  'name', ['digits', 'configs/digits.py', 'elsewhere/configs/digits.py']
)
def test_packaged_configs_need_no_checkout(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert config_lib.load(name).data.name == 'digits'


def test_an_absolute_path_is_no_packaged_config(tmp_path):
  name = str(tmp_path / 'configs' / 'digits.py')
  with pytest.raises(config_lib.ConfigError, match='neither a file nor'):
    config_lib.load(name)


@pytest.mark.parametrize(
  'name', ['', 'digit', 'mine.py', 'configs/none.py', 'a.b', '../x', 'c.json']
)
def test_a_missing_file_is_named(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(config_lib.ConfigError) as info:
    config_lib.load(name)
  assert f'{name} is neither a file nor a packaged config' in str(info.value)


@pytest.mark.parametrize(
  ('name', 'hint'),
  [
    ('digts', '; did you mean digits?'),
    ('digts:w4a4', '; did you mean digits?'),
    ('configs/resnet18_imagent.py', '; did you mean resnet18_imagenet?'),
    ('nothing.like.it', ''),
  ],
)
def test_a_mistyped_name_gets_the_nearest_and_all(name, hint):
  with pytest.raises(config_lib.ConfigError) as info:
    config_lib.load(name)
  assert str(info.value) == (
    f'{name.partition(":")[0]} is neither a file nor a packaged config; '
    'packaged are digits, mobilenet_v2_cifar10, mobilenet_v2_imagenet, '
    f'resnet18_imagenet, resnet20_cifar10, vgg7_cifar10{hint}'
  )


@pytest.mark.parametrize(
  ('name', 'data', 'model'),
  [
    ('digits', 'digits', 'digits_cnn'),
    ('vgg7_cifar10', 'cifar10', 'vgg7'),
    ('resnet20_cifar10', 'cifar10', 'resnet20'),
    ('mobilenet_v2_cifar10', 'cifar10', 'mobilenet_v2'),
    ('resnet18_imagenet', 'imagenet', 'resnet18'),
    ('mobilenet_v2_imagenet', 'imagenet', 'mobilenet_v2'),
  ],
)
@pytest.mark.parametrize('variant', config_lib.VARIANTS)
def test_packaged_experiments_and_their_variants(name, data, model, variant):
  plain = config_lib.load(name)
  config = config_lib.load(f'{name}:{variant}')
  assert (config.data.name, config.model.name) == (data, model)
  assert config.data.name in sources.SOURCES
  assert config.model.name in models.MODELS
  assert config.method in experiment.METHODS
  changed = config_lib.VARIANTS[variant]
  for key in config:
    assert config[key] == changed.get(key, plain[key]), key
  for phase in ('float', 'search', 'finetune'):
    optim.OptimizerConfig(**config[phase].optimizer)


def test_a_variant_of_a_file_and_an_override(write):
  path = write('config.seed = 3')
  config = config_lib.load(f'{path}:w4a4', ['uniform_bits=(3, 4)'])
  assert (config.method, config.uniform_bits) == ('uniform', (3, 4))
  assert config.seed == 3


def test_an_unknown_variant_is_named(write):
  path = write('')
  message = (
    "unknown variant 'tow_stage'; there are djpq, .*; did you mean two_stage"
  )
  with pytest.raises(config_lib.ConfigError, match=message):
    config_lib.load(f'{path}:tow_stage')
  with pytest.raises(config_lib.ConfigError, match='neither a file nor a pack'):
    config_lib.load('none:w4a4')


def test_a_file_without_get_config(tmp_path):
  path = tmp_path / 'empty.py'
  path.write_text('x = 1\n')
  with pytest.raises(config_lib.ConfigError, match=r'has no get_config\(\)'):
    config_lib.load(str(path))
  path.write_text('get_config = lambda: 3\n')
  with pytest.raises(config_lib.ConfigError, match='gives 3, no config'):
    config_lib.load(str(path))


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('config.budgt = 1.0', 'unknown config field budgt; did you mean budget?'),
    ('config.search.epoch = 1', 'search.epoch; did you mean search.epochs?'),
    ('config.serch.epochs = 1', 'mean "search" instead of "serch"'),
    ('config.seed = "a"', "override field 'seed'"),
    ('config.search = 3', "override field 'search'"),
    ('config.seed = 1 / 0', 'line 6: division by zero (ZeroDivisionError)'),
    ('config.seed = zero', 'line 6: name'),
    ('config.seed = = 3', 'fails in line 6: invalid syntax (SyntaxError)'),
  ],
)
def test_mistakes_in_a_file(write, line, message):
  with pytest.raises(config_lib.ConfigError) as info:
    config_lib.load(write(line))
  assert message in str(info.value)
  assert '\n' not in str(info.value)


@pytest.mark.parametrize(
  ('override', 'message'),
  [
    ('budgt=1.0', 'unknown config field budgt; did you mean budget?'),
    ('search.epohcs=1', 'search.epohcs; did you mean search.epochs?'),
    (
      'float.optimizer.learning_rat=1',
      'did you mean float.optimizer.learning_rate?',
    ),
    ('data.nmae=x', 'did you mean data.name?'),
    ('zzz=1', 'unknown config field zzz'),
    ('batch_size=64.0', 'batch_size takes a whole number, got 64.0'),
    ('batch_size=many', "batch_size takes a whole number, got 'many'"),
    ('seed=True', 'seed takes a whole number, got True'),
    ('seed.x=1', "seed takes a whole number, got {'x': 1}"),
    ('budget=', "budget takes a number, got ''"),
    ('augment.flip=1', 'augment.flip takes True or False, got 1'),
    ('data.name=3', 'data.name takes text, got 3'),
    ('uniform_bits=4', 'uniform_bits takes a list, got 4'),
    (
      'bit_choices=("a",)',
      "bit_choices takes whole numbers in a list, got 'a'",
    ),
    ('bit_choices=(2, 2.5)', 'takes whole numbers in a list, got 2.5 there'),
    ('bit_choices=(-2, 4)', 'bit_choices takes a number from 0 on, got -2'),
    ('uniform_bits=(True, 4)', 'uniform_bits takes whole numbers in a list'),
    (f'seed={10**23}', f'seed takes a number below 2**32, got {10**23}'),
    ('seed=4294967296', 'seed takes a number below 2**32, got 4294967296'),
    ('search.epochs=-3', 'search.epochs takes a number from 0 on, got -3.0'),
    ('budget=1e999', 'budget takes a number from 0 on, got inf'),
    ('search.ramp=1.5', 'search.ramp takes a number from 0 to 1, got 1.5'),
    ('search=3', 'search has fields of its own, got 3'),
    ('model.kwargs=3', 'model.kwargs has fields of its own, got 3'),
    ('data.kwargs=3', 'data.kwargs has fields of its own, got 3'),
    ('model.kwargs.seed=3', 'model.kwargs.seed is the field seed'),
    ('data.kwargs.data_dir=D', 'data.kwargs.data_dir is the field data.dir'),
    ('model.kwargs={1:2}', 'names of arguments are text, got model.kwargs.1'),
    ('float={1:2}', 'names of fields are text, got float.1'),
    (
      "model.kwargs.x={'a': [1j]}",
      'model.kwargs.x.a takes numbers, text, lists and fields of Python, got a '
      'value of type complex',
    ),
    ('data.kwargs.x=[{1: 2}]', 'data.kwargs.x has fields in a list'),
    ("rules=[{'pattern': b'a'}]", 'pattern of a rule takes numbers, text'),
    ('rules=3', 'rules takes dicts in a list, got 3'),
    ('rules=["conv"]', "rules takes dicts in a list, got ['conv']"),
    ('budget', "'budget' is not of the form field=value"),
    ('=1', "'=1' is not of the form field=value"),
  ],
)
def test_mistakes_in_overrides(override, message):
  with pytest.raises(config_lib.ConfigError) as info:
    config_lib.load('digits', [override])
  assert message in str(info.value)


def test_overrides_are_literals_or_text():
  config = config_lib.load(
    'digits',
    [
      'search.epochs=10',
      'budget = 1e-3',
      'data.dir=/some/where=else',
      'augment.flip=True',
      'bit_choices=[2, 4, 8]',
      'uniform_bits=(3, 3)',
      'search.epochs=12',
    ],
  )
  assert config.search.epochs == 12.0
  assert isinstance(config.search.epochs, float)
  assert config.budget == 0.001
  assert config.data.dir == '/some/where=else'
  assert config.augment.flip is True
  assert config.bit_choices == (2, 4, 8)
  assert config.uniform_bits == (3, 3)


def test_kwargs_of_the_model_are_free_and_add_up(write):
  config = config_lib.load(
    write('config.model.kwargs = {"channels": (4, 4), "num_classes": 5}'),
    ['model.kwargs.num_classes=7', 'model.kwargs.anything=[1]'],
  )
  kwargs = config.model.kwargs.to_dict()
  assert kwargs['channels'] == (4, 4)
  assert kwargs['num_classes'] == 7
  assert list(kwargs['anything']) == [1]


def test_rules_reach_compress(write):
  rules = '[{"pattern": "*", "prune": False}, {"pattern": "c"}]'
  in_file = config_lib.load(write(f'config.rules = {rules}'))
  overridden = config_lib.load('digits', [f'rules={rules}'])
  for config in (in_file, overridden):
    assert experiment.rules_of(config) == [
      compress.Rule(pattern='*', prune=False),
      compress.Rule(pattern='c'),
    ]
    json.dumps(config.to_dict())


def test_rules_are_checked():
  def rules(*given):
    config = config_lib.change(config_lib.load('digits'), rules=given)
    return experiment.rules_of(config)

  with pytest.raises(ValueError, match="has no field 'prun'; known: pattern"):
    rules({'pattern': '*', 'prun': False})
  with pytest.raises(ValueError, match='has no field 3; known: pattern'):
    rules({'pattern': '*', 3: 1, 'prun': False})
  with pytest.raises(ValueError, match='needs a pattern'):
    rules({'prune': False})


@pytest.mark.parametrize(
  ('field', 'message'),
  [
    (
      '"weight_bits": 8',
      'must be (min, max) with 1 <= min <= max <= 16, a whole number within, '
      'got 8',
    ),
    ('"align": "a"', "must be a whole number, at least 1, got 'a'"),
    ('"align": 2.5', 'must be a whole number, at least 1, got 2.5'),
    ('"prune": "False"', "must be True or False, got 'False'"),
    ('"pattern": 3', 'a pattern must be text, got 3'),
  ],
)
def test_values_of_rules_are_checked(field, message):
  config = config_lib.load('digits', [f'rules=[{{"pattern": "*", {field}}}]'])
  with pytest.raises(ValueError) as info:
    experiment.rules_of(config)
  assert message in str(info.value)


def test_a_loaded_config_is_frozen(tmp_path):
  config = tiny.experiment_config(tmp_path)
  with pytest.raises(AttributeError, match='immutable'):
    config.seed = 1
  with pytest.raises(AttributeError, match='immutable'):
    config.search.epochs = 1.0
  hash(config)


def test_change_copies_and_checks(tmp_path):
  config = tiny.experiment_config(tmp_path)
  changed = config_lib.change(config, seed=5, search={'epochs': 1})
  assert (changed.seed, changed.search.epochs) == (5, 1.0)
  assert (config.seed, config.search.epochs) == (0, 40.0)
  assert changed.search.ramp == config.search.ramp
  assert changed.model.name == 'tiny'
  with pytest.raises(config_lib.ConfigError, match='did you mean seed'):
    config_lib.change(config, sead=5)
