"""What `trace` returns: the MAC layers and the channel groups that tie them."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class MacLayer:
  """A layer that multiplies and accumulates, as the traced model uses it.

  Attributes:
    path: '/'-joined module path, e.g. 'blocks/0/conv1'.
    kind: class name, e.g. 'Conv', 'Linear', 'LinearGeneral', 'Einsum'.
    macs: multiply-accumulates per example of the dense layer, over all calls.
      Zero padding counts; the zeros that a dilated input inserts do not. A
      scan counts all its trips, a while loop one, a cond all its branches.
    calls: how often the model calls the layer in one forward pass.
    weights: kernel elements.
    feature_axis: axis (negative) of the layer's `inputs` that holds the input
      channels; None if several axes are contracted.
    in_axis: kernel axis of the input channels, None if several. The kernel of a
      grouped or depthwise convolution is shorter there than `in_group`.
    out_axes: kernel axes of the output channels, as heads and their features.
    in_group: int [n_in], index into `ChannelGraph.groups` of each input
      channel; -1 where the channel was not traced to a group.
    in_channel: int [n_in], its index inside that group.
    out_group: int [n_out], likewise for the outputs.
    out_channel: int [n_out].
    depthwise: output channel i depends on input channel i and no other.
    first: it reads the model's input, and no activation or embedding with it.
    last: it reaches a model output without passing another MAC layer.
    float_reason: why its kernel cannot become integers; '' if it can.
  """

  path: str
  kind: str
  macs: int
  calls: int
  weights: int
  feature_axis: int | None
  in_axis: int | None
  out_axes: tuple[int, ...]
  in_group: np.ndarray
  in_channel: np.ndarray
  out_group: np.ndarray
  out_channel: np.ndarray
  depthwise: bool
  first: bool
  last: bool
  float_reason: str = ''


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
  """A product outside of the layers: of two activations, or a raw parameter.

  Attributes:
    name: in words what it multiplies.
    macs: multiply-accumulates per example of the dense model.
    axes: (group, channel) of each axis of its result that has channels of
      groups: int [n] each, as `MacLayer.out_group` and `out_channel`.
  """

  name: str
  macs: int
  axes: tuple[tuple[np.ndarray, np.ndarray], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class ParamSlice:
  """The part of one Variable's axis that the channels of a group own.

  Attributes:
    path: '/'-joined path of the Variable, e.g. 'conv1/kernel' or 'bn1/mean'.
    axis: axis of the Variable.
    indices: int [size, k], positions on the axis owned by each channel; k > 1
      after a flatten with spatial extent, or where a channel is read twice.
  """

  path: str
  axis: int
  indices: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelGroup:
  """Channels that can only be cut together, everywhere they appear.

  Attributes:
    name: readable and unique: the producers joined with '+', e.g. 'conv1' or
      'stem+blocks/0/conv2'; 'input' for the model's input.
    size: number of channels.
    slices: what each channel owns in the model's Variables.
    producers: paths of the MAC layers that write the channels.
    consumers: paths of the MAC layers that read them.
    passes: paths of the depthwise layers that pass them through.
    residual: an add joins the outputs of several producers.
    positions: elements per channel and example in the feature map that a
      producer writes (product of the other dimensions), the largest over the
      producers; 1 for a group without a producer.
    reason: '' if channels can be removed, else in words why not.
  """

  name: str
  size: int
  slices: tuple[ParamSlice, ...]
  producers: tuple[str, ...]
  consumers: tuple[str, ...]
  passes: tuple[str, ...]
  residual: bool
  positions: int
  reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelGraph:
  """The MAC layers of a model in execution order, and what ties them.

  Attributes:
    layers: MAC layers by path, in execution order.
    groups: channel groups; `MacLayer.in_group` indexes them.
    products: those outside of the layers.
    arguments: what the model was traced with, by position and by name:
      `jax.ShapeDtypeStruct` in place of arrays, anything else as it is.  None
      where nobody has noted it.
  """

  layers: dict[str, MacLayer]
  groups: tuple[ChannelGroup, ...]
  products: tuple[Product, ...]
  arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None

  @property
  def float_macs(self) -> int:
    """Multiply-accumulates per example of the whole dense model."""
    inside = sum(layer.macs for layer in self.layers.values())
    return inside + sum(product.macs for product in self.products)
