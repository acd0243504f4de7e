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

import compare
import numpy as np
from PIL import Image
from PIL import PngImagePlugin
import result_files

from djpq_jax import report

# Picture -> (result files, curve -> the contestants on it).
PICTURES: dict[str, tuple[list[str], dict[str, str]]] = {
  'digits_pareto': (
    ['digits', 'peers_digits'],
    {
      'DJPQ': r'DJPQ @.*',
      'two-stage': r'two-stage.* @.*',
      'bits alone': r'DJPQ bits only @.*',
      'uniform bits': r'W\dA\d',
      'qwix, uniform bits': r'qwix W\dA\d, first.*|qwix W[48]A.',
      'HGQ2': r'HGQ2 @.*',
      'torch-pruning, NNCF': r'torch-pruning.*',
    },
  ),
  'resnet20_cifar10_5_epochs_pareto': (
    ['resnet20_cifar10_5_epochs'],
    {
      'DJPQ': r'DJPQ @.*',
      'DJPQ, inputs of one bit': r'DJPQ inputs of one bit @.*',
      'uniform bits': r'W\dA\d',
    },
  ),
  'mobilenet_v2_cifar10_pareto': (
    ['mobilenet_v2_cifar10'],
    {'DJPQ': r'DJPQ @.*', 'uniform bits': r'W\dA\d'},
  ),
  'resnet20_cifar10_pareto': (
    ['resnet20_cifar10'],
    {
      'DJPQ': r'DJPQ @.*',
      'two-stage': r'two-stage( 80% MACs)? @.*',
      'uniform bits': r'W\dA\d',
    },
  ),
}


def curves(names: list[str], families: dict[str, str]):
  """(curve -> points with mean and deviation over seeds, float accuracy)."""
  runs = [run for name in names for run in result_files.read(name)['runs']]
  runs = [run for run in runs if 'error' not in run]
  found: dict[str, list[dict[str, float]]] = {name: [] for name in families}
  for contestant, seeds in compare.grouped(runs).items():
    accuracy = np.array([run['accuracy'] for run in seeds])
    point = {
      'accuracy': float(accuracy.mean()),
      'relative_bops': float(np.mean([r['relative_bops'] for r in seeds])),
      'deviation': float(accuracy.std(ddof=1)) if len(seeds) > 1 else 0.0,
    }
    for family, pattern in families.items():
      if re.fullmatch(pattern, contestant):
        found[family].append(point)
  floats = float(np.mean([run['float_accuracy'] for run in runs]))
  return {name: points for name, points in found.items() if points}, floats


def fingerprint(drawn) -> str:
  """A hash of what is drawn."""
  return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()


def draw(path: pathlib.Path, drawn) -> None:
  """Draws curves and float accuracy; leaves their hash in the file."""
  found, floats = drawn
  report.plot_pareto(found, path, floats)
  info = PngImagePlugin.PngInfo()
  info.add_text('figures', fingerprint(drawn))
  with Image.open(path) as image:
    image.load()
    image.save(path, pnginfo=info, optimize=True)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--check', action='store_true')
  args = parser.parse_args()
  stale = []
  for name, (files, families) in PICTURES.items():
    path = result_files.ROOT / 'docs' / 'images' / f'{name}.png'
    drawn = curves(files, families)
    if not args.check:
      draw(path, drawn)
      continue
    with Image.open(path) as image:
      if image.info.get('figures') != fingerprint(drawn):
        stale.append(path.name)
  if stale:
    print(f'{", ".join(stale)} out of date: run python benchmarks/pictures.py')
  return int(bool(stale))


if __name__ == '__main__':
  sys.exit(main())
