"""Training images per second from disk, over decoding and cropping alone.

    python benchmarks/input_pipeline.py [--out benchmarks/results/NAME.json]

The images are JPEGs that the script makes itself, of ImageNet's mean size
(about 500 x 375 pixels and 110 kB), with the spectrum of photographs. Rounds
of both contestants take turns in one process:

    raw       decodes a JPEG and cuts out a random crop of 224 x 224, on one
              thread, from bytes in memory
    pipeline  `djpq_jax.data.train_batch` as `djpq train` calls it: the same,
              with reading, mirroring and batching, on --threads threads; the
              device normalizes

Both are given per second and per second of processor time, which does not
move with what else the machine does. The share is of raw times the cores.
"""

import argparse
import io
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import cv2
import numpy as np
from PIL import Image
import simplejpeg

from djpq_jax import data
from djpq_jax import machine
from djpq_jax.data import decode
from djpq_jax.data import geometry
from djpq_jax.data import stored
from djpq_jax.data.prepare import folder

SIZES = (375, 500), (333, 500), (500, 375), (400, 480)  # height, width
QUALITY = 90
AUGMENT = data.Augment(flip=True)


def picture(seed):
  """A JPEG whose spectrum falls with frequency, as photographs' do."""
  rng = np.random.default_rng(seed)
  height, width = SIZES[seed % len(SIZES)]
  frequency = np.hypot(
    np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
  )
  frequency[0, 0] = np.inf
  shape = (4, *frequency.shape)
  waves = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
  # Three colors that have most of their structure in common.
  waves = (waves[:3] * 0.3 + waves[3]) / frequency
  pixels = np.fft.irfft2(waves, (height, width))
  pixels = 120 + 55 * pixels / pixels.std((1, 2), keepdims=True)
  pixels = pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
  out = io.BytesIO()
  Image.fromarray(pixels).save(out, 'JPEG', quality=QUALITY)
  return out.getvalue()


def make(home, count):
  """Writes and prepares a set; returns the mean bytes of an image."""
  sizes = []
  for i in range(count):
    encoded = picture(i)
    sizes.append(len(encoded))
    for split in ('train', 'val') if i < 10 else ('train',):
      path = home / f'in/{split}/{i % 10}/{i}.jpg'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(encoded)
  folder.prepare(home / 'in', home)
  return statistics.mean(sizes)


def rate(work, images):
  """Images per second, and per second of processor time."""
  wall, cpu = time.perf_counter(), time.process_time()
  work()
  wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
  return images / wall, images / cpu


def measure(home, args):
  """Rates of (raw, pipeline) of every round."""
  split, _ = data.load('folder', data_dir=str(home), threads=args.threads)
  images: Any = split.images
  source = images.source
  encoded = [stored.parse(source[i]).image for i in range(len(split))]
  bits = np.random.Philox(0).random_raw((args.batch, geometry.WORDS))

  def raw():
    for i, words in enumerate(bits):
      decode.random_view(encoded[i % len(encoded)], 224, words, min_area=0.08)

  def pipeline(step):
    data.train_batch(
      split,
      step,
      batch_size=args.batch,
      seed=0,
      augment=AUGMENT,
      as_bytes=True,
    )

  raw()
  pipeline(0)
  found: dict[str, list] = {'raw': [], 'pipeline': []}
  for step in range(args.rounds):
    found['raw'].append(rate(raw, args.batch))
    found['pipeline'].append(
      rate(lambda step=step: pipeline(step + 1), args.batch)
    )
  return found


def summary(rounds, cores):
  """Medians over the rounds, and the share that the pipeline reaches.

  A round of the one follows a round of the other, so that the median of their
  ratios is less disturbed than the ratio of their medians.
  """
  result: dict[str, Any] = {}
  for name, rates in rounds.items():
    wall, cpu = (statistics.median(x) for x in zip(*rates))
    result[f'{name}_images_per_second'] = round(wall, 1)
    result[f'{name}_images_per_cpu_second'] = round(cpu, 1)
  pairs = list(zip(rounds['pipeline'], rounds['raw'], strict=True))
  shares = [p[0] / (cores * r[0]) for p, r in pairs]
  result['share_of_raw'] = round(statistics.median(shares), 3)
  shares = [p[1] / r[1] for p, r in pairs]
  result['share_of_raw_cpu'] = round(statistics.median(shares), 3)
  return result


def setting():
  """Command, commit, machine and versions."""
  commit = subprocess.run(
    ['git', 'rev-parse', '--short', 'HEAD'],
    capture_output=True,
    text=True,
    check=False,
    cwd=pathlib.Path(__file__).parent,
  )
  return {
    'command': ' '.join(['python', *sys.argv]),
    'commit': commit.stdout.strip(),
    'machine': f'{_processor()}, {machine.cores()} of {os.cpu_count()} cores',
    'versions': {
      'python': platform.python_version(),
      'numpy': np.__version__,
      'opencv': cv2.__version__,
      'simplejpeg': simplejpeg.__version__,
    },
  }


def _processor():
  path = pathlib.Path('/proc/cpuinfo')
  if path.is_file():
    for line in path.read_text().splitlines():
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  return platform.processor() or platform.machine()


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--images', type=int, default=256)
  parser.add_argument('--batch', type=int, default=256)
  parser.add_argument('--rounds', type=int, default=10)
  parser.add_argument('--threads', type=int, default=0, help='0: one per core')
  parser.add_argument('--out', help='JSON file to write')
  args = parser.parse_args()
  cores = min(args.threads or machine.cores(), machine.cores())
  with tempfile.TemporaryDirectory() as home:
    size = make(pathlib.Path(home), args.images)
    rounds = measure(pathlib.Path(home), args)
  result: dict[str, Any] = {
    **setting(),
    'mean_image_bytes': round(size),
    'batch': args.batch,
    'rounds': args.rounds,
    'threads': args.threads or machine.cores(),
    **summary(rounds, cores),
  }
  text = json.dumps(result, indent=1)
  print(text)
  if args.out:
    pathlib.Path(args.out).write_text(f'{text}\n')


if __name__ == '__main__':
  main()
