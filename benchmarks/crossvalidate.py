r"""Compares settings by cross-validation within the training images.

    python benchmarks/crossvalidate.py --config configs/digits.py \
        --variant DJPQ --variant 'half a teacher: search.distill=0.25' \
        --out variants.json

Settings are chosen here, so that the test images stay unseen until
`compare.py` measures them.  Each fold holds one part of the training images
out, and all variants of a fold start from the same float model.  A variant is
a name, with overrides after a colon, several of them apart by blanks; or a name
of `compare.py`'s contestants or of `ablations.py`, without overrides.  Each
finished run is added to the file at once, and runs that it holds are skipped.
"""

import argparse
import dataclasses
import itertools
import pathlib
from typing import Any

import ablations
import compare
import contestants
import jax
import numpy as np
import result_files

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
  """Compresses a float model; how it does on the images held out."""
  run = prepare(config, fold, folds)
  net = methods.METHODS[config.method](run, model)
  hardened = harden.harden(phases.finetune(run, net, model))
  logits = evaluation.predictions(hardened, run.test_split)
  right = evaluation.accuracy(logits, run.test_split)
  images = len(run.test_split)
  jax.clear_caches()  # see compare.py
  return {
    'errors': round((1 - right) * images),
    'images': images,
    'cross_entropy': evaluation.cross_entropy(logits, run.test_split),
  }


def settings(variant: str, source: str, always: list[str]):
  """The name of a variant, and its config."""
  name, colon, overrides = variant.partition(':')
  config = config_lib.load(source, [*always, *overrides.split()])
  if colon:
    if name in ablations.PATCHES:
      raise SystemExit(f'{name!r} of ablations.py takes no overrides')
    return name, config
  if name in ablations.PATCHES:
    return name, config
  rows = contestants.named(config, [config.budget])
  fields = rows.get(f'{name} @{config.budget:.3%}', rows.get(name))
  if fields is None:
    raise SystemExit(f'no contestant and no ablation has the name {name!r}')
  return name, config_lib.change(config, **fields)


def table(runs: list[dict]) -> str:
  """Each variant over all folds and seeds, as Markdown.

  Errors and cross-entropies are compared with those of the first variant on
  the same folds; of the latter, the mean difference and its standard error.
  """
  variants = {
    name: {(r['seed'], r['fold']): r for r in runs if r['variant'] == name}
    for name in dict.fromkeys(run['variant'] for run in runs)
  }
  first = next(iter(variants.values()))
  rows = []
  for name, of in variants.items():
    errors, images = (
      sum(r[key] for r in of.values()) for key in ('errors', 'images')
    )
    beside = sum(first[k]['errors'] for k in of if k in first)
    rows.append([name, str(errors), str(beside), str(images)])
    rows[-1].append(f'{1 - errors / images:.2%}')
    both = [k for k in of if k in first and 'cross_entropy' in of[k]]
    entropy, before = (
      np.array([v[k]['cross_entropy'] for k in both]) for v in (of, first)
    )
    if not both:
      rows[-1] += ['', '']
    elif of is first or len(both) < 2:
      rows[-1] += [f'{entropy.mean():.4f}', '']
    else:
      worse = entropy - before
      error = worse.std(ddof=1) / np.sqrt(len(worse))
      rows[-1] += [
        f'{entropy.mean():.4f}',
        f'{worse.mean():+.4f} ± {error:.4f}',
      ]
  return compare.markdown(
    'variant | errors | the first has | images | accuracy '
    '| cross-entropy, nats | above the first',
    rows,
  ).rstrip()


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--config', required=True)
  parser.add_argument('--set', action='append', default=[])
  parser.add_argument('--variant', action='append', required=True)
  parser.add_argument('--folds', type=int, default=5)
  parser.add_argument('--seeds', type=int, nargs='+', default=[100])
  parser.add_argument('--out', type=pathlib.Path, required=True)
  args = parser.parse_args()
  fields = 'variant', 'seed', 'fold'
  wanted: dict[tuple, Any] = {}
  for seed in args.seeds:
    always = [*args.set, f'seed={seed}']
    found = [settings(v, args.config, always) for v in args.variant]
    if len(dict(found)) < len(found):
      raise SystemExit('two variants have one name')
    wanted |= {
      (name, seed, fold): config
      for fold, (name, config) in itertools.product(range(args.folds), found)
    }
  told = {
    key: f'{result_files.settings(config)}, {args.folds} folds'
    for key, config in wanted.items()
  }
  done = result_files.finished(args.out, fields, told)
  for seed, fold in itertools.product(args.seeds, range(args.folds)):
    missing = [k for k in wanted if k[1:] == (seed, fold) and k not in done]
    if not missing:
      continue
    base = config_lib.load(args.config, [*args.set, f'seed={seed}'])
    run = prepare(base, fold, args.folds)
    model = phases.train_float(run, setting.dense_model(run))
    for key in missing:
      row = dict(zip(fields, key)) | {'settings': told[key]}
      with ablations.patched(key[0]):
        row |= one(wanted[key], fold, args.folds, model)
      result_files.add(args.out, [row | {'commit': result_files.commit()}])
      print(row, flush=True)
  print(table(result_files.runs_of(args.out)))


if __name__ == '__main__':
  main()
