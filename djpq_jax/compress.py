"""Rules, and the surgery that turns a model into a compressible one.

`compress` attaches gates and quantizers to a copy of any nnx model, `usage`
says what each layer costs now, and `freeze` carries a `Plan` out: channels are
cut, bits are fixed, and what is left is a smaller model to finetune.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import fnmatch
import fractions
import math
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from djpq_jax import cost
from djpq_jax import graph as graph_lib
from djpq_jax import layers

FLOAT_BITS = 32
MAX_BITS = 16  # products of wider integers are no longer exact in float32
CLIP_PERCENTILE = 99.9
CLIP_SAMPLES = 100_000  # values of a tensor that a clip is fitted to


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """What to do with the layers whose path matches; None leaves a default.

  Rules apply in order, so a later one overrides an earlier one field by field.

  Attributes:
    pattern: shell-style pattern of layer paths, as 'blocks/*/conv1' or '*'.
    quantize: False leaves the layer's operands in float32.
    weight_bits: smallest and largest bits of the kernel, within [2, 16].
    act_bits: smallest and largest bits of the input, within [1, 16].
    prune: whether the layer's output channels may be removed.  Default: yes,
      but not channels that a residual add ties to other layers.
    align: kept channels come in multiples of this.
    min_channels: channels that are always kept.
    exponent: whether the kernel's quantizer learns an exponent.  Default: no.
    per_channel: one weight grid per output channel instead of one per kernel.
  """

  pattern: str
  quantize: bool | None = None
  weight_bits: tuple[float, float] | None = None
  act_bits: tuple[float, float] | None = None
  prune: bool | None = None
  align: int | None = None
  min_channels: int | None = None
  exponent: bool | None = None
  per_channel: bool | None = None

  def __post_init__(self):
    for name, low in (('weight_bits', 2), ('act_bits', 1)):
      bits = getattr(self, name)
      if bits is not None and not (
        len(bits) == 2 and low <= bits[0] <= bits[1] <= MAX_BITS
      ):
        raise ValueError(
          f'{name} of the rule for {self.pattern!r} must be (min, max) with '
          f'{low} <= min <= max <= {MAX_BITS}, got {bits}'
        )
    for name in ('align', 'min_channels'):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(
          f'{name} of the rule for {self.pattern!r} must be at least 1, '
          f'got {value}'
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSettings:
  """The rules' outcome for one layer; fields as in `Rule`."""

  quantize: bool = True
  weight_bits: tuple[float, float] = (2, 8)
  act_bits: tuple[float, float] = (2, 8)
  prune: bool | None = None
  align: int = 1
  min_channels: int = 1
  exponent: bool = False
  per_channel: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupSettings:
  """What the rules allow for one channel group."""

  name: str
  size: int
  align: int
  min_channels: int
  reason: str  # '' if its channels may be removed, else why not


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What is kept: open channels per group and whole bits per tensor.

  Attributes:
    open: group name -> bool [size]; groups not named stay whole.
    weight_bits: layer path -> bits of its kernel.
    act_bits: layer path -> bits of its input.
  """

  open: Mapping[str, np.ndarray]
  weight_bits: Mapping[str, int]
  act_bits: Mapping[str, int]

  def to_json(self) -> dict[str, Any]:
    """Returns the plan as JSON-ready lists and numbers."""
    return {
      'open': {k: np.flatnonzero(v).tolist() for k, v in self.open.items()},
      'size': {k: len(v) for k, v in self.open.items()},
      'weight_bits': dict(self.weight_bits),
      'act_bits': dict(self.act_bits),
    }

  @classmethod
  def from_json(cls, tree: Mapping[str, Any]) -> 'Plan':
    """Reads what `to_json` wrote."""
    masks = {k: np.zeros(tree['size'][k], bool) for k in tree['open']}
    for name, kept in tree['open'].items():
      masks[name][kept] = True
    bits = {k: dict(tree[k]) for k in ('weight_bits', 'act_bits')}
    return cls(open=masks, **bits)


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
  """The static facts of a compressed model.

  Attributes:
    graph: layers and channel groups of the dense model.
    layers: layer path -> settings.
    groups: settings of every channel group, in the graph's order.
    plan: what was carried out, or None while everything is still open.
  """

  graph: graph_lib.ChannelGraph
  layers: Mapping[str, LayerSettings]
  groups: tuple[GroupSettings, ...]
  plan: Plan | None = None

  @property
  def gated(self) -> tuple[int, ...]:
    """Indices of the groups that have gates, in the order of the gates."""
    return tuple(i for i, g in enumerate(self.groups) if not g.reason)


class Compressed(nnx.Module):
  """A model with gates and quantizers; called like the model it wraps."""

  def __init__(self, model, gates: Sequence[layers.Gate], structure: Structure):
    self.model = model
    self.gates = nnx.List(gates)
    self.structure = structure

  def __call__(self, *args, gate_key=None, **kwargs):
    """Calls the model.

    Args:
      *args: the model's arguments; the first one is the batch.
      gate_key: draws noisy gates, one per example; without it the gates are
        at their means and closed ones at 0.
      **kwargs: passed on.
    """
    if gate_key is None:
      values = [gate.mean() for gate in self.gates]
    else:
      keys = jax.random.split(gate_key, max(1, len(self.gates)))
      batch = jax.tree.leaves(args)[0].shape[0]
      values = [g.sample(k, batch) for g, k in zip(self.gates, keys)]
    with layers.scope(values):
      return self.model(*args, **kwargs)


class Hook(NamedTuple):
  """A layer that carries operands, with its path."""

  path: str
  layer: nnx.Module
  operands: layers.Operands


def eval_view(model):
  """`model` as it is used for prediction, sharing its arrays."""
  return nnx.view(
    model,
    deterministic=True,
    use_running_average=True,
    raise_if_not_found=False,
  )


def train_view(model):
  """`model` as it is trained, sharing its arrays."""
  return nnx.view(
    model,
    deterministic=False,
    use_running_average=False,
    raise_if_not_found=False,
  )


def layer_modules(model) -> dict[str, nnx.Module]:
  """The layers that multiply and accumulate, by path."""
  return {
    '/'.join(map(str, path)): module
    for path, module in nnx.iter_modules(model)
    if hasattr(module, 'promote_dtype') and hasattr(module, 'kernel')
  }


def hooks(model: Compressed) -> Iterator[Hook]:
  """The layers of a compressed (or hardened) model that carry operands."""
  modules = layer_modules(model.model)
  for path in model.structure.graph.layers:
    operands = modules[path].promote_dtype
    if isinstance(operands, layers.Operands):
      yield Hook(path, modules[path], operands)


def resolve(
  graph: graph_lib.ChannelGraph, rules: Iterable[Rule]
) -> Structure:
  """Applies the rules to a traced model.

  Defaults: kernels 2 to 8 bits, inputs 2 to 8 bits, but 8 for the layers that
  read the model's input, which is an image; channels of a residual stream
  stay; channels that the graph cannot prune stay, with its reason.

  Raises:
    ValueError: a rule matches no layer; the message lists the layers.
  """
  rules = tuple(rules)
  unused = [
    rule.pattern
    for rule in rules
    if not any(fnmatch.fnmatchcase(p, rule.pattern) for p in graph.layers)
  ]
  if unused:
    raise ValueError(
      f'rules match no layer: {", ".join(unused)}; the layers are '
      f'{", ".join(graph.layers)}'
    )
  settings = {p: _settings(l, rules) for p, l in graph.layers.items()}
  groups = tuple(_group_settings(g, settings) for g in graph.groups)
  return Structure(graph, settings, groups)


def _settings(layer: graph_lib.MacLayer, rules) -> LayerSettings:
  fields: dict[str, Any] = {}
  if layer.first:
    fields['act_bits'] = (8, 8)
  for rule in rules:
    if fnmatch.fnmatchcase(layer.path, rule.pattern):
      given = dataclasses.asdict(rule)
      del given['pattern']
      fields |= {k: v for k, v in given.items() if v is not None}
  return LayerSettings(**fields)


def _group_settings(group, settings) -> GroupSettings:
  makers = [settings[p] for p in group.producers + group.passes]
  reason = group.reason
  if not reason and any(s.prune is False for s in makers):
    reason = 'a rule keeps its channels'
  allowed = makers and all(s.prune for s in makers)
  if not reason and group.residual and not allowed:
    reason = 'residual stream, kept by default; a rule can allow it'
  least = max((s.min_channels for s in makers), default=1)
  align = math.lcm(*(s.align for s in makers))
  if not reason and -(-least // align) * align >= group.size:
    reason = f'min_channels={least} and align={align} leave nothing to remove'
  return GroupSettings(
    name=group.name,
    size=group.size,
    align=align,
    min_channels=-(-least // align) * align,
    reason=reason,
  )


def compress(model, rules: Iterable[Rule] = (), x=None, *, bits: float = 8.0):
  """Attaches gates and quantizers to a copy of a model.

  Args:
    model: any nnx model, trained or not; it is left as it is.
    rules: what differs from the defaults, see `Rule` and `resolve`.
    x: a batch of real inputs, or a tuple of arguments: activations are
      calibrated on it.
    bits: bits that every grid begins with, within its bounds.

  Returns:
    A `Compressed` model that computes nearly what `model` does.

  Raises:
    ValueError: a rule matches no layer, `x` is missing or not finite, or the
      model cannot be traced.
  """
  args = x if isinstance(x, tuple) else (x,)
  if x is None or any(isinstance(a, jax.ShapeDtypeStruct) for a in args):
    raise ValueError(
      'compress needs a batch of real inputs x, to calibrate activations on'
    )
  for leaf in jax.tree.leaves(args):
    if not np.all(np.isfinite(np.asarray(leaf, np.float32))):
      raise ValueError('the calibration batch has values that are not finite')
  view = eval_view(model)
  structure = resolve(graph_lib.trace(view, *args), rules)
  compressed = assemble(model, structure, bits)
  calibrate(compressed, *args)
  return compressed


def assemble(model, structure: Structure, bits: float = 8.0) -> Compressed:
  """Attaches operands as `structure` says; activations are not calibrated."""
  model = nnx.clone(model)
  modules = layer_modules(model)

  def weight(path):
    settings = structure.layers[path]
    if not settings.quantize:
      return None
    out_axis = structure.graph.layers[path].out_axis
    kernel = modules[path].kernel[...]
    return layers.Quantizer(
      _weight_clip(kernel, out_axis if settings.per_channel else None),
      float(np.clip(bits, *settings.weight_bits)),
      signed=True,
      bounds=settings.weight_bits,
      learn_exponent=settings.exponent,
    )

  def act(path):
    settings = structure.layers[path]
    if not settings.quantize:
      return None
    return _act_quantizer(settings, bits, 1.0, signed=True)

  attach_operands(model, structure, weight, act)
  gates = [
    layers.Gate(g.size, min_open=g.min_channels)
    for g in (structure.groups[i] for i in structure.gated)
  ]
  return Compressed(model, gates, structure)


def attach_operands(
  model,
  structure: Structure,
  weight: Callable[[str], nnx.Module | None],
  act: Callable[[str], nnx.Module | None],
) -> None:
  """Puts a hook on every layer that multiplies and accumulates, in place.

  Args:
    model: the model inside of a `Compressed`, cut as `structure` says.
    structure: tells which gates a layer's input has.
    weight: makes the quantizer of a layer's kernel, given its path.
    act: makes the quantizer of a layer's input.
  """
  modules = layer_modules(model)
  for path, layer in structure.graph.layers.items():
    promote = modules[path].promote_dtype
    if isinstance(promote, layers.Operands):
      promote = promote.promote
    operands = layers.Operands(
      path,
      weight=weight(path),
      act=act(path),
      gate=_gate_index(layer, structure),
      feature_axis=layer.feature_axis,
      promote=promote,
    )
    modules[path].promote_dtype = nnx.data(operands)


def _weight_clip(kernel, out_axis: int | None):
  axes = tuple(a for a in range(kernel.ndim) if a != out_axis)
  if out_axis is None:
    axes = tuple(range(kernel.ndim))
  largest = jnp.max(jnp.abs(kernel), axis=axes, keepdims=out_axis is not None)
  return jnp.where(largest > 0, largest, 1.0)


def _act_quantizer(settings, bits, clip, *, signed) -> layers.Quantizer:
  bounds = settings.act_bits
  if signed:  # a sign and one magnitude need two bits
    bounds = (max(2, bounds[0]), max(2, bounds[1]))
  return layers.Quantizer(
    clip, float(np.clip(bits, *bounds)), signed=signed, bounds=bounds
  )


def _gate_index(layer, structure: Structure) -> layers.GateIndex | None:
  """Finds the gates of a layer's inputs in what is left of its groups."""
  if layer.depthwise:  # passes its group on: the next layer gates it
    return None
  group, channel = _left(layer.in_group, layer.in_channel, structure)
  gates = tuple(
    k for k, g in enumerate(structure.gated) if np.any(group == g)
  )
  if not gates:
    return None
  sizes = _sizes_left(structure)
  index = np.zeros(len(group), int)
  start = 1
  for k in gates:
    g = structure.gated[k]
    index = np.where(group == g, start + channel, index)
    start += sizes[g]
  whole = len(gates) == 1 and np.array_equal(index, np.arange(1, start))
  return layers.GateIndex(gates, None if whole else index)


