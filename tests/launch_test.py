"""The launchers print what they would run, and run it.

The programs that they call are stubs on the PATH, which write down what they
were given: `djpq`, `gcloud`, `kubectl`, and a SLURM of two dozen lines.
"""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / 'launch'
LAUNCHERS = ['local', 'tpu', 'slurm', 'kubernetes']
ODD = ["a b'c", 'd"e$f', '', '--set=g={1: 2}', 'h\\i*']
TRAIN = ['--config', 'digits', '--workdir', 'runs/my run', *ODD]
NAMED = {
  'local': [],
  'tpu': ['train', '--name', 'pod', '--zone', 'here-1a'],
  'slurm': [],
  'kubernetes': ['--name', 'digits', '--image', 'example.org/djpq:1'],
}

# Writes a line of JSON; ends with the next of the statuses that it is given.
STUB = """#!{python}
import fcntl, json, os, pathlib, signal, sys, time
name = pathlib.Path(sys.argv[0]).name
folder = pathlib.Path({folder!r})
keys = ('JAX_PLATFORMS', 'JAX_LOCAL_DEVICE_IDS', 'SLURM_PROCID')
call = dict(
  argv=sys.argv[1:], stdin='' if name == 'djpq' else sys.stdin.read(),
  env={{k: os.environ[k] for k in keys if k in os.environ}},
)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with open(folder / 'lock', 'w') as lock:
  fcntl.flock(lock, fcntl.LOCK_EX)
  statuses = folder / (name + '.statuses')
  todo = statuses.read_text().split() if statuses.exists() else []
  statuses.write_text(' '.join(todo[1:]))
  with open(folder / (name + '.jsonl'), 'a') as log:
    log.write(json.dumps(call) + '\\n')
status = todo[0] if todo else '0'
if status == 'hang':
  time.sleep(60)
  status = '99'
sys.exit(int(status))
"""

SBATCH = """#!/usr/bin/env bash
export SLURM_JOB_ID=7 SLURM_ARRAY_JOB_ID=5 SLURM_ARRAY_TASK_ID=2
cat > batch.sh
exec bash batch.sh < /dev/null
"""

SRUN = """#!/usr/bin/env bash
[ "$1" = --kill-on-bad-exit=1 ] && shift
worst=0
for SLURM_PROCID in 0 1; do
  export SLURM_PROCID
  status=0
  "$@" || status=$?
  [ "$status" -le "$worst" ] || worst=$status
done
exit "$worst"
"""


