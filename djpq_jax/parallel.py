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
import contextvars
import functools
from typing import Any, TypeVar
import zlib

import jax
from jax.experimental import multihost_utils
import numpy as np

AXIS = 'data'
# On CPUs: fifty steps at once were seen to wait for each other without end.
MOST_IN_FLIGHT = 20

_SHARES = contextvars.ContextVar('shares', default=1)

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
  """Devices in a row, an axis called 'data'; by default all of all processes.

  Those of a process come one after the other, which their numbers need not do
  on a TPU: rows of a batch are in process order.
  """
  devices = jax.devices() if devices is None else devices
  devices = sorted(devices, key=lambda d: (d.process_index, d.id))
  return jax.sharding.Mesh(np.array(devices), (AXIS,))


def replicate(tree: T, mesh: jax.sharding.Mesh) -> T:
  """Puts a copy of every array of process 0 on every device of all."""
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  def put(x):
    if jax.process_count() == 1:
      return jax.device_put(x, sharding)
    local = np.asarray(x)
    return jax.make_array_from_callback(
      local.shape, sharding, lambda index: local[index]
    )

  return jax.tree.map(lambda x: _with_raw_keys(put, x), agreed(tree))


def agreed(tree: T) -> T:
  """What process 0 holds, in all of them, to the bit.

  What processes compute each for themselves may differ in its last bits where
  their machines do; what all of them go on with must not.

  Args:
    tree: numbers and arrays, of the same shapes and dtypes in all processes.

  Returns:
    The same tree of NumPy arrays; with a single process, as it was.

  Raises:
    ValueError: shapes or dtypes differ; in all processes.
  """
  leaves, structure = jax.tree.flatten(tree)
  if jax.process_count() == 1 or not leaves:
    return tree
  found = [np.asarray(_raw(leaf)) for leaf in leaves]
  kinds = str([(x.shape, x.dtype.name) for x in found]).encode()
  digests = multihost_utils.process_allgather(np.uint32(zlib.crc32(kinds)))
  if np.any(digests != digests[0]):
    raise ValueError(
      'the processes hold arrays of other shapes: give all of them the same '
      'config, data and version of djpq_jax'
    )
  # As bytes: a sum with zeros would lose the sign of a zero.
  content = b''.join(x.tobytes() for x in found)
  content = multihost_utils.broadcast_one_to_all(
    np.frombuffer(content, np.uint8)
  ).tobytes()
  start, same = 0, []
  for leaf, x in zip(leaves, found):
    part = np.frombuffer(content[start : start + x.nbytes], x.dtype)
    same.append(_keyed(part.reshape(x.shape).copy(), leaf))
    start += x.nbytes
  return jax.tree.unflatten(structure, same)


def gather(tree: T) -> T:
  """Undoes `replicate`: arrays on this process's first device alone."""
  device = jax.local_devices()[0]

  def fetch(x):
    return jax.device_put(np.asarray(x), device)

  return jax.tree.map(lambda x: _with_raw_keys(fetch, x), tree)


def _with_raw_keys(fn, x):
  """Applies `fn` to an array, or to the numbers of a random key."""
  return _keyed(fn(_raw(x)), x)


def _is_key(x) -> bool:
  dtype = getattr(x, 'dtype', None)
  return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _raw(x):
  """An array or number, or the numbers of a random key."""
  return jax.random.key_data(x) if _is_key(x) else x


def _keyed(data, x):
  """Undoes `_raw`: a random key where `x` is one."""
  if not _is_key(x):
    return data
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


def pace(number: int, result) -> None:
  """Now and then waits for a result, where devices share the cores of a CPU.

  Args:
    number: of the program that has the result, counted from 0.
    result: any arrays.
  """
  shared = jax.default_backend() == 'cpu' and jax.device_count() > 1
  if shared and number % MOST_IN_FLIGHT == MOST_IN_FLIGHT - 1:
    jax.block_until_ready(result)


def jit_step(step: Step, mesh: jax.sharding.Mesh) -> Step:
  """Compiles a step for arrays as `replicate` and `spread` place them.

  Args:
    step: (state, batch) -> (state, metrics), pure; the state is donated.
    mesh: from `mesh`.
  """
  return _jit(_telling_shares(step, mesh.shape[AXIS]), mesh, donate_argnums=0)


def jit_whole(
  function: Callable[[T, jax.Array], Any], mesh: jax.sharding.Mesh
) -> Callable[[T, jax.Array], Any]:
  """Compiles a function of a whole batch, of which devices hold shares.

  Args:
    function: (state, batch) -> arrays that all devices get.
    mesh: from `mesh`; arrays come as `replicate` and `spread` place them.
  """
  return _jit(function, mesh)


def _jit(function, mesh: jax.sharding.Mesh, **options):
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))
  return jax.jit(
    function, in_shardings=(whole, spread), out_shardings=whole, **options
  )


@functools.lru_cache(maxsize=8)  # JAX keeps programs by function
def _telling_shares(step: Step, count: int) -> Step:
  """The step, in which `shares` is a count."""

  @functools.wraps(step)
  def told(*args):
    before = _SHARES.set(count)
    try:
      return step(*args)
    finally:
      _SHARES.reset(before)

  return told


def shares() -> int:
  """In how many shares devices hold the batch of the step being traced.

  One but for `jit_step`: elsewhere a program sees one share only.
  """
  return _SHARES.get()


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
