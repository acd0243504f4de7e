"""The step is pure, counts its failures, and goes where the objective says."""

import functools

import chex
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from djpq_jax import budget as budget_lib
from djpq_jax import compress
from djpq_jax import data
from djpq_jax import losses
from djpq_jax import optim
from djpq_jax import train

STEPS = 30
RATES = optim.OptimizerConfig(
  learning_rate=3e-3, quantizer_rate=5e-2, gate_rate=0.2, decay_gates=False
)


def batch_at(step):
  return tiny.batch(32, seed=step)


def leaves(tree):
  """All numbers of a tree by path; those of keys are their words."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    found[jax.tree_util.keystr(path)] = np.array(leaf)
  return found


def assert_same_bits(a, b):
  a, b = leaves(a), leaves(b)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], name)


def copied(state):
  """A state that may be donated; it shares the program and what is compiled."""
  return jax.tree.map(jnp.copy, state)


class Counted:
  """A jitted step that counts how often it is traced."""

  def __init__(self):
    self.traces = 0
    self.step = jax.jit(self._step, donate_argnums=0)

  def _step(self, state, batch):
    self.traces += 1
    return train.train_step(state, batch)

  def __call__(self, state, batch):
    return self.step(state, batch)


def searching(strength, rules=()):
  objective = train.Objective(
    noisy=True, kl_weight=1e-3, strength=strength, ramp_steps=STEPS // 2
  )
  model = tiny.compressed(rules=rules)
  return train.init(model, objective, optim.make(RATES, STEPS), seed=7)


@pytest.fixture(scope='module')
def search():
  """A fresh state of a compressed model; copy it before a step."""
  return searching(0.02)


@pytest.fixture(scope='module')
def still():
  """A search whose optimizer does nothing."""
  objective = train.Objective(
    noisy=True, kl_weight=0.01, strength=0.1, ramp_steps=4
  )
  return train.init(tiny.compressed(), objective, optax.set_to_zero(), seed=3)


def plain(objective=None, optimizer=None, kind=tiny.Mlp, **kwargs):
  objective = objective or train.Objective()
  return train.init(
    tiny.make(kind), objective, optimizer or optax.sgd(0.1), **kwargs
  )


class Affine(nnx.Module):
  """Logits x @ w + b, all zeros to begin with."""

  def __init__(self):
    self.w = nnx.Param(jnp.zeros((2, 2)))
    self.b = nnx.Param(jnp.zeros((2,)))

  def __call__(self, x):
    return x @ self.w[...] + self.b[...][None]


def affine():
  """The state and batch of an example that fits on paper."""
  images = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)
  batch = {'image': images, 'label': np.array([0, 1], np.int32)}
  return train.init(Affine(), train.Objective(), optax.sgd(0.1)), batch


@pytest.mark.parametrize('accumulate', [1, 2])
def test_bytes_are_normalized_in_the_step(accumulate):
  rng = np.random.default_rng(0)
  label = rng.integers(0, tiny.CLASSES, 8, np.int32)
  levels = rng.integers(0, 256, (8, *tiny.SHAPE), np.uint8)
  pixels = data.Pixels(mean=(0.5,), std=(0.25,))
  images = (levels / 255 - 0.5) / 0.25
  found = [
    train.jit_step(
      plain(
        train.Objective(distill=0.5),
        teacher=tiny.make(tiny.Mlp),
        pixels=pixels,
        accumulate=accumulate,
      ),
      {'image': image, 'label': label},
    )
    for image in (levels, images.astype(np.float32))
  ]
  (got, got_metrics), (wanted, wanted_metrics) = found
  chex.assert_trees_all_close(got.params, wanted.params, rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_close(got_metrics, wanted_metrics, rtol=1e-5)


def test_bytes_are_counted_as_what_they_mean():
  rng = np.random.default_rng(0)
  levels = rng.integers(0, 256, (64, *tiny.SHAPE), np.uint8)
  pixels = data.Pixels(mean=(0.5,), std=(0.25,))
  state = plain(pixels=pixels)
  batch = {
    'label': rng.integers(0, tiny.CLASSES, 64, np.int32),
    'mask': np.ones(64, np.float32),
  }
  images = ((levels / 255 - 0.5) / 0.25).astype(np.float32)
  chex.assert_trees_all_equal(
    train.eval_step(state, batch | {'image': levels}),
    train.eval_step(state, batch | {'image': images}),
  )


def test_bytes_without_their_meaning_are_refused():
  image = np.zeros((2, *tiny.SHAPE), np.uint8)
  batch = {'image': image, 'label': np.zeros(2, np.int32)}
  with pytest.raises(ValueError, match='or give train'):
    train.jit_step(plain(), batch)


@pytest.mark.parametrize('step', [train.train_step, train.jit_step])
def test_golden_step(step):
  # Both classes have probability 1/2, so dL/dlogits = (p - y) / B is
  # [[-1/4, 1/4], [1/4, -1/4]]; the images carry it to w.
  state, metrics = step(*affine())
  weights = state.params['weights']
  np.testing.assert_allclose(
    weights['w'], [[0.025, -0.025], [-0.05, 0.05]], atol=1e-8
  )
  np.testing.assert_allclose(weights['b'], [0.0, 0.0], atol=1e-8)
  assert float(metrics['loss']) == pytest.approx(np.log(2), abs=1e-7)
  assert float(metrics['task_loss']) == float(metrics['loss'])
  assert float(metrics['accuracy']) == 0.5  # argmax of a tie is class 0
  assert int(state.step) == 1
  assert int(state.bad_steps) == 0


def test_step_does_not_change_its_inputs():
  state, batch = affine()
  before, images = leaves(state), batch['image'].copy()
  train.train_step(state, batch)
  for name, leaf in leaves(state).items():
    np.testing.assert_array_equal(leaf, before[name], name)
  np.testing.assert_array_equal(batch['image'], images)


def test_same_inputs_same_bits(search):
  before = leaves(search)
  first, metrics = train.jit_step(copied(search), batch_at(0))
  second, again = train.jit_step(copied(search), batch_at(0))
  assert_same_bits((first, metrics), (second, again))
  for name, leaf in leaves(search).items():
    np.testing.assert_array_equal(leaf, before[name], name)


def test_jit_step_equals_train_step():
  state = plain(train.Objective(smoothing=0.1))
  eager, expected = train.train_step(state, batch_at(0))
  state, metrics = train.jit_step(state, batch_at(0))
  for name, value in metrics.items():
    np.testing.assert_allclose(value, expected[name], rtol=1e-6, err_msg=name)
  for name, leaf in leaves(state.params).items():
    other = leaves(eager.params)[name]
    np.testing.assert_allclose(leaf, other, rtol=1e-6, atol=1e-6, err_msg=name)


def test_state_is_donated_and_the_model_survives(search):
  state = copied(search)
  train.jit_step(state, batch_at(0))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.opt_state))
  # What was given to init belongs to the caller.
  model, teacher = tiny.make(tiny.Normed), tiny.make(tiny.Normed, seed=1)
  x = tiny.batch()['image']
  objective = train.Objective(distill=0.5)
  state = train.init(model, objective, optax.sgd(0.1), teacher=teacher)
  state, _ = train.jit_step(state, tiny.batch())
  assert compress.eval_view(model)(x).shape == (16, tiny.CLASSES)
  assert compress.eval_view(teacher)(x).shape == (16, tiny.CLASSES)


def test_batch_norm_statistics_advance():
  model = tiny.make(tiny.Normed)
  batch = tiny.batch(32)
  state = train.init(model, train.Objective(), optax.sgd(0.1))
  state, _ = train.jit_step(state, batch)
  x = np.asarray(model.conv(batch['image']))
  mean = 0.9 * np.asarray(model.bn.mean[...]) + 0.1 * x.mean((0, 1, 2))
  var = 0.9 * np.asarray(model.bn.var[...]) + 0.1 * x.var((0, 1, 2))
  new = train.model_of(state)
  np.testing.assert_allclose(new.bn.mean[...], mean, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(new.bn.var[...], var, rtol=1e-5, atol=1e-6)
  assert new.bn.use_running_average


def test_noise_differs_per_step_and_the_ramp_rises(still):
  state, costs, tasks = copied(still), [], []
  for _ in range(6):  # always the same batch, and nothing is learned
    state, metrics = train.jit_step(state, batch_at(0))
    costs.append(float(metrics['loss'] - metrics['task_loss']))
    tasks.append(float(metrics['task_loss']))
  assert_same_bits(state.params, still.params)
  assert len(set(tasks)) == 6
  np.testing.assert_allclose(
    np.divide(costs, costs[-1]), [0.25, 0.5, 0.75, 1, 1, 1], rtol=1e-4
  )
  kl = float(losses.gate_kl(train.model_of(still)))
  relative = float(metrics['relative_bops'])
  full = 0.01 * kl + 0.1 * np.log(relative)
  assert costs[-1] == pytest.approx(full, rel=1e-4)
  # Which noise is drawn depends on the seed and the step's number alone.
  other = {**vars(copied(still)), 'key': jax.random.key(4)}
  _, metrics = train.jit_step(train.TrainState(**other), batch_at(0))
  assert float(metrics['task_loss']) not in tasks
  _, metrics = train.jit_step(copied(still), batch_at(0))
  assert float(metrics['task_loss']) == tasks[0]


def test_resumed_run_has_the_bits_of_a_straight_one(search):
  straight = train.fit(copied(search), batch_at, 6, log_every=3)
  first = train.fit(copied(search), batch_at, 2)
  on = train.fit(copied(first), batch_at, 6, log_every=1)
  assert_same_bits(on, straight)
  # Nothing is left to do: not even the batch is asked for.
  assert_same_bits(train.fit(copied(on), None, 6), straight)


def test_fit_logs_floats_at_the_rate_and_at_the_end(search):
  log = {}
  train.fit(copied(search), batch_at, 5, log_every=2, on_log=log.__setitem__)
  assert list(log) == [2, 4, 5]
  for metrics in log.values():
    assert all(isinstance(v, float) for v in metrics.values())
  for name in ('loss', 'task_loss', 'accuracy', 'relative_bops'):
    assert name in metrics
  assert metrics['kept_fraction'] == 1
  assert metrics['mean_weight_bits'] == pytest.approx(8, abs=1)


def test_fit_evaluates_now_and_then_and_saves_what_it_saw(search):
  log, saved = {}, {}

  def evaluate(state):
    return int(state.step) / 100

  train.fit(
    copied(search),
    batch_at,
    5,
    log_every=3,
    on_log=log.__setitem__,
    save=lambda state, accuracy: saved.update({int(state.step): accuracy}),
    save_every=3,
    evaluate=evaluate,
    evaluate_every=2,
  )
  assert {k: v.get('eval_accuracy') for k, v in log.items()} == saved
  assert saved == {2: 0.02, 3: None, 4: 0.04, 5: 0.05}


def test_eval_step_leaves_out_what_fills_a_batch_up(search):
  batch = batch_at(0) | {'mask': np.float32([1] * 20 + [0] * 12)}
  logits = train.model_of(search)(batch['image'])
  right = np.argmax(logits, -1) == batch['label']
  found = train.eval_step(search, batch)
  assert list(map(float, found)) == [right[:20].sum(), 20]


def test_fit_passes_on_what_the_data_raise(search):
  def broken(step):
    if step == 2:
      raise OSError('the disk is gone')
    return batch_at(step)

  with pytest.raises(OSError, match='the disk is gone'):
    train.fit(copied(search), broken, 5)


def test_strength_lowers_bops(search):
  def after(state):
    log = {}
    train.fit(copied(state), batch_at, STEPS, on_log=log.__setitem__)
    return log[STEPS]['relative_bops']

  _, metrics = train.jit_step(copied(search), batch_at(0))
  start = float(metrics['relative_bops'])
  weak, strong = after(search), after(searching(1.0))
  assert strong < 0.7 * weak
  assert weak < start


def test_budget_is_approached_without_recompiling():
  model, budget, steps = tiny.compressed(), 0.01, 400
  start = float(losses.relative_bops(model))
  controller = budget_lib.Controller(budget=budget, start=start, steps=steps)
  objective = train.Objective(noisy=True, controller=controller)
  rates = optim.OptimizerConfig(
    quantizer_rate=2e-2, gate_rate=5e-2, decay_gates=False
  )
  state = train.init(model, objective, optim.make(rates, steps))
  step, log = Counted(), {}
  train.fit(state, batch_at, steps, on_log=log.__setitem__, step_fn=step)
  assert step.traces == 1
  assert start > log[100]['relative_bops'] > log[steps]['relative_bops']
  assert log[steps]['relative_bops'] == pytest.approx(budget, rel=0.2)
  assert log[steps]['accuracy'] > 0.8


@pytest.mark.parametrize('fraction', [0.0, 1.0, -0.1, 2.0, float('nan')])
def test_budget_is_a_fraction(fraction):
  with pytest.raises(ValueError, match='between 0 and 1'):
    budget_lib.Controller(budget=fraction, start=0.1, steps=5)


def test_pmap_agrees_with_one_device():
  devices = jax.local_device_count()
  # Away from the bounds of the bits: at a bound the last bit of the step
  # decides which parameter a gradient goes to.
  rules = [compress.Rule(pattern='*', act_bits=(2, 8))]
  model = compress.compress(
    tiny.make(tiny.Mlp), rules, tiny.batch(64)['image'], bits=6.0
  )
  one = train.init(model, train.Objective(strength=0.05), optax.sgd(0.1))
  batch = tiny.batch(8 * devices)
  many = jax.tree.map(lambda x: jnp.stack([x] * devices), one)
  shards = jax.tree.map(lambda x: x.reshape(devices, 8, *x.shape[1:]), batch)
  pmap_step = jax.pmap(
    functools.partial(train.train_step, axis_name='data'), axis_name='data'
  )
  many, many_metrics = pmap_step(many, shards)
  before = leaves(one.params)
  one, metrics = train.jit_step(one, batch)
  moved = 0.0
  replicas, expected = leaves(many.params), leaves(one.params)
  for name, leaf in expected.items():
    for replica in replicas[name]:
      np.testing.assert_array_equal(replica, replicas[name][0], name)
    np.testing.assert_allclose(
      replicas[name][0], leaf, atol=1e-6, rtol=1e-6, err_msg=name
    )
    moved = max(moved, np.abs(leaf - before[name]).max())
  assert moved > 1e-3
  for name, value in metrics.items():
    np.testing.assert_allclose(
      many_metrics[name], np.full(devices, value), rtol=1e-5, err_msg=name
    )


def test_pmap_draws_other_noise_on_each_device(still):
  devices = jax.local_device_count()
  if devices == 1:
    pytest.skip('one device')
  many = jax.tree.map(lambda x: jnp.stack([x] * devices), still)
  batch = tiny.batch(8)
  shards = jax.tree.map(lambda x: np.stack([x] * devices), batch)

  def noisy_loss(state, batch):
    """What a device sees before it is averaged with the others."""
    key = jax.random.fold_in(state.key, state.step)
    key = jax.random.fold_in(key, jax.lax.axis_index('data'))
    return train.train_step(state, batch, axis_name='data')[1], key

  metrics, keys = jax.pmap(noisy_loss, axis_name='data')(many, shards)
  model = train.model_of(still)

  @jax.jit
  def loss(key):
    logits = model(batch['image'], gate_key=key)
    return losses.cross_entropy(logits, batch['label'])

  each = [float(loss(key)) for key in keys]
  assert len(set(each)) == devices
  np.testing.assert_allclose(
    metrics['task_loss'], np.full(devices, np.mean(each)), rtol=1e-5
  )


def test_bad_step_changes_nothing_but_the_counters(search):
  bad = batch_at(0)
  bad['image'][3, 1, 1] = np.nan
  state, metrics = train.jit_step(copied(search), bad)
  assert_same_bits(
    (state.params, state.rest, state.opt_state),
    (search.params, search.rest, search.opt_state),
  )
  assert (int(state.step), int(state.bad_steps)) == (1, 1)
  assert int(metrics['bad_steps']) == 1
  state, metrics = train.jit_step(state, batch_at(1))
  assert (int(state.step), int(state.bad_steps)) == (2, 1)
  assert np.isfinite(metrics['loss'])
  assert all(np.isfinite(x).all() for x in leaves(state.params).values())


def test_bad_pixels_stop_the_run_and_name_the_step(search):
  def one_bad(step):
    batch = batch_at(step)
    if step == 3:
      batch['image'][0] = np.nan
    return batch

  message = 'stopped at step 6: the batch of step 3 has pixels that are not'
  with pytest.raises(train.TrainingError, match=message):
    train.fit(copied(search), one_bad, 9, log_every=6)


def with_weight(state, path, value):
  """The state with one entry of a weight set."""
  state = copied(state)
  weights = state.params['weights']
  *parents, name = path.split('/')
  for parent in parents:
    weights = weights[parent]
  weights[name] = weights[name].at[0, 0].set(value)
  return state


def test_a_step_keeps_all_dtypes_with_64_bits_on():
  """Else the next one is compiled anew, and no checkpoint fits."""
  with jax.enable_x64(True):
    before = searching(0.02)
    after, _ = jax.eval_shape(train.train_step, before, tiny.batch())
  dtypes = lambda tree: jax.tree.map(lambda leaf: leaf.dtype, tree)
  assert jax.tree.leaves_with_path(dtypes(after)) == (
    jax.tree.leaves_with_path(dtypes(before))
  )


def test_bad_weights_stop_the_run_and_are_named(search):
  broken = with_weight(search, 'model/hidden/kernel', np.nan)
  with pytest.raises(train.TrainingError, match='variable model/hidden/kernel'):
    train.fit(broken, batch_at, 4)
  broken = with_weight(plain(), 'head/kernel', np.inf)
  with pytest.raises(train.TrainingError, match='variable head/kernel'):
    train.fit(broken, batch_at, 4)


@pytest.mark.slow
def test_overflow_stops_the_run_and_names_the_layer():
  huge = np.finfo(np.float32).max
  # Bits of grids that may have one are counted up to twice the clip.
  rules = [compress.Rule(pattern='*', weight_bits=(2, 8))]
  state = with_weight(searching(0.02, rules), 'model/hidden/kernel', huge)
  quantizers = state.params['quantizers']
  hook = quantizers['model']['hidden']['promote_dtype']['weight']
  hook['log_clip'] = jnp.full_like(hook['log_clip'], 88.7)
  hook['log_step'] = jnp.full_like(hook['log_step'], 83.9)
  with pytest.raises(train.TrainingError, match='the input of layer head'):
    train.fit(state, batch_at, 4)


def test_exploding_rate_stops_the_run():
  state, last = plain(optimizer=optax.sgd(1e30)), []

  def watched(state, batch):
    last[:] = [train.jit_step(state, batch)[0]]
    return last[0], {'bad_steps': last[0].bad_steps}

  with pytest.raises(train.TrainingError, match='lower the learning rate'):
    train.fit(state, batch_at, 9, step_fn=watched)
  assert all(np.isfinite(x).all() for x in leaves(last[0].params).values())


def test_distillation_needs_a_teacher():
  with pytest.raises(ValueError, match=r'distill=0\.5 needs a teacher'):
    plain(train.Objective(distill=0.5))


def test_a_student_that_equals_its_teacher_has_nothing_to_learn():
  objective = train.Objective(distill=1.0, temperature=4.0)
  state = plain(objective, teacher=tiny.make(tiny.Mlp))
  before = leaves(state.params)
  teacher = leaves(state.teacher)
  state, _ = train.jit_step(state, tiny.batch())
  for name, leaf in leaves(state.params).items():
    np.testing.assert_allclose(leaf, before[name], atol=1e-7, err_msg=name)
  for name, leaf in leaves(state.teacher).items():
    np.testing.assert_array_equal(leaf, teacher[name], name)


def test_collapsed_layers_are_named():
  model, x = tiny.compressed(), tiny.batch()['image']
  train.check_alive(model, x)
  bias, kernel = model.model.hidden.bias, model.model.head.kernel
  alive = bias[...]
  bias.set_value(jnp.full((12,), -100.0))  # relu lets nothing through
  with pytest.raises(train.TrainingError, match=r'head has .* its input roun'):
    train.check_alive(model, x)
  bias.set_value(alive)
  kernel.set_value(jnp.full(kernel.shape, 1e-6))
  with pytest.raises(train.TrainingError, match=r'head has .* its kernel rou'):
    train.check_alive(model, x)
