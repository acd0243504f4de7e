r"""Files that are written from hardened models, compared with the models.

    python benchmarks/export.py --artifacts runs/resnet20/artifact \\
        --data-dir DATA --models resnet18 mobilenet_v2 \\
        --out benchmarks/results/export.json

For each network: all of its accumulators in all executions at batch 1 and 64,
what its artifact takes on disk, and each form of export, read back and run on
images.  Artifacts are compared on test images of the set that they were
measured on.  `--models` have random weights, a batch norm that fits them, mixed
bits and fewer channels, and get the same images, enlarged.
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import tempfile
from typing import Any

import cv2
import numpy as np
import result_files

from djpq_jax import checkpoint
from djpq_jax import compress
from djpq_jax import data
from djpq_jax import evaluation
from djpq_jax import experiment
from djpq_jax import export
from djpq_jax import harden
from djpq_jax import integer
from djpq_jax import models
from djpq_jax.checkpoint import contents
from djpq_jax.checkpoint import index
from djpq_jax.checkpoint import manifest as manifest_lib

# What is written: for any number of images, and for 64.
FILES = (
  {'format': 'onnx', 'form': 'qdq'},
  {'format': 'onnx', 'form': 'exact'},
  {'format': 'onnx', 'form': 'integer'},
  {'format': 'stablehlo'},
  {'format': 'stablehlo', 'batch': 64},
)
BITS = (2, 3, 4, 5, 6, 8)  # of random weights, with the first layers at 8
KEEP = 0.7  # of the channels of every group that may be pruned


def first_images(split: data.Split, count: int) -> np.ndarray:
  """As networks get them, float32 [count, H, W, C]."""
  found: list[np.ndarray] = []
  for batch in data.eval_batches(split, 256):
    if sum(map(len, found)) >= count:
      break
    found.append(np.asarray(batch['image'], np.float32))
  return np.concatenate(found)[: min(count, len(split))]


def enlarged(images: np.ndarray, shape) -> np.ndarray:
  """Images of the size that a network takes."""
  size = shape[1], shape[0]
  return np.stack([cv2.resize(image, size) for image in images])


def random_network(name: str, images: np.ndarray) -> harden.HardenedModel:
  """A network with random weights, mixed bits and fewer channels."""
  model = models.create(name)
  sample = enlarged(images[:32], model.input_shape)
  model = evaluation.estimate_statistics(model, [sample])
  net = compress.compress(model, (), sample[:8])
  rng = np.random.default_rng(0)
  layers = net.structure.layers
  groups = [net.structure.groups[g] for g in net.structure.gated]
  plan = compress.Plan(
    open={
      g.name: rng.permutation(g.size) < round(KEEP * g.size) for g in groups
    },
    weight_bits={path: int(rng.choice(BITS)) for path in layers},
    act_bits={
      path: 8 if settings.act_bits[0] == 8 else int(rng.choice(BITS))
      for path, settings in layers.items()
    },
  )
  frozen = compress.freeze(net, plan, sample[:8])
  return harden.harden(evaluation.estimate_statistics(frozen, [sample]))


def sizes(folder: pathlib.Path) -> dict:
  """What an artifact takes, and what its numbers would at their bits."""
  integers, floats = 0.0, 0
  for text in index.read(folder)['arrays'].values():
    dtype, shape = manifest_lib.read_spec(text)
    size = int(np.prod(shape))
    if dtype.startswith(contents.PACKED):
      integers += size * int(dtype.removeprefix(f'{contents.PACKED} int')) / 8
    else:
      floats += size * np.dtype(dtype).itemsize
  disk = checkpoint.size_bytes(folder)
  arrays = (folder / 'arrays').rglob('*')
  return {
    'bytes': disk,
    'integers_at_their_bits': round(integers),
    'floats': floats,
    'over_integers_and_floats': round(disk / (integers + floats), 4),
    'parts': {
      'arrays': sum(f.stat().st_size for f in arrays if f.is_file()),
      **{f.name: f.stat().st_size for f in folder.iterdir() if f.is_file()},
    },
  }


def accumulators_agree(model: harden.HardenedModel, images) -> bool:
  """Whether every accumulator is the same in all executions."""
  found = set()
  for execution in integer.EXECUTIONS:
    digest = hashlib.sha256()
    sums = integer.accumulators(integer.lower(model, execution), images)
    for path in sorted(sums):
      for array in sums.pop(path):
        digest.update(np.asarray(array).tobytes())
    found.add(digest.hexdigest())
  return len(found) == 1


def exported(model, images, folder: pathlib.Path) -> list[dict]:
  """Each form, and how far it deviates."""
  rows = []
  for kwargs in FILES:
    path = folder / 'model'
    done = export.export(model, path, images, **kwargs)
    found = done.deviation
    rows.append(
      {
        'format': kwargs['format'],
        'form': kwargs.get('form', ''),
        'batch': kwargs.get('batch', 'any'),
        **dataclasses.asdict(found),
        'steps': found.steps,
        'bytes': path.stat().st_size,
        'float_layers': dict(done.float_layers),
        'operators': dict(done.operators),
      }
    )
    print(json.dumps(rows[-1]), flush=True)
  return rows


def facts(folder: pathlib.Path, model, images) -> dict:
  """All that is known of one artifact."""
  manifest = checkpoint.read_manifest(folder)
  rows = [r for r in manifest['layers'] if r['weights']]
  bits = [b for r in rows for b in (r['weight_bits'], r['act_bits'])]
  print(manifest['model']['name'], sizes(folder), flush=True)
  with tempfile.TemporaryDirectory() as name:
    return {
      'model': manifest['model']['name'],
      'input_shape': manifest['input_shape'],
      'bits': [min(bits), max(bits)],
      'relative_macs': manifest['totals']['relative_macs'],
      'relative_bops': manifest['totals']['relative_bops'],
      'accuracy': manifest.get('accuracy'),
      'size': sizes(folder),
      'accumulators_agree': {
        str(n): accumulators_agree(model, images[:n]) for n in (1, 64)
      },
      'files': exported(model, images, pathlib.Path(name)),
    }


def save_random(name: str, images, folder: pathlib.Path):
  """Writes the artifact of a random network; returns the reloaded model."""
  model = random_network(name, images)
  dense = models.create(name)
  sample = np.zeros((2, *dense.input_shape), np.float32)
  checkpoint.save(
    folder,
    model,
    harden.count(model, sample),
    model_spec={'name': name, 'kwargs': {}},
    input_shape=dense.input_shape,
  )
  return experiment.load_artifact(folder), dense.input_shape


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--artifacts', type=pathlib.Path, nargs='+', default=[])
  parser.add_argument('--models', nargs='+', default=[])
  parser.add_argument('--data', default='cifar10')
  parser.add_argument('--data-dir')
  parser.add_argument('--images', type=int, default=10_000, help='of artifacts')
  parser.add_argument('--large', type=int, default=128, help='of --models')
  parser.add_argument('--out', type=pathlib.Path)
  args = parser.parse_args()
  _, split = data.load(args.data, data_dir=args.data_dir)
  images = first_images(split, max(args.images, args.large))
  result: dict[str, Any] = {
    'environment': result_files.environment(),
    'commit': result_files.commit(),
    'runs': [],
  }

  def keep(found):
    result['runs'].append(found)
    if args.out:
      args.out.write_text(json.dumps(result, indent=1) + '\n')

  for folder in args.artifacts:
    model = experiment.load_artifact(folder)
    found = facts(folder, model, images[: args.images])
    keep({'weights': 'trained'} | found)
  for name in args.models:
    with tempfile.TemporaryDirectory() as place:
      folder = pathlib.Path(place) / 'artifact'
      model, shape = save_random(name, images, folder)
      large = enlarged(images[: args.large], shape)
      keep({'weights': 'random'} | facts(folder, model, large))


if __name__ == '__main__':
  main()
