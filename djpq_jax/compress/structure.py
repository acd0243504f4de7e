"""Rules, and what they come to for a traced model."""

from collections.abc import Iterable, Mapping
import dataclasses
import fnmatch
import math
import numbers
from typing import Any

import numpy as np

from djpq_jax import graph as graph_lib

LEAST_KEPT = 8  # one channel in so many stays by default
# Bits up to so many are whole while they are searched.
WHOLE_TO = 3
MAX_BITS = 16  # products of wider integers are no longer exact in float32
# Fields of a rule that are true or false.
FLAGS = (
  'quantize',
  'prune',
  'exponent',
  'per_channel',
  'narrow_range',
  'asymmetric',
  'mid_rise',
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """What to do with the layers whose path matches; None leaves a default.

  Rules apply in order, so a later one overrides an earlier one field by field.

  Attributes:
    pattern: shell-style pattern of layer paths, as 'blocks/*/conv1' or '*'.
    quantize: False leaves the layer's operands in float32.
    weight_bits: smallest and largest bits of the kernel, within [1, 16].
      Default: 2 to 8, or 1 to 8 as `resolve` says.
    act_bits: smallest and largest bits of the input, within [1, 16].
      Default: 2 to 8, and 8 for what reads the model's input.
    prune: whether the layer's output channels may be removed.  Default: yes,
      but not channels that a residual add ties to other layers.
    align: kept channels come in multiples of this.
    min_channels: channels that are always kept.  Default: an eighth.
    exponent: whether the kernel's quantizer learns an exponent.  Default: no.
    per_channel: one weight grid per output channel instead of one per kernel,
      from the freeze on; while bits are searched a kernel has one.
    narrow_range: whether the grids of the kernel and of a signed input have as
      many levels below zero as above it.  Default: no, they have one more
      below; grids that have eight bits or more once they are fixed, or an
      exponent, have not.
    asymmetric: whether the grid of an input that reaches less than half as far
      below zero as above, as after gelu or swish, has fewer levels there.
      Default: yes, but not where `narrow_range` asks for as many, nor where
      eight bits or more are fixed.
    mid_rise: whether a kernel that gets two bits has its levels half a step
      beside whole steps, -3/2, -1/2, 1/2 and 3/2, in place of -2 to 1.
      Default: yes, but not where `narrow_range` or `exponent` is, nor where a
      kernel is masked, a channel or a hundredth of it zero: such a kernel has
      two bits at least, since of one bit no level can be at zero.
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
  narrow_range: bool | None = None
  asymmetric: bool | None = None
  mid_rise: bool | None = None

  def __post_init__(self):
    if not isinstance(self.pattern, str):
      raise ValueError(f'a pattern must be text, got {self.pattern!r}')
    for name in ('weight_bits', 'act_bits'):
      right = _are_bounds(getattr(self, name))
      what = f'(min, max) with 1 <= min <= max <= {MAX_BITS}'
      self._check(name, right, f'{what}, a whole number within')
    for name in ('align', 'min_channels'):
      value = getattr(self, name)
      whole = _is_a(numbers.Integral, value) and value >= 1
      self._check(name, whole, 'a whole number, at least 1')
    for name in FLAGS:
      # Of a text, that of 'False' too, Python would take the truth for True.
      flag = isinstance(getattr(self, name), (bool, np.bool_))
      self._check(name, flag, 'True or False')

  def _check(self, name: str, right: bool, what: str) -> None:
    value = getattr(self, name)
    if value is not None and not right:
      raise ValueError(
        f'{name} of the rule for {self.pattern!r} must be {what}, got {value!r}'
      )


def _are_bounds(bits: Any) -> bool:
  """Whether these are the smallest and the largest bits, both within range."""
  if not isinstance(bits, (tuple, list)) or len(bits) != 2:
    return False
  if not all(_is_a(numbers.Real, b) for b in bits):
    return False
  if not 1 <= bits[0] <= bits[1] <= MAX_BITS:
    return False
  return math.ceil(bits[0]) <= bits[1]  # a plan has whole bits


def _is_a(kind: type, value: Any) -> bool:
  """Whether a value is a number of a kind; True and False are none."""
  return isinstance(value, kind) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSettings:
  """The rules' outcome for one layer; fields as in `Rule`."""

  quantize: bool = True
  weight_bits: tuple[float, float] = (2, 8)
  act_bits: tuple[float, float] = (2, 8)
  prune: bool | None = None
  align: int = 1
  min_channels: int | None = None
  exponent: bool = False
  per_channel: bool = False
  narrow_range: bool = False
  asymmetric: bool = True
  mid_rise: bool = True

  @property
  def may_lack_zero(self) -> bool:
    """Whether a grid of the kernel may do without a level at zero."""
    return self.mid_rise and not (self.narrow_range or self.exponent)


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
      # As hexadecimal digits, the first channel in the highest bit.
      'open': {k: np.packbits(v).tobytes().hex() for k, v in self.open.items()},
      'size': {k: len(v) for k, v in self.open.items()},
      'weight_bits': dict(self.weight_bits),
      'act_bits': dict(self.act_bits),
    }

  @classmethod
  def from_json(cls, tree: Mapping[str, Any]) -> 'Plan':
    """Reads what `to_json` wrote."""
    masks = {}
    for name, digits in tree['open'].items():
      packed = np.frombuffer(bytes.fromhex(digits), np.uint8)
      masks[name] = np.unpackbits(packed)[: tree['size'][name]].astype(bool)
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


