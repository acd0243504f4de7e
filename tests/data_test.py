import hashlib
import os
import tempfile
import threading
import time

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from djpq_jax import data
from djpq_jax.data import pipeline
from djpq_jax.data import sources

DATA_DIR = os.environ.get('DJPQ_DATA_DIR')

DIGITS_TEST_LABELS = [0, 4, 2, 7, 7, 9, 1, 9, 0, 9]
DIGITS_TEST_SHA256 = (
  'e6632efe2668497eccdaf87818cc370a1da0473cec743ecd498369ac8e94a6ef'
)
SOURCES = {'digits', 'cifar10', 'synthetic', 'imagenet', 'folder'}
HELD_OUT = [0, 2, 9]
STREAM = [[8, 4, 3], [6, 2, 1], [0, 5, 7]]


def numbered(size=10, shape=(4, 4, 1)):
  """A split whose image i is filled with i, so that a batch names its rows."""
  images = np.zeros((size, *shape), np.float32)
  images += np.arange(size, dtype=np.float32)[:, None, None, None]
  labels = np.arange(size, dtype=np.int32)
  return data.Split(images, labels, size, 'numbered')


def labels_of(split, steps, **kwargs):
  kwargs = dict(batch_size=3, seed=0) | kwargs
  return [
    data.train_batch(split, step, **kwargs)['label'].tolist() for step in steps
  ]


def assert_batches_equal(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key])


class SplitTest(parameterized.TestCase):
  def make(self, **changes):
    fields = dict(
      images=np.zeros((3, 2, 2, 1), np.float32),
      labels=np.array([0, 1, 2], np.int32),
      num_classes=3,
      name='toy/train',
    )
    return data.Split(**fields | changes)

  def test_accepts(self):
    self.assertLen(self.make(), 3)
    self.assertLen(self.make(images=np.zeros((3, 2, 2, 1), np.uint8)), 3)

  @parameterized.parameters(
    (
      dict(images=np.zeros((3, 2, 2), np.float32)),
      r'\[N, H, W, C\].*\(3, 2, 2',
    ),
    (dict(images=[[0.0]]), 'NumPy array.*got list'),
    (dict(images=np.zeros((3, 2, 2, 1))), 'uint8 or float32; got float64'),
    (dict(images=np.zeros((0, 2, 2, 1), np.uint8)), r'empty, shape \(0, 2'),
    (dict(images=np.zeros((3, 0, 2, 1), np.uint8)), r'empty, shape \(3, 0'),
    (dict(labels=np.zeros(2, np.int32)), r'shape \(3,\), one per.*\(2,\)'),
    (dict(labels=np.zeros((3, 1), np.int32)), r'got \(3, 1\)'),
    (dict(labels=np.zeros(3)), 'int32; got.*float64'),
    (dict(labels=[0, 1, 2]), 'int32; got list'),
    (dict(labels=np.array([0, 3, 5], np.int32)), 'label 3 at index 1.*0..2'),
    (dict(labels=np.array([0, 1, -1], np.int32)), 'label -1 at index 2'),
    (dict(mean=(0.0, 0.0)), 'mean must have 1 or 1 values'),
    (dict(std=(0.0,)), 'std must be positive'),
  )
  def test_refuses(self, changes, message):
    with self.assertRaisesRegex(ValueError, f'^toy/train: .*{message}'):
      self.make(**changes)

  @parameterized.parameters(np.nan, np.inf)
  def test_refuses_pixels_that_are_not_finite(self, value):
    images = np.zeros((3, 2, 2, 1), np.float32)
    images[1:, 0, 1] = value
    with self.assertRaisesRegex(ValueError, 'image 1 has .* one of 2'):
      self.make(images=images)


