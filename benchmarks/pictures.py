r"""Draws the pictures of docs/results.md from benchmarks/results.

    python benchmarks/pictures.py [--check]

Each picture carries a hash of the figures that it was drawn from; `--check`
only tells whether they are still those of the results.
"""

import argparse
import hashlib
import json
import pathlib
import re
import sys
from typing import NamedTuple

import compare
import numpy as np
from PIL import Image
from PIL import PngImagePlugin
import result_files

from djpq_jax import report

# In every picture first and in this order, which decides on their colours.
OURS = {
  'DJPQ': r'DJPQ @.*',
  'uniform bits': r'W\dA\d',
  'two-stage': r'two-stage( \d+% MACs)? @.*',
}


class Picture(NamedTuple):
  """What a picture shows: each contestant is on a curve, or hidden."""

  title: str
  files: list[str]  # of results
  curves: dict[str, str]  # name -> pattern of contestants
  hidden: str = ''  # pattern of those that are left out


PICTURES = {
  'digits_pareto': Picture(
    'Digits: accuracy, mean and standard deviation over seeds',
    ['digits', 'peers_digits'],
    OURS
    | {
      'brevitas': r'brevitas (@.*|W\dA\d)',
      'qwix, uniform bits': r'qwix W[48]A\d|qwix W\dA\d, first.*',
      'HGQ2': r'HGQ2 @.*',
      'torch-pruning, NNCF': r'torch-pruning.*',
    },
    # qwix's two and three bits once, where they are better.
    hidden=r'W\dA\d per channel|DJPQ (bits|channels) only .*|DJPQ-restrict .*'
    r'|qwix W[23]A\d',
  ),
  'resnet20_cifar10_5_epochs_pareto': Picture(
    'ResNet-20 on CIFAR-10, 5 epochs: accuracy, mean and standard deviation',
    ['resnet20_cifar10_5_epochs', 'peers_resnet20'],
    OURS | {'brevitas': r'brevitas W\dA\d'},
    hidden=r'DJPQ inputs of one bit .*|brevitas W2A2, last.*|W2A2 per channel',
  ),
  'mobilenet_v2_cifar10_pareto': Picture(
    'MobileNetV2 on CIFAR-10, 5 epochs: accuracy of one seed',
    ['mobilenet_v2_cifar10'],
    OURS,
  ),
}


def curves(picture: Picture):
  """(curve -> points with mean and deviation over seeds, float accuracy)."""
  runs = [run for n in picture.files for run in result_files.read(n)['runs']]
  runs = [run for run in runs if 'error' not in run]
  groups = compare.grouped(runs)
  found = {
    family: _best([n for n in groups if re.fullmatch(pattern, n)], groups)
    for family, pattern in picture.curves.items()
  }
  shown = '|'.join([*picture.curves.values(), picture.hidden])
  lost = [name for name in groups if not re.fullmatch(shown, name)]
  if lost:
    raise ValueError(f'neither on a curve nor hidden: {", ".join(lost)}')
  floats = float(np.mean([run['float_accuracy'] for run in runs]))
  return found, floats


def _best(names: list[str], groups) -> list[dict[str, float]]:
  """The points of contestants; of several with one budget, the best."""
  points: dict[str, dict[str, float]] = {}
  for name in names:
    accuracy = np.array([run['accuracy'] for run in groups[name]])
    point = {
      'accuracy': float(accuracy.mean()),
      'relative_bops': float(
        np.mean([run['relative_bops'] for run in groups[name]])
      ),
      'deviation': float(accuracy.std(ddof=1)) if len(accuracy) > 1 else 0.0,
    }
    budget = name[name.find('@') :] if '@' in name else name
    before = points.setdefault(budget, point)
    points[budget] = max(before, point, key=lambda p: p['accuracy'])
  return list(points.values())


def fingerprint(title: str, drawn) -> str:
  """A hash of what is drawn."""
  return hashlib.sha256(json.dumps([title, drawn]).encode()).hexdigest()


def draw(path: pathlib.Path, title: str, drawn) -> None:
  """Draws curves and float accuracy; leaves their hash in the file."""
  found, floats = drawn
  report.plot_pareto(found, path, floats, title)
  info = PngImagePlugin.PngInfo()
  info.add_text('figures', fingerprint(title, drawn))
  with Image.open(path) as image:
    image.load()
    image.save(path, pnginfo=info, optimize=True)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--check', action='store_true')
  args = parser.parse_args()
  stale = []
  for name, picture in PICTURES.items():
    path = result_files.ROOT / 'docs' / 'images' / f'{name}.png'
    drawn = curves(picture)
    if not args.check:
      draw(path, picture.title, drawn)
      continue
    with Image.open(path) as image:
      if image.info.get('figures') != fingerprint(picture.title, drawn):
        stale.append(path.name)
  if stale:
    print(f'{", ".join(stale)} out of date: run python benchmarks/pictures.py')
  return int(bool(stale))


if __name__ == '__main__':
  sys.exit(main())