class Machine:
  """Where launchers run, and what their commands were called with."""

  def __init__(self, folder):
    self.folder = folder
    for name in ('djpq', 'gcloud', 'kubectl', 'scontrol'):
      self._write(name, STUB.format(python=sys.executable, folder=str(folder)))
    self._write('sbatch', SBATCH)
    self._write('srun', SRUN)
    self.env = os.environ | {'PATH': f'{folder}:{os.environ["PATH"]}'}
    self.env.pop('JAX_PLATFORMS', None)

  def _write(self, name, text):
    (self.folder / name).write_text(text)
    (self.folder / name).chmod(0o755)

  def ends(self, name, *statuses):
    """The statuses of the next calls of a stub; after them, 0."""
    (self.folder / f'{name}.statuses').write_text(' '.join(map(str, statuses)))

  def start(self, launcher, *args):
    return subprocess.Popen(
      [LAUNCH / f'{launcher}.sh', *args],
      env=self.env,
      cwd=self.folder,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def run(self, launcher, *args, status=0):
    """What it printed, of which one must be empty."""
    process = self.start(launcher, *args)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, out + err
    return err if status else out

  def calls(self, name):
    path = self.folder / f'{name}.jsonl'
    if not path.exists():
      return []
    return [json.loads(line) for line in path.read_text().splitlines()]

  def wait_for_calls(self, name, count):
    for _ in range(300):
      if len(self.calls(name)) == count:
        return
      time.sleep(0.1)
    raise AssertionError(f'{name} was called {len(self.calls(name))} times')


@pytest.fixture
def machine(tmp_path):
  return Machine(tmp_path)


def scripts():
  return sorted([*LAUNCH.glob('*.sh'), ROOT / '.ci/run'])


# All of them.


@pytest.mark.parametrize('path', scripts(), ids=lambda path: path.name)
def test_scripts_are_short_and_sound(path):
  assert len(path.read_text().splitlines()) < 100
  subprocess.run(['bash', '-n', path], check=True)
  shellcheck = pathlib.Path(sys.executable).parent / 'shellcheck'
  done = subprocess.run(
    [shellcheck, '-x', path], capture_output=True, text=True, cwd=ROOT
  )
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize('name', LAUNCHERS)
def test_help_names_every_option(machine, name):
  text = (LAUNCH / f'{name}.sh').read_text()
  options = set(re.findall(r'^ +(--[a-z-]+)( \| -h)?\)', text, re.M))
  shown = machine.run(name, '--help')
  assert 'djpq train' in shown
  for option, _ in options - {('--help', ' | -h')}:
    assert option in shown


@pytest.mark.parametrize('name', LAUNCHERS)
def test_dry_runs_run_nothing(machine, name):
  machine.run(name, *NAMED[name], '--dry-run', '--', *TRAIN)
  assert not list(machine.folder.glob('*.jsonl'))


@pytest.mark.parametrize('name', LAUNCHERS)
@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (['--', '--config', 'digits'], '--workdir is missing after --'),
    (['--', '--workdir=here'], '--config is missing after --'),
    ([], '--config is missing after --'),
    (['--', *TRAIN, '--overwrite'], '--overwrite begins anew at each start'),
    (['--restart', '--'], 'there is no option --restart'),
    (['--config', 'digits'], 'there is no option --config'),
  ],
)
def test_mistakes_are_one_sentence(machine, name, args, message):
  said = machine.run(name, *NAMED[name], *args, status=2)
  assert said.startswith(f'{name}.sh: {message}')
  assert said.count('\n') == 1
  assert not list(machine.folder.glob('*.jsonl'))


@pytest.mark.parametrize(
  ('name', 'args', 'message'),
  [
    ('local', ['--processes'], '--processes needs a value'),
    ('local', ['--processes', '0'], '--processes must be at least 1'),
    ('local', ['--restarts', 'x'], "must be a whole number, and is 'x'"),
    ('tpu', [], 'say one of create, install, train, stop, delete'),
    ('tpu', ['stop'], '--name is missing'),
    ('tpu', ['stop', '--name', 'pod'], '--zone is missing'),
    ('slurm', ['--per', 'core'], '--per must be node or gpu'),
    ('slurm', ['--per', 'gpu'], '--gpus must be at least 1, and is 0'),
    ('kubernetes', ['--image', 'x'], '--name is missing'),
    ('kubernetes', ['--name', 'x'], '--image is missing'),
    ('kubernetes', ['--select', 'x'], "--select takes KEY=VALUE, not 'x'"),
    (
      'kubernetes',
      [*NAMED['kubernetes'], '--gpus', '1', '--tpus', '4'],
      'give --gpus or --tpus, not both',
    ),
    (
      'kubernetes',
      [*NAMED['kubernetes'], '--sweep', '3', '--nodes', '2'],
      'a --sweep has one machine per run',
    ),
    (
      'kubernetes',
      [*NAMED['kubernetes'], '--sweep', '3'],
      'put $(JOB_COMPLETION_INDEX) into --workdir',
    ),
    ('slurm', ['--sweep', '3'], 'put $SLURM_ARRAY_TASK_ID into --workdir'),
  ],
)
def test_mistakes_in_options(machine, name, args, message):
  assert message in machine.run(name, *args, '--', *TRAIN, status=2)


# This machine.


def test_local_passes_arguments_on_unchanged(machine):
  machine.run('local', '--', *TRAIN)
  (call,) = machine.calls('djpq')
  assert call['argv'] == ['train', *TRAIN]
  assert call['env'] == {}


