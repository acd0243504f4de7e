"""Removes channels: a smaller model from a model, a graph and masks."""

from collections.abc import Mapping

from flax import nnx
import jax
import numpy as np

from djpq_jax import places
from djpq_jax.graph import marking
from djpq_jax.graph import records


def slice_channels(
  model: nnx.Module,
  graph: records.ChannelGraph,
  keep: Mapping[str, np.ndarray],
) -> nnx.Module:
  """A new model without the channels that `keep` masks out.

  Works on models with arrays and on abstract models (`jax.ShapeDtypeStruct`
  values). Variable types and metadata stay, and so do `promote_dtype` hooks.
  The model that is passed in stays as it is.

  Args:
    model: the model that was traced.
    graph: what `trace` returned for it.
    keep: for each group to slice, a boolean mask [size]; groups that are not
      named stay whole.

  Returns:
    The smaller model, of the same class.

  Raises:
    ValueError: for an unknown group, a mask of the wrong length, a group that
      cannot be pruned, or a mask that keeps nothing.
  """
  dropped = _dropped(graph, keep)
  graphdef, flat = marking.flat_state(model)
  flat = [
    (path, _slice_leaf(leaf, dropped.pop(marking.join(path), {})))
    for path, leaf in flat
  ]
  if dropped:
    raise ValueError(f'the model has no variables {sorted(dropped)}')
  result = nnx.merge(graphdef, nnx.from_flat_state(flat))
  for _, module in nnx.iter_modules(result):
    _update_attributes(module)
  return result


def _dropped(graph, keep) -> dict[str, dict[int, np.ndarray]]:
  """Positions to drop: by path, then axis."""
  groups = {group.name: group for group in graph.groups}
  dropped: dict[str, dict[int, np.ndarray]] = {}
  for name, mask in keep.items():
    if name not in groups:
      raise ValueError(f'no channel group {name!r}; groups: {sorted(groups)}')
    mask = _checked_mask(groups[name], mask)
    for part in groups[name].slices if not mask.all() else ():
      axes = dropped.setdefault(part.path, {})
      gone = part.indices[~mask].ravel()
      axes[part.axis] = np.append(axes.get(part.axis, gone[:0]), gone)
  return dropped


def _checked_mask(group, mask) -> np.ndarray:
  mask = np.asarray(mask)
  if mask.shape != (group.size,) or mask.dtype != bool:
    raise ValueError(
      f'group {group.name!r} needs a boolean mask of shape ({group.size},), '
      f'got {mask.dtype} {mask.shape}'
    )
  if not mask.any():
    raise ValueError(f'the mask of group {group.name!r} keeps no channel')
  if group.reason and not mask.all():
    raise ValueError(f'group {group.name!r} cannot be pruned: {group.reason}')
  return mask


def _slice_leaf(leaf, dropped: Mapping[int, np.ndarray]):
  value = marking.value_of(leaf)
  for axis, gone in dropped.items():
    kept = np.setdiff1d(np.arange(value.shape[axis]), gone)
    value = _take(value, kept, axis)
  # Also where nothing is cut: the new model must not share Variables.
  return marking.with_value(leaf, value)


def _take(value, kept, axis):
  if isinstance(value, jax.ShapeDtypeStruct):
    shape = (*value.shape[:axis], len(kept), *value.shape[axis + 1 :])
    return jax.ShapeDtypeStruct(shape, value.dtype)
  return places.pick(lambda v: v[(slice(None),) * axis + (kept,)], value)


def _update_attributes(module):
  """Brings the sizes that a layer remembers in line with its Variables."""
  for kind, update in _UPDATES.items():
    if isinstance(module, kind):
      update(module)


def _set(module, **attributes):
  """Sets what differs, so that untouched modules stay as they are."""
  for name, value in attributes.items():
    if getattr(module, name, None) != value:
      setattr(module, name, value)


def _linear(module):
  *_, n_in, n_out = module.kernel.shape  # of several that are stacked, one
  _set(module, in_features=n_in, out_features=n_out)


def _linear_general(module):
  start = len(module.batch_axis)
  middle = start + len(module.in_features)
  shape = tuple(module.kernel.shape)
  _set(module, in_features=shape[start:middle], out_features=shape[middle:])


def _einsum(module):
  bias = module.bias
  _set(
    module,
    kernel_shape=tuple(module.kernel.shape),
    bias_shape=None if bias is None else tuple(bias.shape),
  )


def _conv(module):
  *_, n_in, n_out = module.kernel.shape
  groups = module.feature_group_count
  if groups > 1 and groups == module.in_features == module.out_features:
    groups = n_out  # depthwise: one group per channel
  _set(
    module,
    kernel_shape=tuple(module.kernel.shape),
    feature_group_count=groups,
    in_features=n_in * groups,
    out_features=n_out,
  )


def _conv_transpose(module):
  *_, n_in, n_out = module.kernel.shape
  if module.transpose_kernel:
    n_in, n_out = n_out, n_in
  _set(
    module,
    kernel_shape=tuple(module.kernel.shape),
    in_features=n_in,
    out_features=n_out,
  )


def _norm(module):
  for name in ('mean', 'scale', 'bias'):
    if isinstance(getattr(module, name, None), nnx.Variable):
      value = getattr(module, name)
      _set(module, num_features=value.shape[-1])
      return


def _group_norm(module):
  for name in ('scale', 'bias'):
    value = getattr(module, name, None)
    if isinstance(value, nnx.Variable) and module.group_size == 1:
      _set(module, num_groups=value.shape[-1])
      return


def _embed(module):
  n, features = module.embedding.shape
  _set(module, num_embeddings=n, features=features)


def _attention(module):
  _set(
    module,
    in_features=module.query.kernel.shape[0],
    in_kv_features=module.key.kernel.shape[0],
    out_features=module.out.kernel.shape[-1],
  )


_UPDATES = {
  nnx.Linear: _linear,
  nnx.LinearGeneral: _linear_general,
  nnx.Einsum: _einsum,
  nnx.Conv: _conv,
  nnx.ConvTranspose: _conv_transpose,
  nnx.BatchNorm: _norm,
  nnx.LayerNorm: _norm,
  nnx.RMSNorm: _norm,
  nnx.InstanceNorm: _norm,
  nnx.GroupNorm: _group_norm,
  nnx.Embed: _embed,
  nnx.MultiHeadAttention: _attention,
}
