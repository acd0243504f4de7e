"""torch-pruning, then NNCF's INT8, on the digits: to a budget in two stages.

Run by benchmarks/compare_peers.py, in an environment of its own.
torch-pruning removes channels in several rounds, with some epochs after each,
until what is left has the BOPs of the target at eight bits.  It is finetuned,
quantized by `nncf.quantize`, and finetuned again at a tenth of the rate.
"""

import argparse
import os
import sys

# Before NNCF is imported, or it would send its telemetry.
os.environ['NNCF_CI'] = '1'
# It compiles its quantizers once, which takes longer than it would wait.
os.environ['NNCF_EXTENSION_LOAD_TIMEOUT'] = '0'
os.environ['TORCH_EXTENSIONS_DIR'] = os.path.join(sys.prefix, 'extensions')

import counting
import digits_torch
import feeding
import nncf
from nncf.torch.quantization import layers as nncf_layers
import numpy as np
import torch
from torch import nn
import torch_pruning
import training_torch

BITS = 8
ROUNDS = 5  # of pruning, with the same factor in MACs each
STEPS = 400  # that would remove all; as in torch-pruning's own benchmarks
PRUNING, QUANTIZING = 0.2, 0.2  # of the epochs; finetuning has the others


def build(given) -> digits_torch.Digits:
  """The digits' network in floats."""
  return digits_torch.Digits(
    given,
    conv=lambda k, into, out: nn.Conv2d(into, out, 3, padding=1, bias=False),
    linear=nn.Linear,
    relu=lambda k: nn.ReLU(),
    entry=nn.Identity(),
  )


def prune(model, given, batches, macs: float, epochs: int):
  """Removes channels until at most `macs` are left, training in between."""
  size = given['test'].shape[1]
  before = sum(digits_torch.macs(model, size))
  pruner = torch_pruning.pruner.BasePruner(
    model,
    training_torch.from_flax(given['test'][:1]),
    importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
    pruning_ratio=1.0,  # after all steps, which is beyond any target
    iterative_steps=STEPS,
    ignored_layers=[model.linear],
  )
  for k in range(1, ROUNDS + 1):
    goal = before * (macs / before) ** (k / ROUNDS)
    while sum(digits_torch.macs(model, size)) > goal:
      if pruner.current_step == STEPS:
        raise ValueError(f'torch-pruning does not come to {macs:.4g} MACs')
      model.eval()
      pruner.step()
    training_torch.train(model, batches, epochs // ROUNDS)


def quantize(model, given):
  """The model with NNCF's quantizers, calibrated on the training images."""
  images = training_torch.from_flax(
    given['shifted'].reshape(-1, *given['test'].shape[1:])
  )
  rng = torch.Generator().manual_seed(0)
  chosen = images[torch.randperm(len(images), generator=rng)[:300]]
  model.eval()
  return nncf.quantize(model, nncf.Dataset([image[None] for image in chosen]))


def check(model):
  """Raises unless NNCF quantizes the weights and the input of each layer."""
  quantizers = [
    module
    for module in model.modules()
    if isinstance(module, nncf_layers.BaseQuantizer)
  ]
  bits = [one.num_bits for one in quantizers]
  if bits != [BITS] * 10:
    raise ValueError(f'quantizers of {bits} bits: not ten of {BITS}')


def trained(given, target: float, epochs: int, seed: int) -> dict:
  """A network within a target of BOPs; its logits and bits."""
  torch.manual_seed(seed)
  batches = feeding.Batches(given, seed)
  size = given['test'].shape[1]
  model = build(given)
  full = digits_torch.shapes(model, size)
  pruning, quantizing = round(PRUNING * epochs), round(QUANTIZING * epochs)
  prune(model, given, batches, target / BITS**2, pruning)
  training_torch.train(model, batches, epochs - pruning - quantizing)
  kept = digits_torch.shapes(model, size)
  model = quantize(model, given)
  check(model)
  training_torch.train(model, batches, quantizing, rate=feeding.RATE / 10)
  bits = counting.whole_tensors(*kept, [BITS] * 5, [BITS] * 5, full)
  widths = [kernel[-1] for kernel in kept[0]]
  print(f'channels {widths}, BOPs {counting.bops(bits)[0]:.4g}', flush=True)
  logits = training_torch.logits(model, given['test'])
  return {'logits': logits, 'trainings': 1} | bits


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('given', help='a file of compare_peers.py')
  parser.add_argument('made', help='a folder; gets a file for each target')
  parser.add_argument(
    '--targets', type=float, nargs='+', required=True, help='BOPs of each'
  )
  parser.add_argument('--epochs', type=int, required=True)
  parser.add_argument('--seed', type=int, required=True)
  args = parser.parse_args()
  given = dict(np.load(args.given))
  for k, target in enumerate(args.targets):
    made = trained(given, target, args.epochs, args.seed)
    np.savez(f'{args.made}/{k}.npz', **made)


if __name__ == '__main__':
  main()