def test_local_dry_run_is_what_runs(machine):
  options = ['--processes', '2', '--port', '7000']
  printed = machine.run('local', *options, '--dry-run', '--', *TRAIN)
  machine.run('local', *options, '--', *TRAIN)
  called = sorted(call['argv'] for call in machine.calls('djpq'))
  env = ['env', 'JAX_PLATFORMS=cpu', 'djpq']
  assert [shlex.split(s) for s in printed.splitlines()] == [
    env + argv for argv in called
  ]
  for index, argv in enumerate(called):
    assert argv == [
      *('train', *TRAIN, '--coordinator', 'localhost:7000'),
      *('--process-count', '2', '--process-index', str(index)),
    ]
  for call in machine.calls('djpq'):
    assert call['env'] == {'JAX_PLATFORMS': 'cpu'}


@pytest.mark.parametrize(
  ('statuses', 'restarts', 'status', 'calls'),
  [
    ([143, 1, 0], 2, 0, 3),
    ([143, 137, 1, 0], 2, 1, 3),
    ([143], 0, 143, 1),
    ([2], 5, 2, 1),
    ([130], 5, 130, 1),
  ],
)
def test_local_restarts(machine, statuses, restarts, status, calls):
  machine.ends('djpq', *statuses)
  args = ['--restarts', str(restarts), '--', *TRAIN]
  machine.run('local', *args, status=status)
  assert len(machine.calls('djpq')) == calls
  assert all(c['argv'] == ['train', *TRAIN] for c in machine.calls('djpq'))


def test_local_restarts_all_processes(machine):
  machine.ends('djpq', 143, 143)
  machine.run('local', '--processes', '2', '--restarts', '1', '--', *TRAIN)
  assert len(machine.calls('djpq')) == 4


def test_local_ends_those_that_wait_for_one_that_failed(machine):
  machine.ends('djpq', 'hang', 1)
  started = time.monotonic()
  args = ['--processes', '2', '--grace', '0', '--', *TRAIN]
  machine.run('local', *args, status=1)
  assert time.monotonic() - started < 30


@pytest.mark.parametrize('processes', [1, 2])
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_local_passes_signals_on(machine, processes, number):
  machine.ends('djpq', *['hang'] * processes)
  count = ['--processes', str(processes)]
  process = machine.start('local', '--restarts', '3', *count, '--', *TRAIN)
  machine.wait_for_calls('djpq', processes)
  process.send_signal(number)
  process.communicate(timeout=30)
  assert process.returncode == 143
  assert len(machine.calls('djpq')) == processes


def test_local_says_that_djpq_is_missing(machine):
  (machine.folder / 'djpq').unlink()
  machine.env['PATH'] = '/usr/bin:/bin'
  said = machine.run('local', '--', *TRAIN, status=2)
  assert 'there is no djpq on the PATH' in said


# TPUs.


def tpu(machine, action, *args):
  """The call of gcloud, which is also what a dry run prints."""
  args = [*NAMED['tpu'][1:], *args]
  printed = machine.run('tpu', action, '--dry-run', *args)
  machine.run('tpu', action, *args)
  call = machine.calls('gcloud')[-1]
  assert shlex.split(printed) == ['gcloud', *call['argv']]
  return call['argv']


def test_tpu_trains_on_every_worker(machine):
  argv = tpu(machine, 'train', '--project', 'mine', '--', *TRAIN)
  head = 'compute tpus tpu-vm ssh pod --worker all --command'.split()
  assert argv[:8] == head
  assert argv[9:] == ['--zone', 'here-1a', '--project', 'mine']
  before, _, command = argv[8].partition('; ')
  command, _, after = command.partition(' || ')
  assert before == 'rm -f djpq-stop'
  assert shlex.split(command) == [
    *('djpq/bin/djpq', 'train', *TRAIN, '--distributed')
  ]
  assert after.startswith('{ s=$?; test ! -e djpq-stop || s=130')


