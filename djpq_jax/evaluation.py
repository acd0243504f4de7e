"""Predictions, accuracy and batch statistics of a model at rest."""

from collections.abc import Iterable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from djpq_jax import compress
from djpq_jax import data
from djpq_jax import parallel


def predict(
  model, images: Iterable[Any], mesh: jax.sharding.Mesh | None = None
) -> np.ndarray:
  """Logits on batches of images, float32 [N, classes].

  Args:
    model: an nnx model, or a function from images to logits.
    images: batches; over a mesh, this process's share of each.
    mesh: devices that share each batch of an nnx model; None for one device.

  Returns:
    Logits of the whole batches, in every process.

  Raises:
    ValueError: an nnx model gives anything but one array.
  """
  if not isinstance(model, nnx.Module):
    return np.concatenate([np.asarray(model(x)) for x in images])
  graphdef, state = nnx.split(compress.eval_view(model))
  state = nnx.as_pure(state)

  def run(state, x):
    logits = nnx.merge(graphdef, state)(x)
    if not isinstance(logits, jax.Array):
      raise ValueError(
        f'the model gives {type(logits).__name__}, where one array of logits '
        'is wanted'
      )
    return logits.astype(jnp.float32)

  state, images = _placed(state, images, mesh)
  run = parallel.jit_function(run, mesh) if mesh is not None else jax.jit(run)
  return np.concatenate([np.asarray(run(state, x)) for x in images])


def _placed(state, batches: Iterable[Any], mesh: jax.sharding.Mesh | None):
  """A state and batches as the devices of a mesh have them."""
  if mesh is None:
    return state, batches
  placed = (parallel.spread(batch, mesh) for batch in batches)
  return parallel.replicate(state, mesh), placed


def predictions(
  model,
  split: data.Split,
  batch_size: int = 256,
  mesh: jax.sharding.Mesh | None = None,
) -> np.ndarray:
  """Logits on every image of a split, float32 [N, classes].

  A few batches at a time are in memory, so that a split may be of any size.
  Whatever the mesh, a device computes batches of the same size, each with the
  same images in it: the logits are those of one device.

  Args:
    model: as for `predict`; a function runs on one device in any case.
    split: where the images come from.
    batch_size: images that a device takes at a time.
    mesh: devices that share the images, of all processes; None for one.
  """
  shares: dict[str, int] = {}
  if mesh is not None and (mesh.size == 1 or not isinstance(model, nnx.Module)):
    mesh = None
  if mesh is not None:
    batch_size *= mesh.size
    shares['process_index'] = jax.process_index()
    shares['process_count'] = jax.process_count()
  batches = data.prefetch(data.eval_batches(split, batch_size, **shares))
  logits = predict(model, (b['image'] for b in batches), mesh)
  return logits[: len(split)]  # what fills up the last batch comes last


def accuracy(logits: np.ndarray, split: data.Split) -> float:
  """Share of a split's images that the logits get right.

  Raises:
    ValueError: there are fewer logits than classes.
  """
  if logits.shape[-1] < split.num_classes:
    raise ValueError(
      f'the model has logits of {logits.shape[-1]} classes, but {split.name} '
      f'has {split.num_classes}'
    )
  return float((logits.argmax(-1) == split.labels).mean())


def cross_entropy(logits: np.ndarray, split: data.Split) -> float:
  """Mean cross-entropy to a split's labels, in nats.

  It tells models apart whose accuracies are the same within chance.
  """
  wide = logits.astype(np.float64)
  wide = wide - wide.max(-1, keepdims=True)
  right = np.take_along_axis(wide, split.labels[:, None], -1)[:, 0]
  return float((np.log(np.exp(wide).sum(-1)) - right).mean())


def evaluate(
  model,
  split: data.Split,
  batch_size: int = 256,
  mesh: jax.sharding.Mesh | None = None,
) -> float:
  """Share of a split's images that a model gets right; see `predictions`."""
  return accuracy(predictions(model, split, batch_size, mesh), split)


def estimate_statistics(
  model, batches: Iterable[Any], mesh: jax.sharding.Mesh | None = None
):
  """Replaces batch-norm statistics by their average over some batches.

  Args:
    model: any model; a copy is returned.
    batches: batches of images, as training sees them; over a mesh, this
      process's share of each.
    mesh: devices that share each batch, whose statistics are those of the
      whole of it; None for one device.

  Returns:
    The model with new means and variances; as it was if it keeps none.
  """
  copy = nnx.clone(model)
  for _, module in nnx.iter_modules(copy):
    if isinstance(module, nnx.BatchNorm):
      module.momentum = 0.0  # a call leaves its own batch's statistics
  view = compress.train_view(copy)
  graphdef, *states = nnx.split(view, nnx.BatchStat, ...)
  state = tuple(map(nnx.as_pure, states))

  def one(state, x):
    model = nnx.merge(graphdef, *state)
    model(x)
    return nnx.as_pure(nnx.state(model, nnx.BatchStat))

  if not jax.tree.leaves(state[0]):
    return model
  state, batches = _placed(state, batches, mesh)
  one = parallel.jit_whole(one, mesh) if mesh is not None else jax.jit(one)
  # One batch at a time: the next would wait in memory for this one.
  seen = [jax.tree.map(np.asarray, one(state, x)) for x in batches]
  if not seen:
    return model
  mean = jax.tree.map(lambda *s: jnp.asarray(sum(s) / len(s)), *seen)
  whole_graph, _, *others = nnx.split(nnx.clone(model), nnx.BatchStat, ...)
  return nnx.merge(whole_graph, mean, *others)
