"""What an experiment will be, found out before its first step."""

from typing import Any

from flax import nnx
import jax

from djpq_jax import compress
from djpq_jax.experiment import phases
from djpq_jax.experiment import running
from djpq_jax.experiment import setting


def preview(
  run: setting.Run, model, net: compress.Compressed
) -> dict[str, Any]:
  """Sizes of data, model and phases, and the memory of a training step.

  Args:
    run: prepared.
    model: the dense model.
    net: what the search would begin with.

  Returns:
    JSON-ready values.  `step_bytes` is what the compiler says that one
    device needs for a step of the search, the largest there is: parameters,
    optimizer, batch and temporaries.
  """
  config = run.config
  graph = net.structure.graph
  leaves = jax.tree.leaves(nnx.as_pure(nnx.state(model, nnx.Param)))
  return {
    'model': config.model.name,
    'parameters': sum(leaf.size for leaf in leaves),
    'float_macs': graph.float_macs,
    'float_bops': compress.FLOAT_BITS**2 * graph.float_macs,
    'method': config.method,
    'budgets': run.budgets or {},
    'prunable_groups': len(net.structure.gated),
    'groups': len(net.structure.groups),
    'data': config.data.name,
    'train_images': len(run.train_split),
    'test_images': len(run.test_split),
    'held_out_images': len(run.watched_split) if config.validation else 0,
    'image_shape': list(run.train_split.images.shape[1:]),
    'batch_size': config.batch_size,
    'devices': run.mesh().size,
    'device_kind': jax.devices()[0].device_kind,
    'steps': {name: run.steps(n) for name, n in run.epochs().items()},
    'step_bytes': _step_bytes(run, net, model),
  }


def _step_bytes(run: setting.Run, net, model) -> int:
  """Memory of one step on one device, as it is compiled for it."""
  state = phases.search_state(run, net, model, budgets=run.budgets, steps=1)
  to_devices, step_fn, place = running.spread(run)
  batch = run.batches(0, for_step=True)(0)
  state, batch = to_devices(state), place(batch) if place else batch
  found = step_fn.lower(state, batch).compile().memory_analysis()
  return int(
    found.argument_size_in_bytes
    + found.temp_size_in_bytes
    + found.output_size_in_bytes
    - found.alias_size_in_bytes
  )
