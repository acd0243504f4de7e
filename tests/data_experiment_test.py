"""A whole experiment on images that stay on disk, as on those in memory."""

import functools
import json

from flax import nnx
import numpy as np
import pictures
import pytest

from djpq_jax import cli
from djpq_jax import config as config_lib
from djpq_jax import experiment
from djpq_jax import models
from djpq_jax.data import sources
from djpq_jax.data.prepare import folder

pytestmark = [pytest.mark.standard_promotion, pytest.mark.slow]


class Net(nnx.Module):
  """One convolution and a linear layer."""

  input_shape = (8, 8, 3)

  def __init__(self, rngs):
    self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
    self.head = nnx.Linear(6, 2, rngs=rngs)

  def __call__(self, x):
    return self.head(nnx.relu(self.conv(x)).mean((1, 2)))


def test_it_learns_to_tell_dark_from_light(tmp_path, monkeypatch, capsys):
  rng = np.random.default_rng(0)
  for split, count in (('train', 24), ('val', 9)):
    for c, name in enumerate(('dark', 'light')):
      for i in range(count):
        level = int(rng.integers(10, 90)) + 130 * c
        file = pictures.encoded(pictures.plain(12 + i, 30 - i, level))
        pictures.write(tmp_path / f'in/{split}/{name}/{i}.jpg', file)
  folder.prepare(tmp_path / 'in', tmp_path)
  photos = functools.partial(sources.folder, size=8)
  monkeypatch.setitem(sources.SOURCES, 'photos', photos)
  monkeypatch.setitem(models.MODELS, 'net', lambda rngs: Net(rngs))
  config = config_lib.change(
    config_lib.default(),
    data=dict(name='photos', dir=str(tmp_path)),
    model=dict(name='net'),
    augment=dict(flip=True),
    batch_size=16,
    method='uniform',
    statistics_batches=2,
    float=dict(epochs=10, optimizer=dict(learning_rate=0.02)),
    finetune=dict(epochs=2),
  )
  shifted = config_lib.change(config, augment=dict(shift=1))
  with pytest.raises(ValueError, match='take no shift'):
    experiment.check(shifted)
  report = experiment.run(config, tmp_path / 'run')
  assert report['float_accuracy'] == 1
  assert report['accuracy'] > 0.9
  assert report['relative_bops'] < 0.05

  # Another set is cut to the size of the artifact's images.
  evaluate = ['evaluate', '--artifact', str(tmp_path / 'run' / 'artifact')]
  evaluate += ['--data', 'folder', '--data-dir', str(tmp_path), '--json']
  assert cli.main(evaluate) == 0
  assert json.loads(capsys.readouterr().out)['accuracy'] == report['accuracy']