class LoadTest(parameterized.TestCase):
  def test_digits_sizes_and_scale(self):
    train, test = data.load('digits')
    self.assertEqual(train.images.shape, (1400, 8, 8, 1))
    self.assertEqual(test.images.shape, (397, 8, 8, 1))
    self.assertEqual(train.images.dtype, np.float32)
    self.assertEqual((train.images.min(), train.images.max()), (0.0, 1.0))
    self.assertSetEqual(set(test.labels.tolist()), set(range(10)))

  def test_digits_are_split_disjoint_and_complete(self):
    from sklearn import datasets

    rows = lambda x: sorted(map(bytes, (x * 16).astype(np.uint8)))
    both = np.concatenate([s.images for s in data.load('digits')])
    self.assertEqual(rows(both), rows(datasets.load_digits().data / 16))

  def test_digits_never_change(self):
    """The numbers of the documentation hold for this split only."""
    _, test = data.load('digits')
    self.assertEqual(test.labels[:10].tolist(), DIGITS_TEST_LABELS)
    self.assertEqual(
      hashlib.sha256(test.images.tobytes()).hexdigest(), DIGITS_TEST_SHA256
    )

  @parameterized.parameters('digits', 'synthetic')
  def test_same_bits_again(self, name):
    for a, b in zip(data.load(name), data.load(name), strict=True):
      np.testing.assert_array_equal(a.images, b.images)
      np.testing.assert_array_equal(a.labels, b.labels)

  def test_synthetic_is_what_was_asked_for(self):
    train, test = data.load(
      'synthetic', shape=(5, 6, 2), classes=3, train_size=40, test_size=7
    )
    self.assertEqual(train.images.shape, (40, 5, 6, 2))
    self.assertEqual(test.images.shape, (7, 5, 6, 2))
    self.assertEqual(train.num_classes, 3)
    self.assertSetEqual(set(train.labels.tolist()), {0, 1, 2})

  def test_synthetic_can_be_learned(self):
    """The nearest class mean of train, far above the 10 % of chance."""
    train, test = data.load('synthetic')
    flat = lambda split: split.images.reshape(len(split), -1).astype(float)
    x = flat(train)
    means = np.stack([x[train.labels == c].mean(0) for c in range(10)])
    scores = flat(test) @ means.T - (means**2).sum(1) / 2
    self.assertGreater((scores.argmax(1) == test.labels).mean(), 0.9)

  @parameterized.parameters(
    ('digit', {}, "no data source 'digit'; did you mean 'digits'.*synthetic"),
    ('?', {}, "no data source '\\?'; known: cifar10, digits"),
    ('synthetic', dict(shap=1), "no argument 'shap'; did you mean 'shape'"),
    ('digits', dict(shape=1), "digits takes no argument 'shape'$"),
    ('synthetic', dict(shape=28), "refuses {'shape': 28}: .*int"),
  )
  def test_refuses(self, name, kwargs, message):
    with self.assertRaisesRegex(ValueError, message):
      data.load(name, **kwargs)

  def test_absent_cifar10_says_how_to_get_it(self):
    with tempfile.TemporaryDirectory() as folder:
      message = f'not in {folder!r}.*djpq data cifar10 --out {folder}'
      with self.assertRaisesRegex(FileNotFoundError, message):
        data.load('cifar10', data_dir=folder)

  @absltest.skipUnless(DATA_DIR, 'DJPQ_DATA_DIR names no folder with cifar10')
  def test_cifar10(self):
    train, test = data.load('cifar10', data_dir=DATA_DIR)
    self.assertEqual(train.images.shape, (50_000, 32, 32, 3))
    self.assertEqual(test.images.shape, (10_000, 32, 32, 3))
    self.assertEqual(np.bincount(train.labels).tolist(), [5000] * 10)
    self.assertEqual(np.bincount(test.labels).tolist(), [1000] * 10)
    pixels = pipeline.normalize(test.images, test)
    np.testing.assert_allclose(
      pixels.mean((0, 1, 2)), [0.04, 0.13, 0.2], atol=0.01
    )


class HoldOutTest(parameterized.TestCase):
  def test_parts_make_up_the_split(self):
    rest, held = data.hold_out(numbered(), 0.3)
    self.assertLen(held, 3)
    both = [*rest.labels, *held.labels]
    self.assertCountEqual(both, range(10))
    for part in (rest, held):
      self.assertSequenceEqual(list(part.labels), sorted(part.labels))
      np.testing.assert_array_equal(part.images[:, 0, 0, 0], part.labels)

  def test_never_changes(self):
    _, held = data.hold_out(numbered(), 0.3)
    self.assertEqual(held.labels.tolist(), HELD_OUT)

  @parameterized.parameters(0.01, 0.99)
  def test_refuses_an_empty_part(self, share):
    with self.assertRaisesRegex(ValueError, '10 images would hold out'):
      data.hold_out(numbered(), share)


