"""Four host devices and strict arithmetic, for every test.

Ranks never broadcast silently. Dtypes never promote silently either, except
in tests that run other people's arithmetic: optax schedules multiply int32
counts by float32, and flax norms mix bfloat16 with float32 statistics. Those
tests carry `pytest.mark.standard_promotion`, or live in a file named below.
"""

import atexit
import contextlib
import os
import shutil
import signal
import tempfile

# Before jax is imported: the parallel tests need several devices on a CPU.
_FLAG = '--xla_force_host_platform_device_count'
if _FLAG not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_FLAG}=4'

# What one test has compiled others find here, those in processes of their own
# too; each worker has its folder, since JAX writes into it without a lock. The
# first process to come here makes it, and removes it.
_COMPILED = 'DJPQ_TESTS_COMPILED'
if _COMPILED not in os.environ:
  os.environ[_COMPILED] = tempfile.mkdtemp(prefix='djpq-compiled-')
  atexit.register(shutil.rmtree, os.environ[_COMPILED], ignore_errors=True)
os.environ['JAX_COMPILATION_CACHE_DIR'] = os.path.join(
  os.environ[_COMPILED], os.environ.get('PYTEST_XDIST_WORKER', 'main')
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.05')

# These tests are for a CPU; JAX_PLATFORMS=cuda overrides.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import pytest

# A shell ignores Ctrl-C for what it runs in the background, and all processes
# that the tests start would, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')

# They run whole training loops, schedules and norms included.
_STANDARD_PROMOTION = {'cli_test', 'end_to_end_test', 'optim_test'}
_STANDARD_PROMOTION |= {'train_test', 'parallel_test'}


@pytest.fixture(scope='module')
def registered():
  """Lets models and data know 'tiny' while a module's tests run."""
  import tiny  # only now: it imports what is tested

  with tiny.registered():
    yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
  """Covers the fixtures of a test too, whatever their scope."""
  relaxed = (
    item.path.stem in _STANDARD_PROMOTION
    or item.get_closest_marker('standard_promotion') is not None
  )
  with contextlib.ExitStack() as stack:
    if relaxed:
      stack.enter_context(jax.numpy_dtype_promotion('standard'))
    return (yield)
