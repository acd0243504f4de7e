r"""Other libraries beside DJPQ, each in its own environment.

    python benchmarks/compare_peers.py --peers hgq2 --budgets 0.002 0.001 \\
        --seeds 0 1 2 --out benchmarks/results/peers_digits.json

A peer gets the same trained float model as DJPQ, the same images and shifts,
the same teacher, and in each training as many epochs as DJPQ's search and
finetuning take together.  The task is the digits', or with brevitas also that
of another --config, whose model is ResNet-20.  What it returns, the bits of
each weight and of each input, is counted here, see peers/counting.py.  A row is
either a budget, which takes learned bits or pruning, or one of FIXED_BITS;
brevitas has both.

`.peers/` has an environment for each peer, made when it is first needed from
peers/NAME.txt by pip, and the float models.  Nothing of them is needed by the
library or its tests.  As in compare.py, runs that the file holds are skipped.
"""

import argparse
import hashlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import peer_arrays
from peers import counting
from peers import feeding
import result_files

from djpq_jax import config as config_lib
from djpq_jax import evaluation
from djpq_jax import experiment

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = ROOT / 'benchmarks' / 'peers'
MADE = ROOT / '.peers'
PEERS = {
  'hgq2': 'HGQ2',
  'qwix': 'qwix',
  'brevitas': 'brevitas',
  'nncf': 'torch-pruning + NNCF INT8',
}
NO_BUDGET = ('qwix',)
# qwix is told the bits of the first layer, of those between, and of the last;
# brevitas has in each layer what DJPQ's controls have there, see `spelt_out`.
FIXED_BITS = {
  'brevitas': {'W4A4': '4', 'W3A3': '3', 'W2A2': '2'},
  'qwix': {
    'W8A8': '8,8,8',
    'W4A4': '4,4,4',
    'W3A3': '3,3,3',
    'W2A2': '2,2,2',
    'W3A3, first W8A8, last W6A6': '8,3,6',
    'W2A2, first W8A8, last W6A6': '8,2,6',
  },
}
DIGITS = 'digits_cnn'
NETWORKS = {'brevitas': (DIGITS, 'resnet20')}  # others know the digits' alone


def interpreter(peer: str) -> pathlib.Path:
  """The Python of a peer's environment, which is made if it is missing."""
  folder = MADE / peer
  python = folder / 'bin' / 'python'
  done = folder / 'installed'
  if not done.exists():
    subprocess.run([sys.executable, '-m', 'venv', folder], check=True)
    pip = [str(python), '-m', 'pip', 'install', '--quiet', '-r']
    subprocess.run([*pip, str(SCRIPTS / f'{peer}.txt')], check=True)
    done.touch()
  return python


def versions(peer: str) -> dict[str, str]:
  """What is installed of what a peer's environment was made from."""
  lines = (SCRIPTS / f'{peer}.txt').read_text().split()
  names = [line.split('==')[0] for line in lines]
  code = (
    'import importlib.metadata, json, sys; print(json.dumps('
    '{n: importlib.metadata.version(n) for n in sys.argv[1:]}))'
  )
  done = subprocess.run(
    [interpreter(peer), '-c', code, *names],
    capture_output=True,
    text=True,
    check=True,
  )
  return json.loads(done.stdout)


def given(config) -> pathlib.Path:
  """The file that a peer begins with; its float model is trained once."""
  said = hashlib.sha256(config.to_json(sort_keys=True).encode()).hexdigest()
  path = MADE / f'{config.model.name}-seed{config.seed}-{said[:8]}.npz'
  if not path.exists():
    model, accuracy = experiment.float_model(config)
    path.parent.mkdir(exist_ok=True)
    found = peer_arrays.arrays(model, config) | {'float_accuracy': accuracy}
    np.savez(path, allow_pickle=False, **found)
  return path


def check(config, peers) -> None:
  """Raises ValueError for what a peer cannot do as the config says it."""
  for peer in peers:
    if config.model.name not in NETWORKS.get(peer, (DIGITS,)):
      raise ValueError(f'{peer} does not know the network {config.model.name}')
  said = config.finetune.optimizer
  for name, value, known in (
    ('distill', config.finetune.distill, 0.5),
    ('temperature', config.finetune.temperature, feeding.TEMPERATURE),
    ('optimizer.warmup', said.warmup, feeding.WARMUP),
    ('optimizer.weight_decay', said.weight_decay, feeding.DECAY),
    ('optimizer.clip_norm', said.clip_norm, feeding.CLIP_NORM),
  ):
    if value != known:
      raise ValueError(f'peers have a finetune.{name} of {known}, not {value}')