class TrainBatchTest(parameterized.TestCase):
  def test_shapes_and_types(self):
    train, _ = data.load('synthetic', shape=(6, 5, 3), train_size=20)
    augment = data.Augment(shift=1, flip=True)
    batch = data.train_batch(train, 0, batch_size=8, seed=0, augment=augment)
    self.assertEqual(batch['image'].shape, (8, 6, 5, 3))
    self.assertEqual(batch['image'].dtype, np.float32)
    self.assertEqual(batch['label'].shape, (8,))
    self.assertEqual(batch['label'].dtype, np.int32)

  def test_images_stay_with_their_labels(self):
    batch = data.train_batch(numbered(), 5, batch_size=4, seed=1)
    np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], batch['label'])

  def test_an_epoch_takes_each_image_once(self):
    self.assertEqual(data.steps_per_epoch(numbered(12), 3), 4)
    for epoch in range(3):
      steps = range(4 * epoch, 4 * epoch + 4)
      labels = np.ravel(labels_of(numbered(12), steps))
      self.assertEqual(sorted(labels), list(range(12)))

  def test_the_rest_of_an_epoch_is_dropped(self):
    self.assertEqual(data.steps_per_epoch(numbered(10), 3), 3)
    labels = np.ravel(labels_of(numbered(10), range(3)))
    self.assertLen(set(labels.tolist()), 9)

  def test_epochs_and_seeds_differ(self):
    split = numbered(12)
    first = labels_of(split, range(4))
    self.assertNotEqual(first, labels_of(split, range(4, 8)))
    self.assertNotEqual(first, labels_of(split, range(4), seed=1))
    self.assertEqual(first, labels_of(split, range(4)))

  def test_stream_never_changes(self):
    """A resumed run may meet a newer NumPy: its bits are pinned here."""
    self.assertEqual(labels_of(numbered(9), range(3), seed=7), STREAM)

  def test_resumes_at_any_step(self):
    split = data.load('synthetic', shape=(6, 6, 3), train_size=50)[0]
    make = lambda step: data.train_batch(
      split,
      step,
      batch_size=8,
      seed=3,
      augment=data.Augment(shift=2, flip=True),
    )
    stream = [make(step) for step in range(15)]
    pipeline._epoch_order.cache_clear()
    for step in (14, 7, 9):
      assert_batches_equal(make(step), stream[step])

  @parameterized.parameters(1, 2, 4)
  def test_shares_make_up_the_global_batch(self, count):
    split = data.load('synthetic', shape=(6, 6, 3), train_size=50)[0]
    kwargs = dict(
      batch_size=8, seed=3, augment=data.Augment(shift=2, flip=True)
    )
    shares = [
      data.train_batch(split, 9, process_index=i, process_count=count, **kwargs)
      for i in range(count)
    ]
    union = {k: np.concatenate([s[k] for s in shares]) for k in shares[0]}
    assert_batches_equal(union, data.train_batch(split, 9, **kwargs))

  def test_bytes_stay_bytes_if_asked_for(self):
    images = np.arange(8 * 4 * 4 * 3, dtype=np.uint16).reshape(8, 4, 4, 3)
    images = (images % 256).astype(np.uint8)
    labels = np.zeros(8, np.int32)
    split = data.Split(images, labels, 1, 'some/train', (0.4,) * 3, (0.2,) * 3)
    augment = data.Augment(shift=1, flip=True)
    same = dict(batch_size=4, seed=0, augment=augment)
    levels = data.train_batch(split, 0, as_bytes=True, **same)['image']
    self.assertEqual(levels.dtype, np.uint8)
    wanted = data.train_batch(split, 0, **same)['image']
    np.testing.assert_array_equal(pipeline.normalize(levels, split), wanted)
    bright = data.Split(images / np.float32(255), labels, 1, 'float/train')
    found = data.train_batch(bright, 0, as_bytes=True, **same)['image']
    self.assertEqual(found.dtype, np.float32)

  def test_does_not_touch_the_split(self):
    split, _ = data.load('synthetic', shape=(6, 6, 3), train_size=20)
    before = split.images.copy()
    data.train_batch(
      split, 0, batch_size=20, seed=0, augment=data.Augment(shift=2, flip=True)
    )
    np.testing.assert_array_equal(split.images, before)

  @parameterized.parameters(
    (dict(batch_size=0), 'batch_size must be in 1..10.*got 0'),
    (dict(batch_size=11), 'numbered: batch_size must be in 1..10.*got 11'),
    (dict(step=-1), 'step and seed must be >= 0; got -1'),
    (dict(seed=-2), 'step and seed must be >= 0; got 0 and -2'),
    (dict(process_count=3), 'batch_size 4 is not a multiple of.* 3'),
    (dict(process_index=2, process_count=2), 'got 2 of 2'),
    (dict(process_count=0), 'got 0 of 0'),
  )
  def test_refuses(self, changes, message):
    kwargs = dict(step=0, batch_size=4, seed=0) | changes
    with self.assertRaisesRegex(ValueError, message):
      data.train_batch(numbered(), **kwargs)

  def test_refuses_a_negative_shift(self):
    with self.assertRaisesRegex(ValueError, 'shift must be >= 0.*got -1'):
      data.Augment(shift=-1)


class AugmentTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.RandomState(0)
    self.images = rng.randint(1, 256, (200, 5, 6, 2)).astype(np.uint8)
    labels = np.arange(200, dtype=np.int32)
    self.split = data.Split(self.images, labels, 200, 'random')

  def batch(self, step=0, **kwargs):
    batch = data.train_batch(
      self.split, step, batch_size=200, seed=0, augment=data.Augment(**kwargs)
    )
    return np.round(batch['image'] * 255), self.images[batch['label']]

  def test_none_changes_nothing(self):
    np.testing.assert_array_equal(*self.batch())

  def test_flip_mirrors_about_half(self):
    new, old = self.batch(flip=True)
    same = (new == old).all((1, 2, 3))
    mirrored = (new == old[:, :, ::-1]).all((1, 2, 3))
    self.assertTrue((same | mirrored).all())
    self.assertBetween(mirrored.mean(), 0.35, 0.65)

  def test_shift_moves_by_every_allowed_amount(self):
    new, old = self.batch(shift=1)
    shifts = [self.shift_between(a, b) for a, b in zip(old, new, strict=True)]
    self.assertLen(set(shifts), 9)

  def shift_between(self, old, new):
    """The one (rows, columns) that explains `new`, zeros coming in."""
    padded = np.pad(old, ((1, 1), (1, 1), (0, 0)))
    cuts = {
      (i, j): padded[i : i + 5, j : j + 6] for i in range(3) for j in range(3)
    }
    (found,) = (k for k, cut in cuts.items() if np.array_equal(cut, new))
    return found

  def test_steps_draw_anew(self):
    (a, old_a), (b, old_b) = self.batch(0, flip=True), self.batch(1, flip=True)
    self.assertNotEqual(
      (a == old_a).all((1, 2, 3)).tolist(), (b == old_b).all((1, 2, 3)).tolist()
    )


class NormalizeTest(absltest.TestCase):
  def test_bytes_and_floats(self):
    images = np.array([[[[0, 51, 255]]]], np.uint8)
    label = np.zeros(1, np.int32)
    mean, std = (0.5, 0.2, 0.0), (0.5, 0.1, 2.0)
    split = data.Split(images, label, 1, 'bytes', mean, std)
    expected = np.array([[[[-1, 0, 0.5]]]])
    np.testing.assert_allclose(
      pipeline.normalize(images, split), expected, atol=1e-6
    )
    floats = (images / 255).astype(np.float32)
    split = data.Split(floats, label, 1, 'floats', mean, std)
    np.testing.assert_allclose(
      pipeline.normalize(floats, split), expected, atol=1e-6
    )

  def test_default_leaves_floats_alone(self):
    split = numbered()
    np.testing.assert_array_equal(
      pipeline.normalize(split.images, split), split.images
    )


