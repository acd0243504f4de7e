"""Says where a training broke: the batch, the variable or the layer."""

from collections.abc import Iterator

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from djpq_jax import compress
from djpq_jax import parallel
from djpq_jax.train import state as state_lib
from djpq_jax.train import step as step_lib


class TrainingError(RuntimeError):
  """Training cannot go on; the message says where it broke and what to do."""


def where(state: state_lib.TrainState, batch_at, steps: range) -> str:
  """Finds the first thing that was not finite in some steps and says so."""
  state = parallel.gather(state)
  head = f'training stopped at step {steps.stop}: '
  for step in steps:
    batch = batch_at(step)
    if not np.all(np.isfinite(np.asarray(batch['image']))):
      return (
        f'{head}the batch of step {step} has pixels that are not finite; '
        'check the data'
      )
  place = _bad_leaf(state.params)
  for part in _parts(batch, state.program.accumulate):
    place = place or _bad_input(state, part) or _bad_gradient(state, part)
  if place is None:
    place = 'the loss (it recovered on this batch)'
  return (
    f'{head}{int(state.bad_steps)} step(s) were not finite, first seen in '
    f'{place}; lower the learning rate, or check the data'
  )


def _parts(
  batch: state_lib.Batch, accumulate: int
) -> Iterator[state_lib.Batch]:
  """Parts of a batch as large as what one device has in memory in a step."""
  count = accumulate * jax.local_device_count()
  for part in range(min(count, len(batch['label']))):
    yield {name: x[part::count] for name, x in batch.items()}


def _bad_gradient(
  state: state_lib.TrainState, batch: state_lib.Batch
) -> str | None:
  grads, _ = jax.grad(step_lib.total_loss, has_aux=True)(
    state.params, state, batch, state.key
  )
  return _bad_leaf(grads)


def _bad_leaf(params) -> str | None:
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if not np.all(np.isfinite(np.asarray(leaf))):
      names = [str(getattr(p, 'key', p)) for p in path[1:]]
      return 'the variable ' + '/'.join(names)
  return None


def _bad_input(
  state: state_lib.TrainState, batch: state_lib.Batch
) -> str | None:
  model = state_lib.model_of(state)
  if not isinstance(model, compress.Compressed):
    return None
  images = state.program.model_input(jnp.asarray(batch['image']))
  taps = compress.inputs_of(model, images)
  for path in model.structure.graph.layers:
    if not all(np.all(np.isfinite(np.asarray(x))) for x in taps.get(path, [])):
      return f'the input of layer {path}'
  return None


def check_alive(model: compress.Compressed, *args) -> None:
  """Raises a TrainingError if a layer of a compressed model has collapsed.

  Args:
    model: searched or frozen.
    *args: a batch of inputs.
  """
  taps = compress.inputs_of(model, *args)
  graphdef, state = nnx.split(model)

  @jax.jit  # one program, where each operation on each shape would be one
  def dead_of(state, taps):
    found = {}
    for path, layer, operands in compress.hooks(nnx.merge(graphdef, state)):
      if operands.weight is not None:
        kernel = ~jnp.any(operands.weight(layer.kernel[...]))
        inputs = [jnp.any(operands.act(x)) for x in taps[path]]
        found[path] = {'input': ~jnp.any(jnp.array(inputs)), 'kernel': kernel}
    return found

  found = dead_of(nnx.as_pure(state), taps)
  for path, _, _ in compress.hooks(model):
    for part, dead in found.get(path, {}).items():
      if dead:
        raise TrainingError(
          f'layer {path} has collapsed: its {part} rounds to zero everywhere; '
          'raise the budget, lower the rates of gates and quantizers, or give '
          'the layer more bits or channels with a rule'
        )
