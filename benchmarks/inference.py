r"""Speed of a hardened model beside float32, in JAX and in ONNX Runtime.

    python benchmarks/inference.py --models resnet20 mobilenet_v2 resnet18 \\
        --batches 1 64 --out benchmarks/results/inference.json

Weights are random, and every layer has `--bits`; `--keep` is the share of
channels that stay in every group that may be pruned.  'float32' is the dense
model.  Rounds take turns, so that a busy machine slows all of them; besides the
median of the wall clock there is the least CPU time of the process, which other
processes disturb less.  Every execution's accumulators are compared on the way,
and every ONNX file's logits with the model's.  `--layers` adds the time of each
layer alone.
"""

import argparse
import json
import os
import pathlib
import tempfile
from typing import Any

from flax import nnx
import jax
import numpy as np
import onnxruntime
import result_files

from djpq_jax import allocate
from djpq_jax import compress
from djpq_jax import export
from djpq_jax import harden
from djpq_jax import integer
from djpq_jax import models
from djpq_jax import speed


def prepare(name: str, kwargs: dict, bits, keep: float):
  """Returns a dense model with random weights, and a hardened one of it."""
  model = models.create(name, **kwargs)
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, *model.input_shape), np.float32)
  net = compress.compress(model, (), x)
  plan = allocate.uniform(net, *bits)
  masks = {}
  for g in net.structure.gated if keep < 1 else ():
    group = net.structure.groups[g]
    masks[group.name] = np.arange(group.size) < round(keep * group.size)
  plan = compress.Plan(
    open=masks, weight_bits=plan.weight_bits, act_bits=plan.act_bits
  )
  return model, harden.harden(compress.freeze(net, plan, x))


def hardened_float(model):
  """The dense model in the form that can be exported."""
  x = np.zeros((2, *model.input_shape), np.float32)
  rule = compress.Rule(pattern='*', prune=False, quantize=False)
  plan = compress.Plan(open={}, weight_bits={}, act_bits={})
  net = compress.compress(model, [rule], x)
  return harden.harden(compress.freeze(net, plan, x))


def onnx_run(model, x, form: str, folder: pathlib.Path):
  """Exports a hardened model; returns a run of it, and what was found.

  Returns:
    A function that runs `x` in ONNX Runtime, on as many threads as there are
    cores; and JSON-ready facts about the file.
  """
  path = folder / 'model.onnx'
  done = export.export(model, path, x, format='onnx', batch=len(x), form=form)
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = len(os.sched_getaffinity(0))
  # Threads that wait busily would slow whoever has the next turn.
  options.add_session_config_entry('session.intra_op.allow_spinning', '0')
  session = onnxruntime.InferenceSession(
    path, options, providers=['CPUExecutionProvider']
  )
  feed = {session.get_inputs()[0].name: x}
  facts = {
    'bytes': path.stat().st_size,
    'images': done.deviation.images,
    'predictions_that_differ': done.deviation.predictions,
    'largest_difference_in_steps': done.deviation.steps,
    'operators': dict(done.operators),
  }
  return lambda: session.run(None, feed), facts


def measure(runs: dict, rounds: int) -> dict:
  """Wall clock and CPU time of functions that take turns."""
  return {
    name: {
      'median_ms': round(1e3 * float(np.median([w for w, _ in found])), 3),
      'least_cpu_ms': round(1e3 * min(c for _, c in found), 3),
    }
    for name, found in speed.take_turns(runs, rounds).items()
  }


def agree(executed: dict, x) -> bool:
  """Whether all executions have the same accumulators."""
  sums = [integer.accumulators(m, x) for m in executed.values()]
  same = jax.tree.map(lambda *a: all(np.array_equal(a[0], b) for b in a), *sums)
  return all(jax.tree.leaves(same))


