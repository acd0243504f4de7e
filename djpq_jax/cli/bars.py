"""Progress on a terminal, or line by line in a log file."""

import rich.console
import rich.progress

PHASES = {
  'float': 'float training',
  'search': 'searching channels and bits',
  'finetune': 'finetuning',
}


class Bars:
  """One progress bar per phase; in a log file, a line every tenth of it."""

  def __init__(self, console: rich.console.Console):
    self._console = console
    self._progress = rich.progress.Progress(
      rich.progress.TextColumn('{task.description:<28}'),
      rich.progress.BarColumn(bar_width=20),
      rich.progress.MofNCompleteColumn(),
      rich.progress.TimeRemainingColumn(compact=True),
      rich.progress.TextColumn('{task.fields[note]}'),
      console=console,
      # By default of half a minute, in which there may be no two looks.
      speed_estimate_period=3600,
      disable=not console.is_terminal,
    )
    self._tasks: dict[str, rich.progress.TaskID] = {}
    self._tenths: dict[str, int] = {}

  def __enter__(self):
    self._progress.start()
    return self

  def __exit__(self, *_):
    self._progress.stop()

  def show(self, phase: str, step: int, steps: int, metrics: dict) -> None:
    """Moves the bar of a phase."""
    if self._console.quiet:
      return
    note = note_of(phase, metrics)
    if not self._console.is_terminal:
      tenth = 10 * step // steps
      if tenth > self._tenths.get(phase, 0):
        print(f'{PHASES[phase]}: step {step} of {steps}  {note}', flush=True)
      self._tenths[phase] = tenth
      return
    if phase not in self._tasks:
      self._tasks[phase] = self._progress.add_task(
        PHASES[phase], total=steps, note=''
      )
    self._progress.update(self._tasks[phase], completed=step, note=note)


def note_of(phase: str, metrics: dict) -> str:
  """What is worth knowing while one waits."""
  note = f'loss {metrics["task_loss"]:.3f}'
  if phase == 'search':
    note += f'  BOPs {metrics["relative_bops"]:.3%}'
    bits = metrics['mean_weight_bits'], metrics['mean_act_bits']
    note += '  bits {:.1f}/{:.1f}'.format(*bits)
    note += f'  channels {metrics["kept_fraction"]:.0%}'
    for name in ('macs', 'weights'):
      if f'relative_{name}' in metrics:
        note += f'  {name} {metrics[f"relative_{name}"]:.2%}'
  if 'eval_accuracy' in metrics:
    note += f'  accuracy {metrics["eval_accuracy"]:.1%}'
  return note + f'  {metrics["images_per_second"]:,.0f} images/s'
