"""Saves a hardened model, reloads it, and measures what was reloaded."""

import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from djpq_jax import checkpoint
from djpq_jax import compress
from djpq_jax import evaluation
from djpq_jax import harden
from djpq_jax import integer
from djpq_jax import models
from djpq_jax import parallel
from djpq_jax.experiment import setting


def deploy(run: setting.Run, hardened, workdir, float_accuracy, start):
  """Saves, reloads and measures; the report speaks of the reloaded model."""
  folder = workdir / 'artifact'
  before = _predictions(hardened, run)
  shape = run.test_split.images.shape[1:]
  sample = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
  rows = harden.count(hardened, sample)
  config = run.config
  if parallel.is_first():
    checkpoint.save(
      folder,
      hardened,
      rows,
      model_spec={
        'name': config.model.name,
        'kwargs': config.model.kwargs.to_dict(),
      },
      input_shape=shape,
      more={
        'accuracy': evaluation.accuracy(before, run.test_split),
        'float_accuracy': float_accuracy,
        'license': config.license,
        'measured_on': {
          'data': config.data.name,
          'kwargs': config.data.kwargs.to_dict(),
          'images': len(before),
        },
      },
    )
  parallel.wait('artifact')
  reloaded = load_artifact(folder)
  logits = _predictions(reloaded, run)
  if not np.array_equal(logits, before):
    raise RuntimeError(
      'the reloaded artifact does not predict what was saved; this is a bug'
    )
  rows = harden.count(reloaded, sample)
  return {
    'float_accuracy': float_accuracy,
    'accuracy': evaluation.accuracy(logits, run.test_split),
    'cross_entropy': evaluation.cross_entropy(logits, run.test_split),
    'budget': run.budget,
    'budgets': run.budgets or {},
    **harden.totals(reloaded, rows),
    'artifact': folder.name,
    'artifact_bytes': checkpoint.size_bytes(folder),
    'float_bytes': 4 * _parameters(setting.dense_model(run)),
    'seconds': time.monotonic() - start,
    'seed': config.seed,
    'config': config.to_dict(),
    'layers': [vars(row) for row in rows],
    'groups': groups(reloaded),
    'best_steps': run.best_steps,
    'history': run.history,
  }


def _predictions(hardened, run: setting.Run) -> np.ndarray:
  """What the integers predict; `djpq evaluate` gets the same, bit for bit."""
  simulated = integer.lower(hardened, 'simulated')
  return evaluation.predictions(simulated, run.test_split, mesh=run.mesh())


def load_artifact(folder, spec=None):
  """Loads an artifact of one of the models of this package.

  Args:
    folder: where it is.
    spec: the 'model' of its manifest, for those who have read that.
  """
  spec = spec or checkpoint.read_manifest(folder)['model']
  return checkpoint.load(
    folder, lambda: models.create(spec['name'], **spec['kwargs'])
  )


def _parameters(model) -> int:
  leaves = jax.tree.leaves(nnx.as_pure(nnx.state(model, nnx.Param)))
  return sum(leaf.size for leaf in leaves)


def groups(model: compress.Compressed) -> list[dict[str, Any]]:
  """Name, size, kept channels and reason of every channel group."""
  masks = compress.open_masks(model.structure)
  return [
    {
      'name': g.name,
      'size': g.size,
      'kept': int(mask.sum()),
      'reason': g.reason,
    }
    for g, mask in zip(model.structure.groups, masks)
  ]