def spelt_out(peer: str, bits: str, structure) -> str:
  """Bits of FIXED_BITS, as the script of a peer is told them.

  Of brevitas the bits of the weights of each layer / of its inputs, within
  what the rules of the task allow, as `allocate.uniform` gives them.
  """
  if peer != 'brevitas':
    return bits
  layers = [structure.layers[name] for name in structure.graph.layers]
  bounds = [
    [one.weight_bits for one in layers],
    [one.act_bits for one in layers],
  ]
  parts = [[int(np.clip(int(bits), *pair)) for pair in part] for part in bounds]
  return '/'.join(','.join(map(str, part)) for part in parts)


def contestants(
  peer: str,
  budgets: list[float],
  structure,
  names: list[str] | None = None,
) -> dict[str, str]:
  """Name -> target, as the script of the peer is told it.

  Args:
    peer: one of PEERS.
    budgets: relative BOPs, for peers that can be brought to them.
    structure: of the float model, from `experiment.dense_structure`.
    names: those of FIXED_BITS that are wanted; all of them unless given.
  """
  fixed = FIXED_BITS.get(peer, {})
  found = {
    f'{PEERS[peer]} {name}': spelt_out(peer, bits, structure)
    for name, bits in fixed.items()
    if names is None or name in names
  }
  if peer not in NO_BUDGET:
    full = 32 * 32 * structure.graph.float_macs
    found |= {f'{PEERS[peer]} @{b:.3%}': str(b * full) for b in budgets}
  return found


def trained(peer: str, config, targets: list[str], macs: int) -> list[dict]:
  """Trains a peer for some targets; the figures to compare of each."""
  start = time.monotonic()
  before = given(config)
  epochs = round(config.search.epochs + config.finetune.epochs)
  script = SCRIPTS / f'train_{peer}.py'
  command = [str(interpreter(peer)), str(script), '--epochs', str(epochs)]
  command += ['--seed', str(config.seed), '--targets', *targets, '--']
  command.append(str(before))
  # What it imports is its own, not what is beside this library.
  env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
  with tempfile.TemporaryDirectory() as after:
    subprocess.run([*command, after], check=True, env=env)
    made = [dict(np.load(f'{after}/{k}.npz')) for k in range(len(targets))]
  seconds = round(time.monotonic() - start, 1)
  return [figures(one, config, macs) | {'seconds': seconds} for one in made]


def figures(made, config, macs: int) -> dict:
  """Accuracy and BOPs of what a peer returned."""
  total, dense = counting.bops(made)
  if dense != 32 * 32 * macs:
    raise ValueError(f'a peer of {dense} BOPs, not of {32 * 32 * macs}')
  _, test = peer_arrays.images_of(config)
  layers = range(sum(name.startswith('act_bits') for name in made))
  bits = {
    f'mean_{what}_bits': [
      round(float(made[f'{what}_bits{k}'].mean()), 3) for k in layers
    ]
    for what in ('weight', 'act')
  }
  return {
    'accuracy': evaluation.accuracy(made['logits'], test),
    'relative_bops': total / dense,
    'bops': total,
    **bits,
    'trainings': int(made['trainings']),
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--config', default='configs/digits.py')
  parser.add_argument('--set', action='append', default=[])
  parser.add_argument('--peers', choices=list(PEERS), nargs='+', required=True)
  parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
  parser.add_argument('--budgets', type=float, nargs='*', default=[0.002])
  fixed = dict.fromkeys(name for bits in FIXED_BITS.values() for name in bits)
  parser.add_argument(
    '--fixed', nargs='*', choices=list(fixed), help='all unless given'
  )
  parser.add_argument('--out', required=True, type=pathlib.Path)
  args = parser.parse_args()
  base = config_lib.load(args.config, args.set)
  try:
    check(base, args.peers)
  except ValueError as error:
    parser.error(str(error))
  structure = experiment.dense_structure(base)
  macs = structure.graph.float_macs
  commit = result_files.commit()  # before this writes to a file of them
  for seed, peer in itertools.product(args.seeds, args.peers):
    targets = contestants(peer, args.budgets, structure, args.fixed)
    config = config_lib.change(base, seed=seed)
    told = {
      (name, seed): f'{result_files.settings(config)}, {target}'
      for name, target in targets.items()
    }
    done = result_files.finished(args.out, ('contestant', 'seed'), told)
    left = [name for name in targets if (name, seed) not in done]
    if not left:
      continue
    found = trained(peer, config, [targets[n] for n in left], macs)
    float_accuracy = float(np.load(given(config))['float_accuracy'])
    of_all = {'seed': seed, 'commit': commit, 'float_accuracy': float_accuracy}
    new = [
      {'contestant': n, 'settings': told[n, seed]} | of_all | run
      for n, run in zip(left, found)
    ]
    for run in new:
      print(json.dumps(run), flush=True)
    result_files.add(args.out, new, versions(peer), config=args.config)


if __name__ == '__main__':
  main()
