"""Checkpoints of a training state: written beside the training, picked whole.

    folder/
      120/state/     parameters, statistics, optimizer, key, controller
      120/history/   the metrics that were seen until then, as JSON
      120/metrics/   the accuracy, where the best one is kept
      240/...

Orbax writes a step under another name and renames it when all of it is there,
so that a half-written one is never found.  What else bears the name of a step
is none (see `orbax_manager.Committed`).  A checksum goes with each state: a
disk that changed a bit would change the run.  The teacher is not saved: it does
not change, and whoever resumes has it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from djpq_jax import files
from djpq_jax.train import orbax_manager
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

  Raises:
    CheckpointError: a file is where the folder should be.
  """

  def __init__(self, folder, *, keep: int = 2, keep_best: bool = False):
    file = files.obstacle(files.path(folder))
    if file is not None:  # about which orbax tells pages
      raise CheckpointError(f'{file} is a file, not a folder of checkpoints')
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
      step_name_format=orbax_manager.Committed(),
    )
    self._manager = orbax_manager.Manager(folder, options=options)

  def __enter__(self):
    return self

  def __exit__(self, *_):
    with orbax_manager.written(self.folder):
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

    Raises:
      OSError: this one, or the one before, could not be written.
    """
    step = int(state.step)
    if step == self.latest():
      return  # this training went on from it
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(_with_checksum(_tree(state))),
      history=ocp.args.JsonSave(list(history)),
    )
    metrics = None
    if self._keep_best:  # what was not measured is worse than all that was
      metrics = {'accuracy': -1.0 if accuracy is None else accuracy}
    with orbax_manager.written(self.folder):
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
      OSError: the disk or the network failed, which may pass.
    """
    with orbax_manager.written(self.folder):
      self._manager.wait_until_finished()
    step = self._manager.best_step() if best else self.latest()
    if step is None:
      return state, []
    abstract = jax.tree.map(
      ocp.utils.to_shape_dtype_struct, _with_checksum(_tree(state))
    )
    args = ocp.args.Composite(
      state=ocp.args.StandardRestore(abstract),
      history=ocp.args.JsonRestore(),
    )
    try:
      with orbax_manager.reads_end():
        found = self._manager.restore(step, args=args)
    except Exception as error:  # of many kinds, for what may be on a disk
      files.raise_if_it_may_pass(error)
      raise CheckpointError(
        f'the checkpoint {self.folder}/{step} cannot be read; if it is '
        f'damaged, {self._without(step)} '
        f'({orbax_manager.said(error)})'
      ) from error
    tree = found['state']
    if int(tree.pop('checksum')) != int(_checksum(tree)):
      raise CheckpointError(
        f'the checkpoint {self.folder}/{step} is damaged, its numbers are not '
        f'those that were saved; {self._without(step)}'
      )
    key = _as_it_was(tree.pop('key'), state.key)
    state = dataclasses.replace(state, key=key, **_unflat(tree, state))
    return state, found['history']

  def _without(self, step: int) -> str:
    """What to do about a checkpoint that is of no use."""
    before = [s for s in self._manager.all_steps() if s < step]
    if before:
      return f'delete it to go on from {max(before)}'
    return 'delete it to begin this phase anew'


def _accuracy(metrics) -> float:
  return metrics['accuracy']


def _tree(state: state_lib.TrainState) -> dict[str, Any]:
  """What is saved: plain dicts, whatever the optimizer's own types are."""
  tree = {}
  for name in FIELDS:
    found = jax.tree_util.tree_leaves_with_path(getattr(state, name))
    tree[name] = {
      jax.tree_util.keystr(path): _raw(leaf) for path, leaf in found
    }
  return {k: v for k, v in tree.items() if v} | {'key': _raw(state.key)}


def _is_key(leaf) -> bool:
  return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(leaf):
  """An array, or the numbers of a random key, such as those of dropout."""
  return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _as_it_was(found, leaf):
  """Undoes `_raw`: a key again where `leaf` is one, of the same kind."""
  if not _is_key(leaf):
    return found
  return jax.random.wrap_key_data(found, impl=jax.random.key_impl(leaf))


def _with_checksum(tree: dict[str, Any]) -> dict[str, Any]:
  return tree | {'checksum': _checksum(tree)}


@jax.jit
def _checksum(tree) -> jax.Array:
  """A uint32 of all bits, which no change of a single number leaves as it is.

  Modulo 2^32, to multiply by an odd number loses nothing, and the order of a
  sum does not matter; so it is the same over any number of devices.
  """
  total = jnp.uint32(0)
  for leaf in jax.tree.leaves(tree):
    bits = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
    unsigned = jnp.dtype(f'uint{8 * bits.dtype.itemsize}')
    words = jax.lax.bitcast_convert_type(bits, unsigned).astype(jnp.uint32)
    odd = jnp.uint32(2) * jnp.arange(words.size, dtype=jnp.uint32)
    odd = odd.reshape(words.shape) + jnp.uint32(1)
    found = jnp.sum(words * odd, dtype=jnp.uint32)
    total = jnp.uint32(31) * total + found
  return total


def _unflat(tree, state: state_lib.TrainState) -> dict[str, Any]:
  """Undoes `_tree`, in the structure of `state`."""
  fields = {}
  for name in FIELDS:
    value = getattr(state, name)
    paths, treedef = jax.tree_util.tree_flatten_with_path(value)
    leaves = [
      _as_it_was(tree[name][jax.tree_util.keystr(path)], leaf)
      for path, leaf in paths
    ]
    fields[name] = jax.tree.unflatten(treedef, leaves)
  return fields