def open_masks(structure: Structure) -> list[np.ndarray]:
  """Which channels of each group are left, bool [size] per group."""
  plan = structure.plan.open if structure.plan else {}
  return [
    np.asarray(plan.get(g.name, np.ones(g.size, bool)))
    for g in structure.groups
  ]


def _sizes_left(structure: Structure) -> list[int]:
  return [int(mask.sum()) for mask in open_masks(structure)]


def _left(group, channel, structure: Structure):
  """Drops removed channels from a layer's channel map and renumbers the rest."""
  masks = open_masks(structure)
  kept = np.ones(len(group), bool)
  renumbered = np.array(channel)
  for g in np.unique(group[group >= 0]):
    at = group == g
    kept[at] = masks[g][channel[at]]
    renumbered[at] = (np.cumsum(masks[g]) - 1)[channel[at]]
  return group[kept], renumbered[kept]


def calibrate(model: Compressed, *args, percentile: float = CLIP_PERCENTILE):
  """Sets every input quantizer's sign and clip from one batch, in place.

  The clip is a percentile of the magnitudes that enter the layer.
  """
  taps = inputs_of(model, *args)
  for path, _, operands in hooks(model):
    if operands.act is None:
      continue
    values = [np.asarray(v, np.float32) for v in taps.get(path, [])]
    if not values:
      continue
    x = np.concatenate([v.ravel() for v in values])
    clip = np.percentile(np.abs(x), percentile) or np.abs(x).max() or 1.0
    settings = model.structure.layers[path]
    bits = operands.act.bits()
    signed = bool(x.min() < 0)
    operands.act = nnx.data(
      _act_quantizer(settings, round(float(bits)), clip, signed=signed)
    )


