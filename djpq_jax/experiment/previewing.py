"""What an experiment will be, found out before its first step."""

from typing import Any

from flax import nnx
import jax

from djpq_jax import allocate
from djpq_jax import compress
from djpq_jax import train
from djpq_jax.experiment import methods
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
    net: the model with the gates and quantizers of the config's rules.

  Returns:
    JSON-ready values.  `step_bytes` is what the compiler says that one
    device needs for a step of `step_phase`, the largest there is: parameters,
    optimizer, batch and temporaries.  It is 0 where there is no step.
  """
  config = run.config
  graph = net.structure.graph
  leaves = jax.tree.leaves(nnx.as_pure(nnx.state(model, nnx.Param)))
  uniform, stages = (config.method == m for m in ('uniform', 'two_stage'))
  phase, states = largest_steps(run, model)
  return {
    'model': config.model.name,
    'parameters': sum(leaf.size for leaf in leaves),
    'float_macs': graph.float_macs,
    'float_bops': compress.FLOAT_BITS**2 * graph.float_macs,
    'method': config.method,
    'bit_choices': list(config.bit_choices) if run.searches else [],
    'uniform_bits': list(config.uniform_bits) if uniform else [],
    'layers': len(graph.layers),
    'layers_of_other_bits': _of_other_bits(run, net) if uniform else 0,
    'two_stage_macs': config.two_stage_macs if stages else None,
    'budgets': run.budgets or {},
    'prunable_groups': len(net.structure.gated) if run.searches else 0,
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
    'step_phase': phase,
    'step_bytes': max((_step_bytes(run, s) for s in states), default=0),
  }


def largest_steps(
  run: setting.Run, model
) -> tuple[str, list[train.TrainState]]:
  """The phase whose step takes the most, and what its trainings begin with.

  A search has gates, noise and all channels; the finetuning has quantizers,
  where there are any, and maybe a teacher.  The second search of two stages
  is taken as if the first one pruned nothing, which nobody knows before.

  Args:
    run: prepared.
    model: the dense model.
  """
  steps = {name: run.steps(n) for name, n in run.epochs().items()}
  if steps['search']:
    return 'search', [
      phases.search_state(run, net, model, budgets=run.budgets, steps=1)
      for net in methods.before_search(run, model)
    ]
  if steps['finetune']:  # which the method begins without a step before it
    net = methods.METHODS[run.config.method](run, model)
    return 'finetune', [phases.finetune_state(run, net, model, steps=1)]
  if steps['float']:
    return 'float', [phases.float_state(run, model, steps=1)]
  return '', []


def _of_other_bits(run: setting.Run, net: compress.Compressed) -> int:
  """How many layers do not get the uniform bits, as the rules say."""
  bits = run.config.uniform_bits
  plan = allocate.uniform(net, *bits)
  found = [
    (plan.weight_bits.get(path), plan.act_bits.get(path))
    for path in net.structure.graph.layers
  ]
  return len(found) - found.count(bits)


def _step_bytes(run: setting.Run, state: train.TrainState) -> int:
  """Memory of one step on one device, as it is compiled for it."""
  to_devices, step_fn, place = running.spread(run)
  batch = run.batches(0, as_bytes=True)(0)
  state, batch = to_devices(state), place(batch) if place else batch
  found = step_fn.lower(state, batch).compile().memory_analysis()
  return int(
    found.argument_size_in_bytes
    + found.temp_size_in_bytes
    + found.output_size_in_bytes
    - found.alias_size_in_bytes
  )
