"""brevitas on the digits: bits that are learned, or given for each layer.

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
import feeding
import numpy as np
import searching
import torch

BEGIN_BITS = 8  # of learned widths, for weights and inputs
BITS_RATE = 2e-2  # of learning them; at that of the weights they hardly move
# Of relative BOPs in the loss, from one training of seed 0 before; near the
# least that it can have BOPs hardly fall.
SEARCH = searching.Search(first=12.0, slope=0.5)


class Weight(quant.Int8WeightPerTensorFloatMSE):
  """A learned scale that begins where the squared error is least."""

  scaling_min_val = 2e-16


class Input(quant.Uint8ActPerTensorFloat):
  """Without a sign, as no input is negative; the scale is learned."""

  scaling_min_val = 2e-16
  restrict_scaling_type = RestrictValueType.LOG_FP


def build(given, weight_bits, act_bits, *, learned: bool):
  """The digits' network with these widths, to begin with or for good."""
  kind = BitWidthImplType.PARAMETER if learned else BitWidthImplType.CONST

  def weight(k):
    return dict(
      weight_quant=Weight,
      weight_bit_width=weight_bits[k],
      weight_bit_width_impl_type=kind,
    )

  def entry(k):
    return dict(
      act_quant=Input, bit_width=act_bits[k], bit_width_impl_type=kind
    )

  return digits_torch.Digits(
    given,
    conv=lambda k, into, out: quant_nn.QuantConv2d(
      into, out, 3, padding=1, bias=False, **weight(k)
    ),
    linear=lambda into, out: quant_nn.QuantLinear(into, out, True, **weight(4)),
    relu=lambda k: quant_nn.QuantReLU(**entry(k + 1)),
    entry=quant_nn.QuantIdentity(**entry(0)),
  )


def widths(model) -> tuple[list, list]:
  """Bits of the weights and of the inputs of each layer, as tensors."""
  layers = [*model.convs, model.linear]
  weights = [layer.weight_quant.tensor_quant for layer in layers]
  acts = [
    module.act_quant.fused_activation_quant_proxy.tensor_quant
    for module in (model.entry, *model.relus)
  ]
  return tuple(
    [one.msb_clamp_bit_width_impl() for one in ones] for ones in (weights, acts)
  )


def trained(given, model, epochs: int, seed: int, coefficient=None) -> dict:
  """Trains a model; its logits, its bits, and its loss on training images."""
  size = given['test'].shape[1]
  macs = digits_torch.macs(model, size)

  def cost():
    uses = zip(macs, *widths(model))
    total = sum(count * weight * act for count, weight, act in uses)
    return coefficient * total / (32 * 32 * sum(macs))

  bits = [p for n, p in model.named_parameters() if 'bit_width' in n]
  digits_torch.train(
    model,
    feeding.Batches(given, seed),
    epochs,
    own=[(bits, BITS_RATE)] if bits else [],
    extra=cost if bits else None,
  )
  made = {
    'logits': digits_torch.logits(model, given['test']),
    'loss': digits_torch.training_loss(model, given),
  }
  found = [[float(one) for one in ones] for ones in widths(model)]
  print(f'bits {found}, loss {made["loss"]:.4f}', flush=True)
  bits = counting.whole_tensors(*digits_torch.shapes(model, size), *found)
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
    begin = [BEGIN_BITS] * 5
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