def inputs_of(model: Compressed, *args) -> dict[str, list[jax.Array]]:
  """What enters each layer in prediction, gated, before its quantizer."""
  graphdef, state = nnx.split(eval_view(model))

  @jax.jit
  def run(state, args):
    with layers.tap() as taps:
      nnx.merge(graphdef, state)(*args)
    return taps

  return run(nnx.as_pure(state), args)


def usage(model: Compressed) -> list[cost.LayerUse]:
  """What each layer costs now, differentiable in gates and quantizers.

  Products outside of layers, as in attention, count as 32 x 32 bits.
  """
  structure = model.structure
  masks = open_masks(structure)
  keep: list[Any] = [np.float32(1)] * len(masks)
  for g, mask in enumerate(masks):
    keep[g] = mask.astype(np.float32)
  if structure.plan is None:
    for g, gate in zip(structure.gated, model.gates):
      keep[g] = gate.keep()
  found = {path: operands for path, _, operands in hooks(model)}
  uses = []
  for path, layer in structure.graph.layers.items():
    operands = found.get(path)
    uses.append(
      cost.LayerUse(
        name=path,
        macs=layer.macs,
        weights=layer.weights,
        keep_in=_share(layer.in_group, layer.in_channel, keep),
        keep_out=1.0
        if layer.depthwise
        else _share(layer.out_group, layer.out_channel, keep),
        weight_bits=_bits(operands.weight if operands else None),
        act_bits=_bits(operands.act if operands else None),
      )
    )
  return uses + _other_uses(structure.graph)


