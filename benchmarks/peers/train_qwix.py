"""qwix on the digits: quantization-aware training at bits that are given.

Run by benchmarks/compare_peers.py, in an environment of its own.  The rules
state bits alone, as qwix's documents do, and all else is as it is by default:
symmetric grids up to the largest magnitude, which is found anew in each step,
of each output channel of a kernel and of each image of an input.  `QtProvider`
multiplies integers forward and has straight-through gradients backward.

The model is the one of the digits with its batch norm, which qwix leaves in
floats.  It is trained as DJPQ's own controls are.  What is evaluated is what
`PtqProvider` makes of it, where kernels are stored as integers, and bits are
counted of the products in that program.
"""

import argparse

import feeding
from flax import nnx
import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from qwix._src.core import numerics

PRODUCTS = ('conv_general_dilated', 'dot_general')


def in_bytes(convert):
  """What qwix stores in four bits, in eight: the same integers.

  qwix has up to four bits in int4 and five to seven in int8.  XLA compiles no
  products of int4 for a CPU; it says "does not support custom element sizes".
  """

  def converted(*args, **kwargs):
    found = convert(*args, **kwargs)
    return found.astype(jnp.int8) if found.dtype == jnp.int4 else found

  return converted


numerics.convert_to = in_bytes(numerics.convert_to)


class Digits(nnx.Module):
  """The digits' network, from the float weights."""

  def __init__(self, given):
    rngs = nnx.Rngs(0)  # nothing that it draws is kept
    self.convs, self.norms = nnx.List(), nnx.List()
    for k in range(4):
      kernel = given[f'kernel{k}']
      conv = nnx.Conv(
        *kernel.shape[2:], kernel.shape[:2], use_bias=False, rngs=rngs
      )
      conv.kernel[...] = kernel
      self.convs.append(conv)
      scale, bias, mean, deviation = given[f'norm{k}']
      norm = nnx.BatchNorm(
        len(scale), momentum=0.9, epsilon=feeding.EPSILON, rngs=rngs
      )
      norm.scale[...], norm.bias[...] = scale, bias
      norm.mean[...], norm.var[...] = mean, deviation**2 - feeding.EPSILON
      self.norms.append(norm)
    self.linear = nnx.Linear(*given['kernel4'].shape, rngs=rngs)
    self.linear.kernel[...] = given['kernel4']
    self.linear.bias[...] = given['bias4']

  def __call__(self, x):
    """Images [B, H, W, C] -> logits [B, classes]."""
    for k, (conv, norm) in enumerate(zip(self.convs, self.norms)):
      x = nnx.relu(norm(conv(x)))
      if k == 1:
        x = nnx.max_pool(x, (2, 2), strides=(2, 2))
    return self.linear(x.reshape(len(x), -1))


def loss(logits, labels, teacher):
  """Half the labels, half the teacher: as the other contestants."""
  hard = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  warm = feeding.TEMPERATURE
  soft = optax.softmax_cross_entropy(
    logits / warm, jax.nn.softmax(teacher / warm)
  )
  return (0.5 * hard + 0.5 * warm**2 * soft).mean()


def trained(given, rules, epochs: int, seed: int) -> Digits:
  """The model after a training with these rules; its weights are floats."""
  batches = feeding.Batches(given, seed)
  sample = batches.images[0, : feeding.BATCH]
  model = Digits(given)
  model.eval()  # or the statistics would move with what qwix traces it on
  model = qwix.quantize_model(model, qwix.QtProvider(rules), sample)
  model.train()
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  steps = epochs * len(batches)
  optimizer = optax.chain(
    optax.clip_by_global_norm(feeding.CLIP_NORM),
    optax.adamw(
      optax.warmup_cosine_decay_schedule(
        feeding.RATE / 10, feeding.RATE, round(feeding.WARMUP * steps), steps
      ),
      weight_decay=feeding.DECAY,
      mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree),
    ),
  )

  @jax.jit
  def step(params, rest, state, images, labels, teacher):
    def total(params):
      model = nnx.merge(graph, params, rest, copy=True)
      value = loss(model(images), labels, teacher)
      return value, nnx.split(model, nnx.Param, ...)[2]

    (value, rest), slopes = jax.value_and_grad(total, has_aux=True)(params)
    updates, state = optimizer.update(slopes, state, params)
    return optax.apply_updates(params, updates), rest, state, value

  state = optimizer.init(params)
  for _ in range(epochs):
    for batch in batches.epoch():
      params, rest, state, value = step(params, rest, state, *batch)
  print(f'loss {value:.4f} at the end', flush=True)
  return nnx.merge(graph, params, rest, copy=True)


def exported(model, rules, images) -> dict:
  """Logits of the model with integer kernels, and the bits of its products."""
  images = jnp.asarray(images)  # an array of NumPy is refused
  model.eval()
  model = qwix.quantize_model(model, qwix.PtqProvider(rules), images[:1])
  made = {'logits': np.asarray(model(images))}
  program = jax.make_jaxpr(lambda x: model(x))(images[:1])
  first, between, last = rules
  said = [first, between, between, between, last]
  for k, (inputs, kernel) in enumerate(products(program.jaxpr)):
    bits = stored(inputs, said[k].act_qtype)
    made[f'act_bits{k}'] = np.full(inputs.shape[1:], bits)
    bits = stored(kernel, said[k].weight_qtype)
    made[f'weight_bits{k}'] = np.full(kernel.shape, bits)
  return made


def products(jaxpr) -> list:
  """Input and kernel of each product of a program, in its order."""
  found = []
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in PRODUCTS:
      found.append([operand.aval for operand in eqn.invars])
    for inner in core.jaxprs_in_params(eqn.params):
      found += products(inner)
  return found


def stored(operand, qtype: str) -> int:
  """Bits of a product's operand; a rule that took no effect leaves floats."""
  if operand.dtype == jnp.int8:
    return int(qtype.removeprefix('int'))
  return 8 * operand.dtype.itemsize


def rule(path: str, bits: str) -> qwix.QuantizationRule:
  """Integers for the weights and the inputs of some layers."""
  return qwix.QuantizationRule(
    module_path=path, weight_qtype=f'int{bits}', act_qtype=f'int{bits}'
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('given', help='a file of compare_peers.py')
  parser.add_argument('made', help='a folder; gets a file for each target')
  parser.add_argument(
    '--targets',
    nargs='+',
    required=True,
    help='bits of the first layer, those between, and the last; with commas',
  )
  parser.add_argument('--epochs', type=int, required=True)
  parser.add_argument('--seed', type=int, required=True)
  args = parser.parse_args()
  given = dict(np.load(args.given))
  for k, target in enumerate(args.targets):
    paths = ('convs/0', 'convs/.*', 'linear')
    rules = [rule(*both) for both in zip(paths, target.split(','))]
    model = trained(given, rules, args.epochs, args.seed)
    made = exported(model, rules, given['test'])
    np.savez(f'{args.made}/{k}.npz', **made, trainings=1)


if __name__ == '__main__':
  main()