class EvalBatchesTest(parameterized.TestCase):
  @parameterized.parameters((1, 10), (3, 4), (5, 2), (10, 1), (16, 1))
  def test_counts_every_image_once(self, batch_size, batches):
    found = list(data.eval_batches(numbered(), batch_size))
    self.assertLen(found, batches)
    seen = []
    for batch in found:
      self.assertEqual(batch['image'].shape, (batch_size, 4, 4, 1))
      self.assertEqual(batch['label'].dtype, np.int32)
      self.assertEqual(batch['mask'].dtype, np.float32)
      real = batch['mask'] > 0
      np.testing.assert_array_equal(
        batch['image'][real, 0, 0, 0], batch['label'][real]
      )
      self.assertEqual(np.abs(batch['image'][~real]).sum(), 0)
      seen += batch['label'][real].tolist()
    self.assertEqual(seen, list(range(10)))

  def test_masked_accuracy_is_exact(self):
    """Zero is a class too: without the mask the fill would count."""
    batches = list(data.eval_batches(numbered(), 4))
    correct = sum(((b['label'] == 0) * b['mask']).sum() for b in batches)
    self.assertEqual(correct / sum(b['mask'].sum() for b in batches), 0.1)

  @parameterized.parameters(2, 4)
  def test_shares_make_up_the_global_batches(self, count):
    shares = [
      list(
        data.eval_batches(numbered(), 8, process_index=i, process_count=count)
      )
      for i in range(count)
    ]
    whole = list(data.eval_batches(numbered(), 8))
    for *parts, expected in zip(*shares, whole, strict=True):
      union = {k: np.concatenate([p[k] for p in parts]) for k in expected}
      assert_batches_equal(union, expected)

  def test_refuses_at_the_call(self):
    with self.assertRaisesRegex(ValueError, 'batch_size must be >= 1; got 0'):
      data.eval_batches(numbered(), 0)
    with self.assertRaisesRegex(ValueError, 'not a multiple'):
      data.eval_batches(numbered(), 5, process_count=2)


class PrefetchTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 50)
  def test_same_items_in_order(self, depth):
    self.assertEqual(list(data.prefetch(range(20), depth)), list(range(20)))
    self.assertEqual(list(data.prefetch([], depth)), [])

  def test_raises_after_the_good_items(self):
    def items():
      yield 1
      raise KeyError('lost')

    stream = data.prefetch(items())
    self.assertEqual(next(stream), 1)
    with self.assertRaisesRegex(KeyError, 'lost'):
      next(stream)

  def test_works_ahead_by_depth_and_no_more(self):
    made, third = [], threading.Event()

    def items():
      for i in range(20):
        made.append(i)
        if i == 3:
          third.set()
        yield i

    stream = data.prefetch(items(), 2)
    next(stream)
    self.assertTrue(third.wait(10))  # 0 taken, 1 and 2 queued, 3 in hand
    time.sleep(0.05)
    self.assertEqual(made, [0, 1, 2, 3])
    stream.close()

  @parameterized.parameters('close', 'drop')
  def test_stops_its_thread(self, how):
    before = threading.active_count()
    stream = data.prefetch(iter(int, 1), 3)
    next(stream)
    self.assertEqual(threading.active_count(), before + 1)
    if how == 'close':
      stream.close()
    del stream
    self.assertEqual(threading.active_count(), before)

  def test_starts_no_thread_before_it_is_used(self):
    before = threading.active_count()
    stream = data.prefetch(range(3))
    self.assertEqual(threading.active_count(), before)
    self.assertLen(list(stream), 3)

  def test_refuses_at_the_call(self):
    with self.assertRaisesRegex(ValueError, 'depth must be >= 1; got 0'):
      data.prefetch([], 0)


class NamesTest(absltest.TestCase):
  def test_sources_are_listed(self):
    self.assertEqual(set(sources.SOURCES), SOURCES)


if __name__ == '__main__':
  absltest.main()
