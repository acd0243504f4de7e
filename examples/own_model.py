"""Prunes and quantizes a model of your own to 1 % of its bit operations.

python examples/own_model.py
"""

from flax import nnx

from djpq_jax import allocate
from djpq_jax import budget
from djpq_jax import compress
from djpq_jax import data
from djpq_jax import evaluation
from djpq_jax import harden
from djpq_jax import losses
from djpq_jax import optim
from djpq_jax import train

BUDGET = 0.01  # of the bit operations in float32
STEPS = 300  # of each training


class Net(nnx.Module):
  """Any nnx model will do; this one knows nothing of compression."""

  def __init__(self, rngs):
    self.conv1 = nnx.Conv(1, 24, (3, 3), rngs=rngs)
    self.conv2 = nnx.Conv(24, 48, (3, 3), strides=2, rngs=rngs)
    self.head = nnx.Linear(48, 10, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.conv1(x))
    x = nnx.relu(self.conv2(x))
    return self.head(x.mean((1, 2)))


def main():
  train_split, test_split = data.load('digits')

  def batch_at(step):
    return data.train_batch(train_split, step, batch_size=64, seed=0)

  def fit(model, rates, **objective):
    optimizer = optim.make(optim.OptimizerConfig(**rates), STEPS)
    state = train.init(model, train.Objective(**objective), optimizer)
    return train.model_of(train.fit(state, batch_at, STEPS))

  images = batch_at(0)['image']
  model = fit(Net(nnx.Rngs(0)), {'learning_rate': 1e-2})
  net = compress.compress(model, x=images)
  controller = budget.Controller(
    budget=BUDGET, start=float(losses.relative_bops(net)), steps=STEPS
  )
  rates = {'quantizer_rate': 3e-2, 'gate_rate': 6e-2}
  net = fit(net, rates, noisy=True, controller=controller)
  net = compress.freeze(net, allocate.plan(net, BUDGET), images)
  hardened = harden.harden(fit(net, {}))

  rows = harden.count(hardened, images)
  for row in rows:
    print(
      f'{row.name}: {row.kept_out} of {row.out_size} channels, '
      f'{row.weight_bits} x {row.act_bits} bits'
    )
  relative = harden.totals(hardened, rows)['relative_bops']
  before = evaluation.evaluate(model, test_split)
  after = evaluation.evaluate(hardened, test_split)
  print(f'{before:.1%} -> {after:.1%} at {relative:.3%} of the BOPs')


if __name__ == '__main__':
  main()
