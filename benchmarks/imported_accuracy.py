r"""Accuracy of imported torch weights on the CIFAR-10 test images.

    python benchmarks/imported_accuracy.py --data-dir DATA \
        --weights resnet20=resnet20-12fca82f.th resnet56=resnet56-4bfd9763.th \
        --out benchmarks/results/imported_accuracy.json

The files are those of github.com/akamaster/pytorch_resnet_cifar10, which states
errors of 8.27 % and 6.61 %; DATA holds the cifar10 folder of tfds.
"""

import argparse
import json
import pathlib
import time
from typing import Any

from flax import nnx
import result_files

from djpq_jax import data
from djpq_jax import evaluation
from djpq_jax import models
from djpq_jax.models import torch_weights

PUBLISHED = {
  'resnet20': 0.9173,
  'resnet32': 0.9263,
  'resnet44': 0.9310,
  'resnet56': 0.9339,
}


def measure(name: str, path: str, split) -> dict:
  """Imports one file and evaluates it on a split."""
  model = nnx.eval_shape(lambda: models.create(name))
  torch_weights.assign(model, torch_weights.read_state_dict(path))
  model.eval()
  start = time.monotonic()
  accuracy = evaluation.evaluate(model, split)
  return {
    'model': name,
    'weights': pathlib.Path(path).name,
    'images': len(split.labels),
    'accuracy': round(accuracy, 4),
    'published': PUBLISHED.get(name),
    'seconds': round(time.monotonic() - start, 1),
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--weights', nargs='+', required=True)
  parser.add_argument('--data-dir')
  parser.add_argument('--out', type=pathlib.Path)
  args = parser.parse_args()
  _, test = data.load('cifar10', data_dir=args.data_dir)
  runs = []
  for argument in args.weights:
    name, _, path = argument.partition('=')
    runs.append(measure(name, path, test))
    print(json.dumps(runs[-1]), flush=True)
  result: dict[str, Any] = {
    'environment': result_files.environment(),
    'commit': result_files.commit(),
    'runs': runs,
  }
  if args.out:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
  main()
