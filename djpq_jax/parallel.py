"""Data parallelism: one step over the devices of one or many processes.

Every device holds the whole state and its share of the batch.  Two wrappers
give a pure step to all of them:

- `jit_step` states where arrays live and leaves the rest to the compiler: one
  program on the global batch.  Batch statistics and gate noise are those that
  one device would have.
- `pmap_step` runs the step once per device on that device's share, and the
  step averages over the axis: statistics and noise are each device's own.
"""

from collections.abc import Callable
import functools
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils
import numpy as np

AXIS = 'data'

T = TypeVar('T')
Step = Callable[..., tuple[Any, Any]]


def start(
  coordinator: str | None = None,
  process_count: int | None = None,
  process_index: int | None = None,
) -> None:
  """Joins the processes of one training; call it before all other JAX.

  Args:
    coordinator: 'host:port' of process 0; None where the cluster tells (TPU
      slices, SLURM, Kubernetes, Open MPI).
    process_count: how many processes there are.
    process_index: which one this is, from 0.

  Raises:
    ValueError: some of the three are given and some are not, or none are and
      no cluster tells.
  """
  given = [x is not None for x in (coordinator, process_count, process_index)]
  if any(given) and not all(given):
    raise ValueError(
      'a distributed training needs all of coordinator, process count and '
      'process index, or none of them where the cluster tells'
    )
  try:
    jax.distributed.initialize(coordinator, process_count, process_index)
  except ValueError as error:
    if any(given):
      raise
    raise ValueError(
      'no cluster is found here (TPU slice, SLURM, Kubernetes, Open MPI): give '
      f'coordinator, process count and process index ({error})'
    ) from error


def is_first() -> bool:
  """Whether this process is the one that prints and writes."""
  return jax.process_index() == 0


def wait(name: str) -> None:
  """Waits until all processes are here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


class Preemption:
  """Lets all processes stop after the same step when one gets SIGTERM."""

  def __init__(self):
    self._asked = 0
    self._seen = False

  def seen(self) -> bool:
    """Whether to stop; to be asked equally often in all processes."""
    self._asked += 1
    # JAX says it for one step alone, which may be one where nobody can stop.
    if multihost_utils.reached_preemption_sync_point(self._asked):
      self._seen = True
    return self._seen


def mesh(devices=None) -> jax.sharding.Mesh:
  """All devices of all processes in a row, an axis called 'data'."""
  devices = jax.devices() if devices is None else devices
  return jax.sharding.Mesh(np.array(devices), (AXIS,))


def replicate(tree: T, mesh: jax.sharding.Mesh) -> T:
  """Puts a copy of every array on every device.

  All processes must hold the same values.
  """
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def put(x):
    if jax.process_count() == 1:
      return jax.device_put(x, sharding)
    local = np.asarray(x)
    return jax.make_array_from_callback(
      local.shape, sharding, lambda index: local[index]
    )

  return jax.tree.map(lambda x: _with_raw_keys(put, x), tree)


def gather(tree: T) -> T:
  """Undoes `replicate`: arrays on this process's first device alone."""
  device = jax.local_devices()[0]

  def fetch(x):
    return jax.device_put(np.asarray(x), device)

  return jax.tree.map(lambda x: _with_raw_keys(fetch, x), tree)


def _with_raw_keys(fn, x):
  """Applies `fn` to an array, or to the numbers of a random key."""
  if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    return fn(x)
  data = fn(jax.random.key_data(x))
  return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))


def spread(batch: T, mesh: jax.sharding.Mesh) -> T:
  """Makes the global batch of what each process holds of it.

  Args:
    batch: arrays [B / processes, ...] of this process, in process order.
    mesh: from `mesh`.

  Returns:
    Arrays [B, ...], an equal share on each device.
  """
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)),
    batch,
  )


def jit_step(step: Step, mesh: jax.sharding.Mesh) -> Step:
  """Compiles a step for arrays as `replicate` and `spread` place them.

  Args:
    step: (state, batch) -> (state, metrics), pure; the state is donated.
    mesh: from `mesh`.
  """
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  shares = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))
  return jax.jit(
    step,
    in_shardings=(whole, shares),
    out_shardings=(whole, whole),
    donate_argnums=0,
  )


def pmap_step(step: Step, mesh: jax.sharding.Mesh) -> Step:
  """Maps a step over devices; for arrays placed as for `jit_step`.

  This is what `jax.pmap` itself lowers to since JAX 0.8, without the leading
  device axis that it wants on every array.

  Args:
    step: `(state, batch, *, axis_name) -> (state, metrics)`, which averages
      over that axis itself; the state is donated.
    mesh: from `mesh`.
  """
  spec = jax.sharding.PartitionSpec
  # The step averages gradients itself, which check_vma would do once more.
  mapped = jax.shard_map(
    functools.partial(step, axis_name=AXIS),
    mesh=mesh,
    in_specs=(spec(), spec(AXIS)),
    out_specs=(spec(), spec()),
    check_vma=False,
  )
  return jax.jit(mapped, donate_argnums=0)


def jit_function(
  function: Callable[[T, jax.Array], jax.Array], mesh: jax.sharding.Mesh
) -> Callable[[T, jax.Array], jax.Array]:
  """Maps a function of each image over devices; all get all of its results.

  Every device runs the function as it is, on its share of the batch, so that
  what it computes does not depend on how many others there are.

  Args:
    function: (state, batch) -> array with a row for each of the batch.
    mesh: from `mesh`; arrays come as `replicate` and `spread` place them.
  """

  def collected(state, batch):
    return jax.lax.all_gather(function(state, batch), AXIS, tiled=True)

  spec = jax.sharding.PartitionSpec
  mapped = jax.shard_map(
    collected,
    mesh=mesh,
    in_specs=(spec(), spec(AXIS)),
    out_specs=spec(),
    check_vma=False,  # which does not see that what is gathered is the same
  )
  return jax.jit(mapped)