@pytest.mark.parametrize(
  ('stopped', 'status', 'last'), [(False, 0, 3), (True, 130, 1)]
)
def test_tpu_starts_again_what_nobody_stopped(machine, stopped, status, last):
  """The VMs' shell runs what is sent: it sees what `stop` left there."""
  machine.ends('djpq', *[143] * 2)
  home = machine.folder / 'home'
  (home / 'djpq/bin').mkdir(parents=True)
  touch = 'touch djpq-stop; ' if stopped else ''
  program = home / 'djpq/bin/djpq'
  program.write_text(f'#!/bin/sh\n{touch}exec {machine.folder}/djpq "$@"\n')
  program.chmod(0o755)
  (home / 'djpq-stop').touch()  # of an earlier run
  gcloud = machine.folder / 'gcloud'
  gcloud.write_text(f'#!/bin/sh\ncd {home}\nexec bash -c "$9"\n')
  args = [*NAMED['tpu'], '--restarts', '2', '--', *TRAIN]
  process = machine.start('tpu', *args)
  process.communicate(timeout=60)
  assert process.returncode == status
  assert len(machine.calls('djpq')) == last


def test_tpu_asks_for_a_slice_and_gives_it_back(machine):
  options = ['--type', 'v5litepod-16', '--version', 'v2']
  argv = ' '.join(tpu(machine, 'create', *options, '--spot'))
  assert argv == (
    'compute tpus queued-resources create pod --node-id pod '
    '--accelerator-type v5litepod-16 --runtime-version v2 --spot '
    '--zone here-1a'
  )
  argv = ' '.join(tpu(machine, 'delete'))
  assert argv == (
    'compute tpus queued-resources delete pod --force --zone here-1a'
  )


def test_tpu_installs_and_stops(machine):
  package = 'djpq-jax[images] @ git+https://example.org/djpq.git'
  line = tpu(machine, 'install', '--package', package)[8]
  subprocess.run(['bash', '-n', '-c', line], check=True)
  assert shlex.split(line)[-2:] == ['jax[tpu]', package]
  assert tpu(machine, 'stop')[8] == 'touch djpq-stop; pkill -TERM -x djpq'


def test_tpu_restarts(machine):
  machine.ends('gcloud', 143, 255)
  machine.run('tpu', *NAMED['tpu'], '--restarts', '2', '--', *TRAIN)
  assert len(machine.calls('gcloud')) == 3
  machine.ends('gcloud', 2)
  args = ['--restarts', '2', '--', *TRAIN]
  machine.run('tpu', *NAMED['tpu'], *args, status=2)
  assert len(machine.calls('gcloud')) == 4


# SLURM.


def slurm(machine, *args):
  """Lines of the batch script."""
  script = machine.run('slurm', '--dry-run', *args, '--', *TRAIN)
  subprocess.run(['bash', '-n', '-c', script], check=True)
  return script.splitlines()


def test_slurm_one_process_per_node_has_all_of_its_gpus(machine):
  lines = slurm(machine, '--nodes', '2', '--gpus', '4', '--cpus', '32')
  for line in (
    '#SBATCH --nodes=2',
    '#SBATCH --ntasks-per-node=1',
    '#SBATCH --gpus-per-node=4',
    '#SBATCH --cpus-per-task=32',
    '#SBATCH --requeue',
    '#SBATCH --signal=TERM@120',
    'export JAX_LOCAL_DEVICE_IDS=0,1,2,3',
    'export SRUN_CPUS_PER_TASK=32',
  ):
    assert line in lines
  assert any(' --distributed || ' in line for line in lines)


def test_slurm_one_process_per_gpu(machine):
  lines = slurm(machine, '--gpus', '4', '--per', 'gpu', '--grace', '300')
  assert '#SBATCH --ntasks-per-node=4' in lines
  assert '#SBATCH --signal=TERM@300' in lines
  assert not any('LOCAL_DEVICE_IDS' in line for line in lines)
  assert any(' --distributed || ' in line for line in lines)


def test_slurm_one_process_is_not_distributed(machine):
  assert not any('--distributed' in line for line in slurm(machine))