def resolve(
  graph: graph_lib.ChannelGraph,
  rules: Iterable[Rule],
  *,
  one_bit: bool = False,
) -> Structure:
  """Applies the rules to a traced model.

  Defaults: kernels 2 to 8 bits, inputs 2 to 8 bits, but 8 for the layers that
  read the model's input, which is an image; channels of a residual stream
  stay; channels that the graph cannot prune stay, with its reason.

  Args:
    graph: from `graph.trace`.
    rules: see `Rule`.
    one_bit: whether kernels have 1 to 8 bits by default, where they need no
      level at zero.

  Raises:
    TypeError: what should be rules is none.
    ValueError: a rule matches no layer, and the message lists the layers; or a
      layer is to be quantized whose kernel cannot become integers.
  """
  if rules is None or isinstance(rules, Rule):
    raise TypeError(f'rules are several Rules, as [Rule(...)], not {rules!r}')
  rules = tuple(rules)
  for rule in rules:
    if not isinstance(rule, Rule):
      raise TypeError(f'a rule is a compress.Rule, not {rule!r}')
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
  settings = {p: _settings(l, rules, one_bit) for p, l in graph.layers.items()}
  groups = tuple(_group_settings(g, settings) for g in graph.groups)
  return Structure(graph, settings, groups)


def _settings(layer: graph_lib.MacLayer, rules, one_bit: bool) -> LayerSettings:
  fields: dict[str, Any] = {}
  if layer.first:
    fields['act_bits'] = (8, 8)
  for rule in rules:
    if fnmatch.fnmatchcase(layer.path, rule.pattern):
      given = dataclasses.asdict(rule)
      del given['pattern']
      fields |= {k: v for k, v in given.items() if v is not None}
  settings = LayerSettings(**fields)
  if one_bit and 'weight_bits' not in fields and settings.may_lack_zero:
    settings = dataclasses.replace(settings, weight_bits=(1, 8))
  _check_least_bits(layer.path, settings)
  if layer.float_reason and settings.quantize:
    raise ValueError(
      f'{layer.path} cannot be quantized, since {layer.float_reason}; a rule '
      f'with pattern={layer.path!r}, quantize=False and prune=False leaves it '
      'as it is'
    )
  return settings


def _check_least_bits(path: str, settings: LayerSettings) -> None:
  one_bit = settings.quantize and settings.weight_bits[0] < 2
  if one_bit and not settings.may_lack_zero:
    raise ValueError(
      f'{path} cannot have weight_bits={settings.weight_bits}: of less than '
      'two bits no level is at zero, and mid_rise=False, narrow_range=True or '
      'exponent=True asks for one; take that back, or begin at two bits'
    )


def _group_settings(group, settings) -> GroupSettings:
  makers = [settings[p] for p in group.producers + group.passes]
  reason = group.reason
  if not reason and any(s.prune is False for s in makers):
    reason = 'a rule keeps its channels'
  allowed = makers and all(s.prune for s in makers)
  if not reason and group.residual and not allowed:
    reason = 'residual stream, kept by default; a rule can allow it'
  # Costs are products of neighbouring widths, so all widths but one could
  # shrink to a single channel at no further cost: a bottleneck that nothing
  # passes.  An eighth of each group is what keeps that from paying.
  default = -(-group.size // LEAST_KEPT)
  least = max((s.min_channels or default for s in makers), default=1)
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


def open_masks(structure: Structure) -> list[np.ndarray]:
  """Which channels of each group are left, bool [size] per group."""
  plan = structure.plan.open if structure.plan else {}
  return [
    np.asarray(plan.get(g.name, np.ones(g.size, bool)))
    for g in structure.groups
  ]
