"""The primitives in a model of another library: gates and bits in Flax Linen.

    python examples/linen_primitives.py

The functions of `djpq_jax.ops` and `djpq_jax.cost` need nothing but arrays, so
the layer below is all there is to it: it gates and quantizes its input,
quantizes its kernel, and says what it costs.
"""

from flax import linen
import jax
import jax.numpy as jnp
import optax

import djpq_jax
from djpq_jax import cost
from djpq_jax import data

STEPS = 400
GAMMA, STRENGTH = 1e-4, 0.1  # of the gates' KL, and of log BOPs


class Dense(linen.Module):
  """A dense layer with learned gates, grids and costs."""

  features: int

  @linen.compact
  def __call__(self, x, key=None):
    inputs = x.shape[-1]
    kernel = self.param(
      'kernel', linen.initializers.lecun_normal(), (inputs, self.features)
    )
    bias = self.param('bias', linen.initializers.zeros, (self.features,))
    mu = self.param('mu', linen.initializers.ones, (inputs,))
    log_sigma2 = self.param(
      'log_sigma2', linen.initializers.constant(-4.0), (inputs,)
    )
    grids = {}
    for name, clip in (('weight', 0.5), ('act', 4.0)):
      log_clip = self.param(
        f'{name}_clip', linen.initializers.constant(jnp.log(clip)), ()
      )
      # 127 levels on each side: eight bits to begin with.
      start = linen.initializers.constant(jnp.log(clip / 127))
      log_step = self.param(f'{name}_step', start, ())
      grids[name] = jnp.exp(log_step), jnp.exp(log_clip)

    is_open = djpq_jax.is_open(mu, log_sigma2)
    gate = jnp.where(is_open, mu, 0.0)
    if key is not None:
      gate = djpq_jax.sample_gate(key, mu, log_sigma2, x.shape)
    # A hard count that still tells the variance which way is down.
    soft = djpq_jax.keep_prob(jax.lax.stop_gradient(mu), log_sigma2)
    keep = is_open + soft - jax.lax.stop_gradient(soft)
    use = cost.LayerUse(
      name=self.name,
      macs=inputs * self.features,
      weights=inputs * self.features,
      keep_in=jnp.mean(keep),
      keep_out=1,
      weight_bits=djpq_jax.bit_width(*grids['weight']),
      act_bits=djpq_jax.bit_width(*grids['act']),
    )
    kl = djpq_jax.gate_kl(mu, log_sigma2)
    x = djpq_jax.quantize(x * gate, *grids['act'])
    return x @ djpq_jax.quantize(kernel, *grids['weight']) + bias, kl, use


class Net(linen.Module):
  """Two such layers."""

  @linen.compact
  def __call__(self, x, key=None):
    keys = [None, None] if key is None else jax.random.split(key)
    x, kl1, use1 = Dense(64)(x.reshape(len(x), -1), keys[0])
    x, kl2, use2 = Dense(10)(jax.nn.relu(x), keys[1])
    return x, kl1 + kl2, (use1, use2)


def main():
  train_split, test_split = data.load('digits')
  net = Net()
  images = jnp.zeros((2, *train_split.images.shape[1:]))
  params = net.init(jax.random.key(0), images)
  optimizer = optax.adam(1e-2)

  def relative_bops(uses):
    return cost.relative_bops(uses, cost.float_bops(uses))

  def loss(params, batch, key):
    logits, kl, uses = net.apply(params, batch['image'], key)
    task = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['label']
    ).mean()
    return task + GAMMA * kl + STRENGTH * jnp.log(relative_bops(uses))

  @jax.jit
  def step(params, state, batch, key):
    grads = jax.grad(loss)(params, batch, key)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state

  state = optimizer.init(params)
  for i in range(STEPS):
    batch = data.train_batch(train_split, i, batch_size=64, seed=0)
    params, state = step(params, state, batch, jax.random.key(i))

  batch = data.train_batch(test_split, 0, batch_size=len(test_split), seed=0)
  logits, _, uses = net.apply(params, batch['image'])
  for use in uses:
    print(
      f'{use.name}: {float(use.keep_in):.0%} of the inputs, '
      f'{float(use.weight_bits):.1f} x {float(use.act_bits):.1f} bits'
    )
  accuracy = float((logits.argmax(-1) == batch['label']).mean())
  relative = float(relative_bops(uses))
  print(f'{accuracy:.1%} at {relative:.2%} of the BOPs')


if __name__ == '__main__':
  main()
