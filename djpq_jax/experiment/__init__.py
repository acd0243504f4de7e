"""One experiment from its config to its report.

What it goes through::

    data -> float model -> compress -> search -> plan -> finetune -> harden
         -> artifact -> reload -> evaluate -> report

`setting` holds what all of it shares, `phases` trains, `methods` puts phases
together into DJPQ and its controls, `deployment` saves and measures.
"""

from collections.abc import Callable
import pathlib
import time
from typing import Any

import jax

from djpq_jax import allocate
from djpq_jax import data
from djpq_jax import evaluation
from djpq_jax import files
from djpq_jax import harden
from djpq_jax import metrics
from djpq_jax import parallel
from djpq_jax import train
from djpq_jax.experiment import deployment
from djpq_jax.experiment import methods
from djpq_jax.experiment import phases
from djpq_jax.experiment import previewing
from djpq_jax.experiment import setting
from djpq_jax.experiment.deployment import load_artifact
from djpq_jax.experiment.layer_rules import dense_structure
from djpq_jax.experiment.layer_rules import rules_of
from djpq_jax.experiment.methods import METHODS
from djpq_jax.experiment.setting import SEARCHING

__all__ = [
  'METHODS',
  'SEARCHING',
  'check',
  'dense_structure',
  'float_model',
  'load_artifact',
  'preview',
  'rules_of',
  'run',
]


def float_model(
  config,
  progress: setting.Progress | None = None,
  float_dir: pathlib.Path | None = None,
):
  """Trains a config's float model; returns it and its test accuracy.

  Args:
    config: complete.
    progress: is told of each look.
    float_dir: where the checkpoints of the training are, from which it goes on
      or is read; by default there are none.

  Raises:
    ValueError: the config cannot work.
  """
  this = setting.prepare(config, progress)
  this.float_dir = float_dir
  model = setting.dense_model(this)
  setting.check_classes(this, model)
  model = phases.train_float(this, model)
  return model, evaluation.evaluate(model, this.test_split, mesh=this.mesh())


def check(config) -> None:
  """Checks a config as `run` does before its first step.

  Raises:
    ValueError: the config cannot work.
  """
  _prepared(config, None)


def preview(config) -> dict[str, Any]:
  """Checks a config and tells what it will be, see `previewing.preview`.

  Raises:
    ValueError: the config cannot work, as `run` would say.
  """
  this, model, net = _prepared(config, None)
  return previewing.preview(this, model, net)


def run(
  config,
  workdir,
  progress: setting.Progress | None = None,
  *,
  trained=None,
  float_dir: pathlib.Path | None = None,
  ready: Callable[[], None] | None = None,
  stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
  """Runs a whole experiment, or what is left of it.

  The workdir gets the artifact, the metrics of every look (`metrics.jsonl`)
  and checkpoints.  Run again with the same config and workdir, it goes on from
  the last checkpoint, and ends with the bits of an uninterrupted run.

  Args:
    config: complete, from `config.load`.
    workdir: where all results go; made if it is missing.
    progress: told about every look at the metrics.
    trained: a float model to start from instead of training one; without
      checkpoints then, since the config does not say what it is.
    float_dir: where the checkpoints of the float training are; by default in
      the workdir.  Experiments that differ only in what comes after it can
      share them.
    ready: called when the config has passed its checks, before all work.
    stop: asked after every step whether to save and stop.

  Returns:
    The report as JSON-ready values, see `report`.  All that it says of the
    hardened model was recomputed from the reloaded artifact.

  Raises:
    ValueError: the config cannot work; said before the first training step.
    train.CheckpointError: a checkpoint is damaged.
    train.TrainingError: a training cannot go on.
    train.Interrupted: `stop` said so.
  """
  start = time.monotonic()
  workdir = files.path(workdir)
  this, model, _ = _prepared(config, progress)
  if trained is not None and config.keep_best and jax.process_count() > 1:
    raise ValueError(
      'keep_best needs checkpoints that all processes see, and there are none '
      'with trained=; train without one of them'
    )
  if ready is not None:
    ready()
  this.stop = stop
  if trained is None:
    workdir.mkdir(parents=True, exist_ok=True)
    this.workdir = workdir
    this.float_dir = float_dir or workdir
    if parallel.is_first():
      this.log = metrics.Log(workdir, tensorboard=config.tensorboard)
  model = trained or phases.train_float(this, model)
  float_accuracy = evaluation.evaluate(model, this.test_split, mesh=this.mesh())
  net = METHODS[config.method](this, model)
  train.check_alive(net, this.sample())
  net = phases.finetune(this, net, model)
  if this.log is not None:
    this.log.close()
  hardened = harden.harden(net)
  return deployment.deploy(this, hardened, workdir, float_accuracy, start)


def _prepared(config, progress):
  """Data, dense and compressed model of a config that has passed its checks."""
  if config.method not in METHODS:
    raise ValueError(
      f'unknown method {config.method!r}; there are {", ".join(METHODS)}'
    )
  this = setting.prepare(config, progress)
  model = setting.dense_model(this)
  return this, model, _check(this, model)


def _check(run: setting.Run, model):
  """Finds out before the first training whether rules and budget can work."""
  config = run.config
  run.steps(0)  # checks the batch size
  data.check_augment(run.train_split, data.Augment(**config.augment))
  net, choices = phases.compressed(run, model), config.bit_choices or None
  setting.check_classes(run, model)  # which runs it, as the trace has done
  if run.searches:
    allocate.check_reachable(net, run.budgets or {'bops': 1.0}, choices)
  if config.method == 'uniform':
    allocate.uniform(net, *config.uniform_bits)  # checks them
  if config.method == 'two_stage':
    _check_stages(run, model, net)
  return net


def _check_stages(run: setting.Run, model, net) -> None:
  """Finds out whether each of two stages can do its part."""
  config, choices = run.config, run.config.bit_choices or None
  macs = config.two_stage_macs
  least = allocate.reachable(net, choices, 'macs')
  if macs < least:
    raise ValueError(
      f'two_stage_macs={macs:.4g} cannot be reached: with the fewest channels '
      f'that the rules allow, {least:.4g} of the MACs are left; raise it, or '
      'allow more pruning'
    )
  # Bits alone must do what pruning leaves.
  whole = phases.compressed(run, model, [methods.UNPRUNED])
  allocate.check_reachable(whole, config.budget / macs, choices)
