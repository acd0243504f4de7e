"""From solved units to channel groups and MAC layers."""

from collections.abc import Mapping
import dataclasses

import numpy as np

from djpq_jax.graph import records

# Class -> (path, axis) of a Variable -> positions that belong to the class.
_Members = dict[int, dict[tuple[str, int], list[int]]]


@dataclasses.dataclass(frozen=True, eq=False)
class _Classes:
  """Solved units: class of each unit, and what was noted of the classes."""

  roots: np.ndarray
  reasons: Mapping[int, str]
  inputs: frozenset[int]
  sums: frozenset[int]
  read: Mapping[str, frozenset[int]]  # by layer
  written: Mapping[str, frozenset[int]]


def build(found, kinds) -> records.ChannelGraph:
  """Returns the graph that an `interpret.Interpretation` describes."""
  roots, reasons = found.ledger.units.solve()
  uses = found.ledger.uses
  classes = _Classes(
    roots=roots,
    reasons=reasons,
    inputs=_all(roots, found.inputs),
    sums=_all(roots, found.sums),
    read={path: _all(roots, use.in_units) for path, use in uses.items()},
    written={path: _all(roots, use.out_units) for path, use in uses.items()},
  )
  members = _members(found.variables, uses, roots)
  drafts = _drafts(members, uses, classes)
  groups: list[records.ChannelGroup] = []
  index: dict[int, tuple[int, int]] = {}
  for draft in drafts:
    for channel, root in enumerate(draft):
      index[root] = (len(groups), channel)
    groups.append(_group(draft, members, uses, classes))
  layers = {
    path: dataclasses.replace(
      _layer(use, kinds[path], index, roots),
      float_reason=_float_reason(found, path),
    )
    for path, use in uses.items()
  }
  products = tuple(
    records.Product(other.name, other.macs, _axes(other, index, roots))
    for other in found.ledger.others
  )
  return records.ChannelGraph(layers, _unique_names(groups), products)


def _float_reason(found, path: str) -> str:
  """Why a layer's kernel cannot become integers, or '' if it can."""
  ledger = found.ledger
  kernels = ledger.kernels[path]
  if any(len(found.variables[p]) > ledger.ranks[path] for p in kernels):
    return f'{min(kernels)} has the kernels of several layers'
  read = ledger.read.intersection(kernels)
  return (
    f'the model reads {min(read)} outside of the layer, too' if read else ''
  )


def _all(roots, arrays) -> frozenset[int]:
  return frozenset(int(r) for ids in arrays for r in np.unique(roots[ids]))


def _channel_roots(uses, roots) -> np.ndarray:
  ids = [ids for use in uses.values() for ids in use.in_units + use.out_units]
  return np.unique(roots[np.concatenate(ids)])


def _members(variables, uses, roots) -> _Members:
  """For each channel class, its (path, axis, positions) in the Variables."""
  channels = _channel_roots(uses, roots)
  members: _Members = {int(root): {} for root in channels}
  for path, axes in variables.items():
    for axis, ids in enumerate(axes):
      found = roots[ids]
      for position in np.flatnonzero(np.isin(found, channels)):
        owner = members[int(found[position])]
        owner.setdefault((path, axis), []).append(int(position))
  return members


def _drafts(members, uses, classes):
  """Lists of classes that form a group each, in the order of the program."""
  place = _places(uses, classes.roots)
  produced = frozenset().union(*classes.written.values())
  kernels = {f'{path}/kernel' for path in uses}
  drafts: dict[tuple, list[int]] = {}
  for root, owned in members.items():
    has_owner = any(path not in kernels for path, _ in owned)
    if root in produced or root in classes.inputs or has_owner:
      signature = tuple((key, len(where)) for key, where in owned.items())
      drafts.setdefault((root in classes.inputs, signature), []).append(root)
  ordered = [
    sorted(draft, key=lambda root: place[root]) for draft in drafts.values()
  ]
  return sorted(ordered, key=lambda draft: place[draft[0]])


def _places(uses, roots):
  """When and where each class is written first; read, if it is not written."""
  place: dict[int, tuple[int, int]] = {}
  for order, use in enumerate(uses.values()):
    if use.depthwise:
      continue
    for ids in use.out_units:
      for position, root in enumerate(roots[ids]):
        place.setdefault(int(root), (order, position))
  for order, use in enumerate(uses.values()):
    for ids in use.in_units + use.out_units:
      for position, root in enumerate(roots[ids]):
        place.setdefault(int(root), (order - len(uses), position))
  return place