def test_slurm_options_precede_commands(machine):
  flags = ['--sbatch', '--time=1:00:00', '--sbatch', '--comment="a b"']
  flags += ['--setup', 'module load cuda', '--setup', '. bin/activate']
  lines = slurm(machine, *flags)
  options = [i for i, line in enumerate(lines) if line.startswith('#SBATCH')]
  assert options == list(range(1, len(options) + 1))
  assert {'#SBATCH --time=1:00:00', '#SBATCH --comment="a b"'} <= set(lines)
  commands = lines[len(options) + 1 :]
  assert commands[:3] == ['set -e', 'module load cuda', '. bin/activate']


def test_slurm_passes_arguments_on_unchanged(machine):
  machine.run('slurm', '--nodes', '2', '--gpus', '2', '--', *TRAIN)
  calls = machine.calls('djpq')
  assert [c['env']['SLURM_PROCID'] for c in calls] == ['0', '1']
  for call in calls:
    assert call['argv'] == ['train', *TRAIN, '--distributed']
    assert call['env']['JAX_LOCAL_DEVICE_IDS'] == '0,1'
  assert not machine.calls('scontrol')


@pytest.mark.parametrize('status', [143, 1, 2])
def test_slurm_requeues_what_was_stopped_and_nothing_else(machine, status):
  machine.ends('djpq', status, status)
  machine.run('slurm', '--', *TRAIN, status=status)
  requeued = [call['argv'] for call in machine.calls('scontrol')]
  assert requeued == ([['requeue', '7']] if status == 143 else [])


def test_slurm_sweep_is_an_array(machine):
  folder = ['--workdir', '/shared/$SLURM_ARRAY_TASK_ID']
  args = ['--sweep', '3', '--', *TRAIN, *folder]
  odd = "it's $SLURM_ARRAY_TASK_ID of $HOME, $SLURM_ARRAY_TASK_ID"
  machine.ends('djpq', 143, 143)
  machine.run('slurm', *args, odd, status=143)
  argv = machine.calls('djpq')[0]['argv']
  folder = ['--workdir', '/shared/2']
  assert argv == ['train', *TRAIN, *folder, "it's 2 of $HOME, 2"]
  assert machine.calls('scontrol')[0]['argv'] == ['requeue', '5_2']
  script = machine.run('slurm', '--dry-run', *args)
  assert '#SBATCH --array=0-2' in script.splitlines()


def test_slurm_submits_what_the_dry_run_prints(machine):
  machine._write('sbatch', (machine.folder / 'kubectl').read_text())
  printed = machine.run('slurm', '--dry-run', '--', *TRAIN)
  machine.run('slurm', '--', *TRAIN)
  (call,) = machine.calls('sbatch')
  assert call == dict(argv=[], stdin=printed, env={})


# Kubernetes.


def manifest(machine, *args, train=()):
  """What a dry run prints, and kubectl gets."""
  args = [*NAMED['kubernetes'], *args, '--', *TRAIN, *train]
  printed = machine.run('kubernetes', '--dry-run', *args)
  machine.run('kubernetes', *args)
  call = machine.calls('kubectl')[-1]
  assert call == dict(argv=['apply', '-f', '-'], stdin=printed, env={})
  return yaml.safe_load(printed)


def job_of(found):
  (workers,) = found['spec']['replicatedJobs']
  assert workers['name'] == 'workers'
  assert workers['replicas'] == 1
  return workers['template']['spec']


def container_of(job):
  (container,) = job['template']['spec']['containers']
  return container


def test_kubernetes_one_machine(machine):
  found = manifest(machine)
  assert found['apiVersion'] == 'jobset.x-k8s.io/v1alpha2'
  assert found['kind'] == 'JobSet'
  assert found['metadata'] == {'name': 'digits'}
  container = container_of(job_of(found))
  assert container['image'] == 'example.org/djpq:1'
  assert container['command'] + container['args'] == ['djpq', 'train', *TRAIN]
  assert 'resources' not in container


