"""Walks a marked jaxpr and propagates channel identity through it."""

from collections.abc import Sequence
import dataclasses
import itertools

from jax.extend import core as jex_core
import jax.numpy as jnp
import numpy as np

from djpq_jax import calls
from djpq_jax.graph import arrays
from djpq_jax.graph import labels
from djpq_jax.graph import layout
from djpq_jax.graph import products
from djpq_jax.graph import units as units_lib

CONSTANT = 'combined with a constant array of fixed size'
BARE = 'combined with an array of the model that is no float Variable'


@dataclasses.dataclass(frozen=True, eq=False)
class Interpretation:
  """What one walk over a program found.

  Attributes:
    ledger: units and products.
    variables: labels of the axes of each float Variable, by path.
    inputs: units of the channels of the model's inputs.
    sums: units that an add joins from different layers.
  """

  ledger: products.Ledger
  variables: dict[str, tuple[np.ndarray, ...]]
  inputs: list[np.ndarray]
  sums: list[np.ndarray]


class Interpreter:
  """Evaluates a jaxpr on `Traced` values instead of arrays."""

  def __init__(self, batch: int):
    self.units = units_lib.Units()
    self.ledger = products.Ledger(self.units, batch)
    self.sums: list[np.ndarray] = []
    self._calls = itertools.count()

  def constant(self, value, reason=CONSTANT) -> arrays.Traced:
    """A constant can be combined with any extent only if it has none."""
    shape = tuple(getattr(value, 'shape', ()))
    axes = tuple(
      self.units.opaque(n, reason) if n != 1 else None for n in shape
    )
    return arrays.Traced(shape, axes)

  def run(self, closed, operands, repeat=1) -> list[arrays.Traced]:
    """Evaluates a jaxpr; `repeat` counts the trips of loops around it."""
    jaxpr = getattr(closed, 'jaxpr', closed)
    env = {}
    for var, value in zip(
      jaxpr.constvars, getattr(closed, 'consts', ()), strict=True
    ):
      env[var] = self.constant(value)
    env.update(zip(jaxpr.invars, operands, strict=True))

    def read(atom):
      if isinstance(atom, jex_core.Literal):
        return self.constant(atom.val)
      return env[atom]

    for eqn in jaxpr.eqns:
      outputs = self.equation(eqn, [read(x) for x in eqn.invars], repeat)
      env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(x) for x in jaxpr.outvars]

  def equation(self, eqn, operands, repeat) -> list[arrays.Traced]:
    """Finds the rule of one equation and applies it."""
    name = eqn.primitive.name
    if name == 'mac_operands':
      return self._mark(eqn, operands)
    if name == 'dot_general':
      return products.dot_general(self.ledger, eqn, operands, repeat)
    if name == 'conv_general_dilated':
      return products.conv_general_dilated(self.ledger, eqn, operands, repeat)
    if name in calls.PRIMITIVES:
      inner = eqn.params.get('call_jaxpr', eqn.params.get('jaxpr'))
      return self.run(inner, operands, repeat)
    if name in ('scan', 'while', 'cond'):
      return self._control_flow(eqn, operands, repeat)
    if name in ('add', 'add_any'):
      self._note_sum(operands)
    rule = labels.RULES.get(name, labels.opaque)
    return rule(self.units, eqn, operands)

  def _mark(self, eqn, operands):
    layer, call = eqn.params['layer'], next(self._calls)
    inputs, kernel = operands
    self.ledger.read.update(inputs.params)
    self.ledger.kernels.setdefault(layer, set()).update(kernel.params)
    self.ledger.ranks[layer] = eqn.params['rank']
    if eqn.params['rank'] < len(kernel.shape):
      # A gate's values would be mapped with the kernels.
      for axis in inputs.axes:
        self.units.freeze(axis, f'read by several layers at once, as {layer}')
    tagged = []
    roles = (('inputs', eqn.params['mapped']), ('kernel', ()))
    for x, (role, mapped) in zip(operands, roles, strict=True):
      physical = range(len(x.shape))
      seen = [d for d in physical if d not in mapped]
      axes = tuple(map(dict(zip(seen, itertools.count())).get, physical))
      tag = arrays.Tag(layer, call, role, len(seen), axes)
      tagged.append(dataclasses.replace(x, tag=tag))
    return tagged

  def _note_sum(self, operands):
    """Remembers the channels in which outputs of different layers add up."""
    a, b = operands
    if not (a.sources and b.sources) or a.sources == b.sources:
      return
    if len(a.shape) == len(b.shape):
      pairs = zip(a.axes, b.axes, strict=True)
      self.sums += [x for x, y in pairs if x is not None and y is not None]

  def _control_flow(self, eqn, operands, repeat):
    """Freezes what goes in, and counts the products inside."""
    name = eqn.primitive.name
    if name != 'cond' and any(x.batched for x in operands):
      # What a loop carries gets the batch axis as it goes.
      operands = [dataclasses.replace(x, batched=True) for x in operands]
    reason = f'goes through a {name}, which runs its body as a whole'
    outputs = labels.opaque(self.units, eqn, operands, reason)
    if name == 'scan':
      ways = [self._scan(eqn, operands, repeat)]
    elif name == 'while':
      skip = eqn.params['cond_nconsts']
      ways = [self.run(eqn.params['body_jaxpr'], operands[skip:], repeat)]
    else:
      branches = eqn.params['branches']
      ways = [self.run(branch, operands[1:], repeat) for branch in branches]
    found = _layers_inside(self.ledger, eqn)
    return [
      dataclasses.replace(
        x,
        sources=x.sources | found,
        # Not those of all operands, which are the kernels inside, too.
        params=arrays.heritage(inner)['params'],
      )
      for x, *inner in zip(outputs, *ways, strict=True)
    ]

  def _scan(self, eqn, operands, repeat) -> list[arrays.Traced]:
    """Runs the body on one step; jax versions differ in how they tell which."""
    body = eqn.params['jaxpr']
    variables = getattr(body, 'jaxpr', body).invars
    steps = []
    for x, var in zip(operands, variables, strict=True):
      if len(x.shape) > len(var.aval.shape):
        x = dataclasses.replace(x, shape=x.shape[1:], axes=x.axes[1:], tag=None)
      steps.append(x)
    return self.run(body, steps, repeat * eqn.params['length'])


