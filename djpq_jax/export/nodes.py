"""A graph of ONNX nodes while it is built and simplified, without onnx."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np


class ExportError(ValueError):
  """A model has no form in the format; the message says why in a sentence."""


@dataclasses.dataclass(eq=False)
class Node:
  """One operator.

  Attributes:
    op: its ONNX name.
    inputs: names; '' for one that is left out.
    output: its name.
    attributes: as `onnx.helper.make_node` takes them.
    layer: the quantized layer that it belongs to, or ''.
  """

  op: str
  inputs: list[str]
  output: str
  attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
  layer: str = ''


class Graph:
  """Nodes in the order in which they run, and constants.

  Attributes:
    nodes: in order.
    constants: initializers by name.
    dims: shape of each tensor; a dimension that is not an int is the batch.
    output: name of the result.
  """

  def __init__(self) -> None:
    self.nodes: list[Node] = []
    self.constants: dict[str, np.ndarray] = {}
    self.dims: dict[str, tuple] = {}
    self.output = ''
    self._counts: dict[str, int] = {}

  def name(self, stem: str) -> str:
    """A name that is not taken."""
    count = self._counts[stem] = self._counts.get(stem, -1) + 1
    return f'{stem}_{count}' if count else stem

  def constant(self, array, stem: str = 'constant') -> str:
    """Adds an initializer; returns its name."""
    name = self.name(stem)
    self.constants[name] = np.asarray(array)
    self.dims[name] = np.shape(array)
    return name

  def add(
    self, op: str, inputs: Sequence[str], dims, layer: str = '', **attributes
  ) -> str:
    """Appends a node; returns the name of its output.

    Args:
      op: ONNX name.
      inputs: names.
      dims: shape of the output.
      layer: the layer that it belongs to.
      **attributes: of the operator.
    """
    output = self.name(f'{layer}/{op}' if layer else op)
    self.nodes.append(Node(op, list(inputs), output, attributes, layer))
    self.dims[output] = tuple(dims)
    return output

  def producer(self, name: str) -> Node | None:
    """The node that makes a tensor."""
    return next((n for n in self.nodes if n.output == name), None)

  def consumers(self, name: str) -> list[Node]:
    """The nodes that read a tensor, once for each time."""
    return [n for n in self.nodes for i in n.inputs if i == name]

  def only_consumer(self, name: str) -> Node | None:
    """The one node that reads a tensor; None if it is read elsewhere too."""
    found = self.consumers(name)
    return found[0] if len(found) == 1 and name != self.output else None

  def add_after(self, node: Node, op: str, array, stem: str) -> Node:
    """Puts `op` with a constant between a node and all that read it."""
    added = self.insert_after(node, op)
    added.inputs.append(self.constant(array, stem))
    return added

  def insert_after(self, node: Node, op: str, **attributes) -> Node:
    """Puts `op` between a node and all that read it."""
    output = self.name(f'{node.layer}/{op}')
    added = Node(op, [], output, attributes, node.layer)
    self.dims[output] = self.dims[node.output]
    self.redirect(node.output, output)
    added.inputs.append(node.output)
    self.nodes.insert(self.nodes.index(node) + 1, added)
    return added

  def remove(self, node: Node, instead: str) -> None:
    """Takes a node out; who reads it reads `instead`."""
    self.nodes.remove(node)
    self.redirect(node.output, instead)

  def redirect(self, old: str, new: str) -> None:
    """Who reads `old` reads `new`."""
    for other in self.nodes:
      other.inputs = [new if i == old else i for i in other.inputs]
    if self.output == old:
      self.output = new

  def prune(self) -> None:
    """Drops nodes and constants that the output does not need."""
    needed = {self.output}
    for node in reversed(self.nodes):
      if node.output in needed:
        needed.update(node.inputs)
    self.nodes = [n for n in self.nodes if n.output in needed]
    self.constants = {k: v for k, v in self.constants.items() if k in needed}
