r"""Compares settings by cross-validation within the training images.

    python benchmarks/crossvalidate.py --config configs/digits.py \
        --variant default --variant 'no teacher: search.distill=0.0' \
        --out /tmp/variants.json

Settings are chosen here, so that the test images stay unseen until
`compare.py` measures them.  Each fold holds one part of the training images
out, and all variants of a fold start from the same float model.  A variant is
a name, with overrides after a colon, several of them apart by blanks.
"""

import argparse
import dataclasses
import json
import pathlib

import compare
import numpy as np

from djpq_jax import config as config_lib
from djpq_jax import data
from djpq_jax import evaluation
from djpq_jax import harden
from djpq_jax.experiment import methods
from djpq_jax.experiment import phases
from djpq_jax.experiment import setting


def held_out(split: data.Split, fold: int, folds: int):
  """(what is left to train on, every `folds`-th image from `fold` on)."""
  at = np.arange(len(split)) % folds == fold

  def part(mask, name):
    return dataclasses.replace(
      split,
      images=split.images[mask],
      labels=split.labels[mask],
      name=f'{split.name}, fold {fold}, {name}',
    )

  return part(~at, 'rest'), part(at, 'held out')


def prepare(config, fold: int, folds: int) -> setting.Run:
  """An experiment that sees the training images alone."""
  run = setting.prepare(config)
  run.train_split, run.test_split = held_out(run.train_split, fold, folds)
  return run


def one(config, fold: int, folds: int, model) -> dict:
  """Compresses a float model; errors on the images that were held out."""
  run = prepare(config, fold, folds)
  net = methods.METHODS[config.method](run, model)
  hardened = harden.harden(phases.finetune(run, net, model))
  right = evaluation.evaluate(hardened, run.test_split)
  images = len(run.test_split)
  return {'errors': round((1 - right) * images), 'images': images}


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--config', required=True)
  parser.add_argument('--set', action='append', default=[])
  parser.add_argument('--variant', action='append', required=True)
  parser.add_argument('--folds', type=int, default=5)
  parser.add_argument('--seeds', type=int, nargs='+', default=[100])
  parser.add_argument('--out', type=pathlib.Path)
  args = parser.parse_args()
  rows = []
  for seed in args.seeds:
    for fold in range(args.folds):
      always = [*args.set, f'seed={seed}']
      base = config_lib.load(args.config, always)
      run = prepare(base, fold, args.folds)
      model = phases.train_float(run, setting.dense_model(run))
      for variant in args.variant:
        name, _, overrides = variant.partition(':')
        config = config_lib.load(args.config, [*always, *overrides.split()])
        found = one(config, fold, args.folds, model)
        rows.append({'variant': name, 'seed': seed, 'fold': fold} | found)
        print(rows[-1], flush=True)
  for variant in args.variant:
    name = variant.partition(':')[0]
    of = [row for row in rows if row['variant'] == name]
    errors, images = (sum(r[key] for r in of) for key in ('errors', 'images'))
    print(f'{name:<24} {errors} errors of {images}, {1 - errors / images:.2%}')
  if args.out:
    result = {'environment': compare.environment(), 'commit': compare.commit()}
    args.out.write_text(json.dumps(result | {'runs': rows}, indent=1) + '\n')


if __name__ == '__main__':
  main()
