"""Checkpoints of a training state: written beside the training, picked whole.

    folder/
      120/state/     parameters, statistics, optimizer, key, controller
      120/history/   the metrics that were seen until then, as JSON
      120/metrics/   the accuracy, where the best one is kept
      240/...

Orbax writes a step under another name and renames it when all of it is there,
so that a half-written one is never found.  The teacher is not saved: it does
not change, and whoever resumes has it.
"""

import dataclasses
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from djpq_jax.train import state as state_lib

FIELDS = ('step', 'params', 'rest', 'opt_state', 'control', 'bad_steps')


class CheckpointError(ValueError):
  """A checkpoint cannot be used; the message says why in one sentence."""


class Checkpoints:
  """The checkpoints of one training phase.

  A context manager; leaving it waits until all is written.

  Args:
    folder: absolute, local or of an object store that `etils.epath` knows
      ('gs://...').
    keep: how many of the last ones stay.
    keep_best: whether the one of the best accuracy stays, too.
  """

  def __init__(self, folder, *, keep: int = 2, keep_best: bool = False):
    self.folder = folder
    self._keep_best = keep_best
    kept = policies.LatestN(keep)
    if keep_best:
      best = policies.BestN(
        get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False
      )
      kept = policies.AnyPreservationPolicy([kept, best])
    options = ocp.CheckpointManagerOptions(
      preservation_policy=kept,
      best_fn=_accuracy if keep_best else None,
      cleanup_tmp_directories=True,
      enable_async_checkpointing=True,
    )
    self._manager = ocp.CheckpointManager(folder, options=options)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._manager.close()

  def latest(self) -> int | None:
    """Steps of the last whole checkpoint; None if there is none."""
    return self._manager.latest_step()

  def save(
    self,
    state: state_lib.TrainState,
    history: list[Any],
    accuracy: float | None = None,
  ) -> None:
    """Copies the state, and writes it while training goes on.

    Args:
      state: what to save.
      history: JSON-ready rows that belong to it.
      accuracy: what `restore(best=True)` compares, if it was measured.
    """
    step = int(state.step)
    if step == self.latest():
      return  # this training went on from it
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(_tree(state)),
      history=ocp.args.JsonSave(list(history)),
    )
    metrics = None
    if self._keep_best:  # what was not measured is worse than all that was
      metrics = {'accuracy': -1.0 if accuracy is None else accuracy}
    self._manager.save(step, args=args, metrics=metrics, force=True)

  def restore(
    self, state: state_lib.TrainState, *, best: bool = False
  ) -> tuple[state_lib.TrainState, list[Any]]:
    """Reads the last checkpoint, or the best one.

    Args:
      state: a fresh one of the same model and objective, for its structure,
        its shapes and how its arrays are spread over devices.
      best: whether to read the one of the best accuracy; of several, the last.

    Returns:
      (the state, its history); (`state`, []) if there is no checkpoint.

    Raises:
      CheckpointError: the checkpoint is damaged, or of another model.
    """
    self._manager.wait_until_finished()
    step = self._manager.best_step() if best else self.latest()
    if step is None:
      return state, []
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _tree(state))
    args = ocp.args.Composite(
      state=ocp.args.StandardRestore(abstract),
      history=ocp.args.JsonRestore(),
    )
    try:
      found = self._manager.restore(step, args=args)
    except Exception as error:  # of many kinds, for what may be on a disk
      text = str(error).strip().partition('\n')[0]
      raise CheckpointError(
        f'the checkpoint {self.folder}/{step} cannot be read; if it is '
        'damaged, delete it to go on from the one before '
        f'({type(error).__name__}: {text:.200})'
      ) from error
    tree = found['state']
    key = jax.random.wrap_key_data(
      tree.pop('key'), impl=jax.random.key_impl(state.key)
    )
    state = dataclasses.replace(state, key=key, **_unflat(tree, state))
    return state, found['history']


def _accuracy(metrics) -> float:
  return metrics['accuracy']


def _tree(state: state_lib.TrainState) -> dict[str, Any]:
  """What is saved: plain dicts, whatever the optimizer's own types are."""
  tree = {}
  for name in FIELDS:
    found = jax.tree_util.tree_leaves_with_path(getattr(state, name))
    tree[name] = {jax.tree_util.keystr(path): leaf for path, leaf in found}
  return {k: v for k, v in tree.items() if v} | {
    'key': jax.random.key_data(state.key)
  }


def _unflat(tree, state: state_lib.TrainState) -> dict[str, Any]:
  """Undoes `_tree`, in the structure of `state`."""
  fields = {}
  for name in FIELDS:
    value = getattr(state, name)
    paths, treedef = jax.tree_util.tree_flatten_with_path(value)
    leaves = [tree[name][jax.tree_util.keystr(path)] for path, _ in paths]
    fields[name] = jax.tree.unflatten(treedef, leaves)
  return fields