def test_kubernetes_restarts_all_pods_but_after_mistakes(machine):
  found = manifest(machine, '--nodes', '2', '--restarts', '4')
  assert found['spec']['failurePolicy'] == {
    'maxRestarts': 4,
    'rules': [
      {'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}
    ],
  }
  job = job_of(found)
  assert job['backoffLimit'] == 0  # a pod alone does not start again
  assert job['template']['spec']['restartPolicy'] == 'Never'
  assert job['podFailurePolicy']['rules'] == [
    {'action': 'FailJob', 'onExitCodes': {'operator': 'In', 'values': [2]}}
  ]


def test_kubernetes_machines_with_gpus_meet_at_the_first(machine):
  label = ['--select', 'gpu.example.org/kind=h 100']
  found = manifest(
    machine,
    *('--nodes', '2', '--gpus', '8', *label, '--select', 'a=true'),
    *('--volume', 'claim', '--namespace', 'team'),
  )
  assert found['metadata']['namespace'] == 'team'
  assert found['spec']['network']['enableDNSHostnames'] is True
  job = job_of(found)
  assert job['completionMode'] == 'Indexed'
  assert job['completions'] == job['parallelism'] == 2
  container = container_of(job)
  assert container['args'][len(TRAIN) :] == [
    *('--coordinator', 'digits-workers-0-0.digits:12345'),
    *('--process-count', '2', '--process-index', '$(JOB_COMPLETION_INDEX)'),
  ]
  assert container['resources']['limits'] == {'nvidia.com/gpu': 8}
  pod = job['template']['spec']
  assert pod['nodeSelector'] == {
    'gpu.example.org/kind': 'h 100',
    'a': 'true',
  }
  (mount,), (volume,) = container['volumeMounts'], pod['volumes']
  assert mount == {'name': volume['name'], 'mountPath': '/data'}
  assert volume['persistentVolumeClaim'] == {'claimName': 'claim'}


def test_kubernetes_tpus_find_each_other(machine):
  found = manifest(machine, '--nodes', '4', '--tpus', '4')
  container = container_of(job_of(found))
  assert container['args'] == [*TRAIN, '--distributed']
  assert container['resources']['limits'] == {'google.com/tpu': 4}
  (pool,) = found['metadata']['annotations'].values()
  assert pool == 'cloud.google.com/gke-nodepool'


def test_kubernetes_sweep_is_an_indexed_job(machine):
  folder = ['--workdir', '/data/$(JOB_COMPLETION_INDEX)']
  found = manifest(machine, '--sweep', '3', '--restarts', '4', train=folder)
  assert (found['apiVersion'], found['kind']) == ('batch/v1', 'Job')
  job = found['spec']
  assert job['completionMode'] == 'Indexed'
  assert job['completions'] == job['parallelism'] == 3
  assert job['backoffLimitPerIndex'] == 4
  assert job['podFailurePolicy']['rules'][0]['action'] == 'FailIndex'
  assert container_of(job)['args'] == [*TRAIN, *folder]


def test_kubernetes_refuses_line_breaks(machine):
  args = [*NAMED['kubernetes'], '--', *TRAIN, 'a\nb']
  assert 'line break' in machine.run('kubernetes', *args, status=2)


# The page.


def console_examples(text):
  """(command, output) of each `console` block."""
  for block in re.findall(r'```console\n(.*?)```', text, re.S):
    command, _, output = block.replace('\\\n', '').partition('\n')
    assert command.startswith('$ ')
    yield command.removeprefix('$ '), output


def test_page_shows_what_dry_runs_print(machine):
  examples = list(console_examples((ROOT / 'docs/launch.md').read_text()))
  shown = ''.join(command for command, _ in examples)
  assert all(f'launch/{name}.sh' in shown for name in LAUNCHERS)
  for command, output in examples:
    assert '--dry-run' in command
    done = subprocess.run(
      ['bash', '-c', command],
      cwd=ROOT,
      env=machine.env,
      capture_output=True,
      text=True,
      check=True,
    )
    assert done.stdout == output