def _other_uses(graph) -> list[cost.LayerUse]:
  return [
    cost.LayerUse(
      name=name,
      macs=macs,
      weights=0,
      keep_in=1.0,
      keep_out=1.0,
      weight_bits=float(FLOAT_BITS),
      act_bits=float(FLOAT_BITS),
    )
    for name, macs in graph.other_macs
  ]


def _bits(quantizer):
  return float(FLOAT_BITS) if quantizer is None else quantizer.bits()


def _share(group, channel, keep):
  """Mean of the kept fractions of a layer's channels; untraced ones are kept."""
  total = 0.0
  for g in np.unique(group):
    count = np.bincount(channel[group == g])
    if g < 0:
      total += float(count.sum())
    else:
      weights = np.zeros(len(keep[g]), np.float32)
      weights[: len(count)] = count
      total += jnp.dot(jnp.asarray(keep[g]), weights)
  return total / len(group)


def planned_usage(structure: Structure, plan: Plan) -> list[cost.LayerUse]:
  """What each layer costs under a plan, in exact whole numbers."""
  masks = open_masks(dataclasses.replace(structure, plan=plan))

  def share(group, channel):
    kept = sum(
      int(masks[g][c]) if g >= 0 else 1 for g, c in zip(group, channel)
    )
    return fractions.Fraction(kept, len(group))

  one = fractions.Fraction(1)
  uses = [
    cost.LayerUse(
      name=path,
      macs=layer.macs,
      weights=layer.weights,
      keep_in=share(layer.in_group, layer.in_channel),
      keep_out=one
      if layer.depthwise
      else share(layer.out_group, layer.out_channel),
      weight_bits=plan.weight_bits.get(path, FLOAT_BITS),
      act_bits=plan.act_bits.get(path, FLOAT_BITS),
    )
    for path, layer in structure.graph.layers.items()
  ]
  exact = {'keep_in': one, 'keep_out': one, 'weight_bits': 32, 'act_bits': 32}
  return uses + [
    dataclasses.replace(u, **exact) for u in _other_uses(structure.graph)
  ]