def _layers_inside(ledger, eqn):
  """Paths of the layers whose operands are marked inside of an equation."""
  found = set()
  for jaxpr in jex_core.jaxprs_in_params(eqn.params):
    for inner in jaxpr.eqns:
      if inner.primitive.name == 'mac_operands':
        found.add(inner.params['layer'])
      found |= _layers_inside(ledger, inner)
  return frozenset(found & set(ledger.uses))


def _input_labels(units, x):
  """Batch first, channels last, positions between."""
  if not x.shape:
    return (), None
  is_features = len(x.shape) > 1 and jnp.issubdtype(x.dtype, jnp.inexact)
  axes = [units.opaque(x.shape[0], 'is the batch axis')]
  axes += [units.opaque(n, layout.POSITION) for n in x.shape[1:]]
  if is_features:
    axes[-1] = units.fresh(x.shape[-1])
    units.freeze(axes[-1], "is the model's input")
  return tuple(axes), axes[-1] if is_features else None


def interpret(program, batch: int) -> Interpretation:
  """Runs the rules over a marked program."""
  interpreter = Interpreter(batch)
  units = interpreter.units
  operands, variables, inputs = [], {}, []
  shapes: Sequence = program.jaxpr.in_avals
  for path, aval in zip(program.variables, shapes, strict=False):
    if path:
      axes = tuple(units.fresh(n) for n in aval.shape)
      variables[path] = axes
      x = arrays.Traced(aval.shape, axes, params=frozenset([path]))
    else:
      x = interpreter.constant(aval, BARE)
    operands.append(x)
  for aval in program.inputs:
    axes, features = _input_labels(units, aval)
    operands.append(
      arrays.Traced(
        aval.shape,
        axes,
        sources=frozenset([arrays.INPUT]),
        batched=aval.shape[:1] == (batch,),
      )
    )
    if features is not None:
      inputs.append(features)
  for x in interpreter.run(program.jaxpr, operands):
    for label in x.axes:
      units.freeze(label, 'is an output of the model')
    interpreter.ledger.read.update(x.params)
    for path in x.sources - {arrays.INPUT, arrays.PICKED}:
      interpreter.ledger.uses[path].last = True
  return Interpretation(interpreter.ledger, variables, inputs, interpreter.sums)