def compare_executions(dense, hardened, x, rounds: int) -> dict:
  """One model at one batch size: all contestants in turn."""
  executed = {e: integer.lower(hardened, e) for e in integer.EXECUTIONS}
  contestants = {speed.FLOAT: dense, 'dequantized': hardened, **executed}
  runs, compile_seconds = {}, {}
  for name, model in contestants.items():
    runs[name], compile_seconds[name] = speed.compiled(model, x)
  files = {}
  engines = {
    'onnxruntime float32': (hardened_float(dense), 'qdq'),
    'onnxruntime exact': (hardened, 'exact'),
    'onnxruntime qdq': (hardened, 'qdq'),
    'onnxruntime integer': (hardened, 'integer'),
  }
  with tempfile.TemporaryDirectory() as folder:
    for name, (model, form) in engines.items():
      runs[name], files[name] = onnx_run(model, x, form, pathlib.Path(folder))
  rows = measure(runs, rounds)
  for name, row in rows.items():
    for unit in ('median_ms', 'least_cpu_ms'):
      row[f'{unit}_float32_over_this'] = round(
        rows[speed.FLOAT][unit] / row[unit], 2
      )
    if name in compile_seconds:
      row['compile_seconds'] = round(compile_seconds[name], 1)
    else:
      row |= files[name]
  return {'accumulators_agree': agree(executed, x), 'rows': rows}


def layer_times(hardened, x, rounds: int) -> list[dict]:
  """Each layer alone, its quantizer included."""
  inputs = compress.inputs_of(integer.lower(hardened), x)
  macs = {row.name: row.macs for row in harden.count(hardened, x)}
  versions = {
    'dequantized': nnx.clone(hardened),
    **{e: integer.lower(hardened, e) for e in ('float', 'int8')},
  }
  runs: dict = {}
  for name, model in versions.items():
    for hook in compress.hooks(model):
      hook.operands.gate = None  # what entered was gated
      layer_input = np.asarray(inputs[hook.path][0])
      runs[hook.path, name] = speed.compiled(hook.layer, layer_input)[0]
  found = measure(runs, rounds)
  plans = integer.plans(versions['int8'])
  return [
    {
      'layer': path,
      'macs': macs[path] * len(x),
      'method': plans[path].method if path in plans else 'float32',
      **{name: found[path, name]['least_cpu_ms'] for name in versions},
    }
    for path in inputs
  ]


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  known = ['resnet20', 'mobilenet_v2', 'resnet18']
  parser.add_argument('--models', nargs='+', default=known)
  parser.add_argument('--batches', type=int, nargs='+', default=[1, 64])
  parser.add_argument('--bits', type=int, nargs=2, default=(8, 8))
  parser.add_argument('--keep', type=float, nargs='+', default=[1.0])
  parser.add_argument('--size', type=int, help='side of the images')
  parser.add_argument('--rounds', type=int, default=10)
  parser.add_argument('--layers', action='store_true')
  parser.add_argument('--out', type=pathlib.Path)
  args = parser.parse_args()
  result: dict[str, Any] = {
    'environment': result_files.environment(),
    'commit': result_files.commit(),
    'threads': len(os.sched_getaffinity(0)),
    'cpu': cpu(),
    'load': [round(load, 1) for load in os.getloadavg()],
    'runs': [],
  }
  kwargs = {'input_shape': (args.size, args.size, 3)} if args.size else {}
  for name in args.models:
    for keep in args.keep:
      dense, hardened = prepare(name, kwargs, args.bits, keep)
      for batch in args.batches:
        rng = np.random.default_rng(1)
        x = rng.standard_normal((batch, *dense.input_shape), np.float32)
        run = {
          'model': name,
          'input_shape': list(dense.input_shape),
          'bits': list(args.bits),
          'keep': keep,
          'batch': batch,
          **compare_executions(dense, hardened, x, args.rounds),
        }
        if args.layers:
          run['layers'] = layer_times(hardened, x, args.rounds)
        result['runs'].append(run)
        print(json.dumps(run), flush=True)
        if args.out:
          args.out.parent.mkdir(parents=True, exist_ok=True)
          args.out.write_text(json.dumps(result, indent=1) + '\n')


def cpu() -> dict:
  """The processor's name, and which of its instructions multiply integers."""
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    return {}
  facts = dict(
    [part.strip() for part in line.split(':', 1)]
    for line in lines
    if ':' in line
  )
  wanted = ('avx512_vnni', 'avx_vnni', 'avx_vnni_int8', 'amx_int8')
  flags = facts.get('flags', '').split()
  return {
    'name': facts.get('model name', ''),
    'integer_instructions': [f for f in wanted if f in flags],
  }


if __name__ == '__main__':
  main()