def _group(draft, members, uses, classes):
  writers = [p for p in uses if not classes.written[p].isdisjoint(draft)]
  readers = [p for p in uses if not classes.read[p].isdisjoint(draft)]
  passes = tuple(p for p in writers if uses[p].depthwise)
  producers = tuple(p for p in writers if p not in passes)
  consumers = tuple(p for p in readers if p not in passes)
  is_input = draft[0] in classes.inputs
  slices = tuple(
    records.ParamSlice(
      path, axis, np.asarray([members[root][path, axis] for root in draft])
    )
    for path, axis in members[draft[0]]
  )
  joins = len(producers) + is_input > 1
  reasons = (classes.reasons[r] for r in draft if r in classes.reasons)
  group = records.ChannelGroup(
    name='input' if is_input else '+'.join(producers) or _owner(slices, uses),
    size=len(draft),
    slices=slices,
    producers=producers,
    consumers=consumers,
    passes=passes,
    residual=joins and not classes.sums.isdisjoint(draft),
    positions=max([uses[p].positions for p in producers], default=1),
    reason=next(reasons, ''),
  )
  if not group.reason:
    group = dataclasses.replace(group, reason=_structural(group, uses))
  return group


def _owner(slices, uses) -> str:
  """The first Variable that is no kernel: an embedding, a raw parameter."""
  kernels = {f'{path}/kernel' for path in uses}
  return next(part.path for part in slices if part.path not in kernels)


def _structural(group, uses) -> str:
  """Why channels cannot be removed although nothing in the trace forbids it."""
  if not group.producers:
    return 'no MAC layer produces it'
  if not group.consumers:
    return 'no MAC layer consumes it'
  for path in group.producers:
    if len(uses[path].out_axes) != 1:
      return f'{path} has several output axes'
  for path in group.consumers:
    axes = uses[path].feature_axes
    if len(uses[path].in_axes) != 1 or len(axes) != 1 or None in axes:
      return f'{path} contracts several axes, so its input cannot be gated'
  outputs = {f'{p}/kernel': uses[p].out_axes[0] for p in group.producers}
  for part in group.slices:
    if outputs.get(part.path) == part.axis and part.indices.shape[1] > 1:
      return f'several output channels of {part.path} are tied together'
  return 'has one channel' if group.size == 1 else ''


def _unique_names(groups):
  """Adds '#2', '#3' where producers repeat."""
  count: dict[str, int] = {}
  named = []
  for group in groups:
    n = count[group.name] = count.get(group.name, 0) + 1
    name = group.name if n == 1 else f'{group.name}#{n}'
    named.append(dataclasses.replace(group, name=name))
  return tuple(named)


def _look_up(ids, index, roots):
  """Group and channel of each unit, -1 where it has none."""
  pairs = [index.get(int(r), (-1, -1)) for r in roots[ids]]
  table = np.asarray(pairs, int).reshape(-1, 2)
  return table[:, 0].copy(), table[:, 1].copy()


def _axes(other, index, roots):
  """Those of a product outside of the layers that have channels of groups."""
  axes, positions = [], other.macs
  for ids in other.units:
    group, channel = _look_up(ids, index, roots)
    # Counts stay whole: what was divided by the batch and rounded is no
    # multiple of its channels.
    if (group >= 0).any() and positions % len(group) == 0:
      axes.append((group, channel))
      positions //= len(group)
  return tuple(axes)


def _layer(use, kind, index, roots):
  def look_up(sides):
    if len(sides) != 1:
      untraced = np.full(int(np.prod([len(s) for s in sides])), -1)
      return untraced, untraced.copy()
    return _look_up(sides[0], index, roots)

  in_group, in_channel = look_up(use.in_units)
  out_group, out_channel = look_up(use.out_units)
  axes = use.feature_axes
  return records.MacLayer(
    path=use.path,
    kind=kind,
    macs=use.macs,
    calls=use.calls,
    weights=use.weights,
    feature_axis=next(iter(axes)) if len(axes) == 1 else None,
    in_axis=use.in_axes[0] if len(use.in_axes) == 1 else None,
    out_axes=use.out_axes,
    in_group=in_group,
    in_channel=in_channel,
    out_group=out_group,
    out_channel=out_channel,
    depthwise=use.depthwise,
    first=use.first,
    last=use.last,
  )
