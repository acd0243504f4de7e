"""HGQ2 on the digits: Keras 3 on JAX, learned bits for each single number.

Run by benchmarks/compare_peers.py, in an environment of its own.  As its
documents recommend, weights have 'kbi' and inputs 'kif' quantizers, and
`trace_minmax` finds the integer bits at the end.  The float weights are those
that DJPQ begins with, batch norm folded in; a channel's integer bits cover its
largest weight.

HGQ2 has no budget but a coefficient, `beta`, of its own BOPs in the loss.  It
rises over the first part of a training to its value, which is searched for
each budget, see searching.py.
"""

import argparse
import os

os.environ['KERAS_BACKEND'] = 'jax'

import counting
import feeding
from hgq import config as hgq_config
from hgq import layers as hgq_layers
from hgq.quantizer import QuantizerConfig
from hgq.utils import sugar
from hgq.utils import trace_minmax
import keras
from keras import ops
import numpy as np
import searching

RATE = 5e-3  # bits are learned at it, too: less, and they hardly move
RISE = 0.3  # of the epochs, in which beta grows a hundredfold to its value
WEIGHT_BITS, ACT_FRACTION = 4, 3  # to begin with; without the sign
# For 0.2 %, and how BOPs fall, as six trainings of seed 0 before had it.
SEARCH = searching.Search(first=1.35e-6, slope=0.75)


class Epochs(keras.utils.PyDataset):
  """`feeding.Batches` as Keras wants them."""

  def __init__(self, batches):
    super().__init__()
    self.batches = batches
    self.on_epoch_end()

  def __len__(self):
    return len(self.batches)

  def __getitem__(self, index):
    images, labels, teacher = self.epoch[index]
    targets = np.concatenate([np.eye(10)[labels], teacher], axis=1)
    return images, targets.astype(np.float32)

  def on_epoch_end(self):
    """Draws the next epoch."""
    self.epoch = list(self.batches.epoch())


def loss(targets, logits):
  """Half the labels, half the teacher: as the other contestants."""
  labels, teacher = targets[:, :10], targets[:, 10:]
  hard = keras.losses.categorical_crossentropy(labels, logits, from_logits=True)
  warm = feeding.TEMPERATURE
  soft = keras.losses.categorical_crossentropy(
    ops.softmax(teacher / warm), logits / warm, from_logits=True
  )
  return 0.5 * hard + 0.5 * warm**2 * soft


def build(given) -> keras.Model:
  """The digits' network, from the float weights."""

  def weight(k):
    kernel, _ = feeding.folded(given, k)
    axes = tuple(range(kernel.ndim - 1))
    largest = np.abs(kernel).max(axis=axes, keepdims=True)
    bits = np.broadcast_to(np.ceil(np.log2(largest + 1e-9)), kernel.shape)
    return dict(
      kq_conf=QuantizerConfig(
        'kbi',
        'weight',
        b0=keras.initializers.Constant(float(WEIGHT_BITS)),
        i0=keras.initializers.Constant(bits.astype(np.float32)),
      )
    )

  same = dict(padding='same', activation='relu')
  with (
    hgq_config.QuantizerConfigScope(
      place='all', default_q_type='kbi', overflow_mode='SAT_SYM'
    ),
    hgq_config.QuantizerConfigScope(
      place='datalane',
      default_q_type='kif',
      overflow_mode='WRAP',
      f0=ACT_FRACTION,
    ),
    hgq_config.LayerConfigScope(enable_ebops=True, beta0=0.0),
  ):
    model = keras.Sequential(
      [
        keras.layers.Input(given['test'].shape[1:]),
        hgq_layers.QConv2D(32, 3, **same, **weight(0)),
        hgq_layers.QConv2D(32, 3, **same, **weight(1)),
        keras.layers.MaxPooling2D(2),
        hgq_layers.QConv2D(64, 3, **same, **weight(2)),
        hgq_layers.QConv2D(64, 3, **same, **weight(3)),
        keras.layers.Flatten(),
        hgq_layers.QDense(10, **weight(4)),
      ]
    )
  for k, layer in enumerate(quantized(model)):
    kernel, bias = feeding.folded(given, k)
    layer.kernel.assign(kernel)
    layer.bias.assign(bias)
  return model


def quantized(model):
  """The layers with bits."""
  return [layer for layer in model.layers if hasattr(layer, 'kq')]


class Trainer:
  """Trains one model again and again, so that it is compiled once."""

  def __init__(self, given, epochs: int, seed: int):
    self.given, self.epochs, self.seed = given, epochs, seed
    keras.utils.set_random_seed(seed)
    self.model = build(given)
    steps = epochs * len(feeding.Batches(given, seed))
    rate = keras.optimizers.schedules.CosineDecay(RATE, steps)
    self.model.compile(keras.optimizers.Adam(rate), loss)
    self.model.optimizer.build(self.model.trainable_variables)
    self.state = [self.model, self.model.optimizer]
    self.start = [[np.array(v) for v in s.variables] for s in self.state]

  def __call__(self, beta: float) -> dict:
    """What comes out of a training with this coefficient."""
    for owner, values in zip(self.state, self.start):
      for variable, value in zip(owner.variables, values):
        variable.assign(value)
    rise = max(1, round(RISE * self.epochs))
    schedule = sugar.PieceWiseSchedule(
      [(0, beta / 100, 'log'), (rise, beta, 'constant')]
    )
    batches = feeding.Batches(self.given, self.seed)
    self.model.fit(
      Epochs(batches),
      epochs=self.epochs,
      verbose=0,
      callbacks=[sugar.BetaScheduler(schedule)],
    )
    return self.export()

  def export(self) -> dict:
    """Logits, bits of every number, loss on training images, and BOPs."""
    images, labels, teacher = feeding.tiled(self.given)
    trace_minmax(self.model, images)
    made = {
      'logits': self.model.predict(self.given['test'], verbose=0),
      'loss': feeding.loss(
        self.model.predict(images, batch_size=1024, verbose=0), labels, teacher
      ),
    }
    for k, layer in enumerate(quantized(self.model)):
      shape = (1, *layer.input.shape[1:])
      kernel = layer.kernel.shape
      # `fbits_` has the sign; a weight that is rounded to 0 needs nothing.
      bits = np.asarray(layer.kq.fbits_(kernel))
      made[f'weight_bits{k}'] = bits * (np.asarray(layer.qkernel) != 0)
      made[f'act_bits{k}'] = np.asarray(layer.iq.fbits_(shape))[0]
    return made | {'bops': counting.bops(made)[0]}


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
  trainer = Trainer(dict(np.load(args.given)), args.epochs, args.seed)
  for k, made in enumerate(SEARCH(trainer, args.targets)):
    np.savez(f'{args.made}/{k}.npz', **made)


if __name__ == '__main__':
  main()
