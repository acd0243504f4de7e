"""brevitas: bits that are learned, or given for each layer.

Run by benchmarks/compare_peers.py, in an environment of its own.  Weights and
inputs have one scale and one width per tensor.  Learned widths are brevitas's
`BitWidthImplType.PARAMETER`, which rounds them with a straight-through
gradient; their loss is the bit operations of the network over those of floats
times a coefficient, which is searched for each budget, see searching.py.
"""

import argparse

from brevitas import nn as quant_nn
from brevitas import quant
from brevitas.inject.enum import BitWidthImplType
from brevitas.inject.enum import RestrictValueType
import counting
import digits_torch
import numpy as np
import resnet_torch
import searching
import torch
import training_torch

BEGIN_BITS = 8  # of learned widths, for weights and inputs
BITS_RATE = 10.0  # over that of the weights, at which they hardly move
# Of relative BOPs in the loss, from one training of seed 0 before; near the
# least that it can have BOPs hardly fall.
SEARCH = searching.Search(first=12.0, slope=0.5)


NETWORKS = {'digits_cnn': digits_torch, 'resnet20': resnet_torch}


class Weight(quant.Int8WeightPerTensorFloatMSE):
  """A learned scale that begins where the squared error is least."""

  scaling_min_val = 2e-16


class Input(quant.Uint8ActPerTensorFloat):
  """Without a sign, as most inputs are not negative; the scale is learned."""

  scaling_min_val = 2e-16
  restrict_scaling_type = RestrictValueType.LOG_FP


class SignedInput(quant.Int8ActPerTensorFloat):
  """With a sign."""

  scaling_min_val = 2e-16
  restrict_scaling_type = RestrictValueType.LOG_FP


def build(given, weight_bits, act_bits, *, learned: bool):
  """The network with these widths, to begin with or for good."""
  kind = BitWidthImplType.PARAMETER if learned else BitWidthImplType.CONST

  def weight(k):
    return dict(
      weight_quant=Weight,
      weight_bit_width=weight_bits[k],
      weight_bit_width_impl_type=kind,
    )

  def entry(k):
    signed = k == 0 and given['test'].min() < 0
    return dict(
      act_quant=SignedInput if signed else Input,
      bit_width=act_bits[k],
      bit_width_impl_type=kind,
    )

  def conv(k, into, out, stride=1):
    return quant_nn.QuantConv2d(
      into, out, 3, stride, padding=1, bias=False, **weight(k)
    )

  def linear(into, out):
    return quant_nn.QuantLinear(into, out, True, **weight(-1))

  if network(given) is digits_torch:
    return digits_torch.Digits(
      given,
      conv=conv,
      linear=linear,
      relu=lambda k: quant_nn.QuantReLU(**entry(k + 1)),
      entry=quant_nn.QuantIdentity(**entry(0)),
    )
  return resnet_torch.ResNet(
    given,
    conv=conv,
    linear=linear,
    entry=lambda k: quant_nn.QuantIdentity(**entry(k)),
  )


def network(given):
  """The module that has it."""
  return NETWORKS[str(given['network'])]


def widths(model) -> tuple[list, list]:
  """Bits of the weights and of the inputs of each layer, as tensors."""
  weights = [layer.weight_quant.tensor_quant for layer in model.layers()]
  acts = [
    module.act_quant.fused_activation_quant_proxy.tensor_quant
    for module in model.entries()
  ]
  return tuple(
    [one.msb_clamp_bit_width_impl() for one in ones] for ones in (weights, acts)
  )


def trained(given, model, epochs: int, seed: int, coefficient=None) -> dict:
  """Trains a model; its logits, its bits, and its loss on training images."""
  task = network(given)
  shapes = task.shapes(model, given['test'].shape[1])
  macs = given['macs']
  rate = float(given['rate'])

  def cost():
    uses = zip(macs, *widths(model))
    total = sum(count * weight * act for count, weight, act in uses)
    return coefficient * total / (32 * 32 * macs.sum())

  def named(part):
    return [p for name, p in model.named_parameters() if part in name]

  bits, scales = named('bit_width'), named('scaling')
  own = [(scales, float(given['scale_rate'])), (bits, BITS_RATE * rate)]
  batches = task.batches(given, seed)
  training_torch.train(
    model,
    batches,
    epochs,
    rate=rate,
    own=[kind for kind in own if kind[0]],
    extra=cost if bits else None,
  )
  training_torch.estimate_statistics(
    model, batches, int(given['statistics_batches'])
  )
  made = {
    'logits': training_torch.logits(model, given['test']),
    'loss': task.training_loss(model, given),
  }
  found = [[float(one) for one in ones] for ones in widths(model)]
  print(f'bits {found}, loss {made["loss"]:.4f}', flush=True)
  bits = counting.whole_tensors(*shapes, *found)
  bits |= {f'stride{k}': stride for k, stride in enumerate(given['strides'])}
  return made | bits | {'bops': counting.bops(bits)[0]}


def fixed(given, target: str, epochs: int, seed: int) -> dict:
  """A training at the bits of a target."""
  bits = [[int(n) for n in part.split(',')] for part in target.split('/')]
  torch.manual_seed(seed)
  model = build(given, *bits, learned=False)
  return trained(given, model, epochs, seed) | {'trainings': 1}


def learned(given, targets, epochs: int, seed: int) -> list[dict]:
  """Trainings for some budgets."""

  def trainer(coefficient):
    torch.manual_seed(seed)
    begin = [BEGIN_BITS] * int(given['layers'])
    model = build(given, begin, begin, learned=True)
    return trained(given, model, epochs, seed, coefficient)

  return SEARCH(trainer, [float(target) for target in targets])


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('given', help='a file of compare_peers.py')
  parser.add_argument('made', help='a folder; gets a file for each target')
  parser.add_argument(
    '--targets',
    nargs='+',
    required=True,
    help='BOPs, or bits: of the weights of each layer / of their inputs',
  )
  parser.add_argument('--epochs', type=int, required=True)
  parser.add_argument('--seed', type=int, required=True)
  args = parser.parse_args()
  given = dict(np.load(args.given))
  budgets = [target for target in args.targets if '/' not in target]
  found = iter(learned(given, budgets, args.epochs, args.seed))
  for k, target in enumerate(args.targets):
    if '/' in target:
      made = fixed(given, target, args.epochs, args.seed)
    else:
      made = next(found)
    np.savez(f'{args.made}/{k}.npz', **made)


if __name__ == '__main__':
  main()