def freeze(model: Compressed, plan: Plan, *args) -> Compressed:
  """Carries a plan out: cuts channels and fixes bits.

  Args:
    model: a compressed model whose channels are all still there.
    plan: open channels per group and bits per layer.
    *args: a batch of inputs, on which each grid's clip is fitted to its bits.

  Returns:
    A new, smaller `Compressed` model.  Its gates are the kept channels'
    means, now learned scales without noise; its quantizers keep their bits.
  """
  structure = dataclasses.replace(model.structure, plan=plan)
  inner = graph_lib.slice_channels(
    model.model, structure.graph, dict(plan.open)
  )
  gates = []
  for g, gate in zip(structure.gated, model.gates):
    mask = open_masks(structure)[g]
    scale = gate.mu[...][np.flatnonzero(mask)]
    gates.append(layers.Gate(int(mask.sum()), scale=scale, noisy=False))
  frozen = Compressed(inner, gates, structure)
  found = {path: operands for path, _, operands in hooks(frozen)}
  attach_operands(
    inner, structure, lambda p: found[p].weight, lambda p: found[p].act
  )
  inputs = inputs_of(frozen, *args)
  for path, module, operands in hooks(frozen):
    if operands.weight is None:
      continue
    operands.weight = nnx.data(
      _fixed(operands.weight, plan.weight_bits[path], module.kernel[...])
    )
    operands.act = nnx.data(
      _fixed(operands.act, plan.act_bits[path], *inputs[path])
    )
  return frozen


def _fixed(quantizer, bits: int, *tensors) -> layers.Quantizer:
  """The quantizer at `bits`, its clip the one of least squared error."""
  _, clip, exponent = quantizer.grid()
  clip = np.asarray(clip)
  if quantizer.log_exponent is None:  # else the grid is no copy of the tensor
    clip = _best_clip(clip, 2.0 ** (bits - quantizer.signed) - 1, tensors)
  return layers.Quantizer(
    clip,
    bits,
    signed=quantizer.signed,
    bounds=(bits, bits),
    learn_exponent=quantizer.log_exponent is not None,
    fixed=True,
    exponent=exponent,
  )


def _best_clip(clip: np.ndarray, levels: float, tensors) -> np.ndarray:
  """Searches a factor on the clip, for each grid of its own."""
  if clip.ndim:  # one grid per output channel: one column each
    x = np.asarray(tensors[0], np.float32).reshape(-1, clip.size)
  else:
    x = np.concatenate([np.ravel(np.asarray(t, np.float32)) for t in tensors])
    x = x[:: max(1, x.size // CLIP_SAMPLES), None]
  best, least = clip.ravel(), np.full(clip.size, np.inf, np.float32)
  for scale in np.geomspace(0.2, 1.5, 32):
    edge = clip.ravel() * np.float32(scale)
    step = edge / np.float32(levels)
    rounded = step * np.round(np.clip(x, -edge, edge) / step)
    error = np.square(rounded - x).sum(axis=0)
    best = np.where(error < least, edge, best)
    least = np.minimum(error, least)
  return best.reshape(clip.shape)
