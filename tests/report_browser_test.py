"""The HTML page in a real Chromium; `make browser` installs one.

Set PICTURES=FOLDER to keep the screenshots and look at them.
"""

import os
import pathlib
import shutil

from PIL import Image
import pytest
import sample_report

from djpq_jax import report as report_lib

NAMES = 'chromium-headless-shell chromium chromium-browser google-chrome'


@pytest.fixture(scope='module')
def browser():
  sync_api = pytest.importorskip(
    'playwright.sync_api', reason='playwright is not installed: make browser'
  )
  found = next(filter(None, map(shutil.which, NAMES.split())), None)
  with sync_api.sync_playwright() as playwright:
    own = playwright.chromium.executable_path
    if not found and not pathlib.Path(own).exists():
      pytest.skip('there is no Chromium here: make browser')
    try:
      launched = playwright.chromium.launch(executable_path=found)
    except sync_api.Error as error:
      reason = str(error).splitlines()[0]
      pytest.skip(f'{found or own} does not start: {reason}')
    yield launched
    launched.close()


@pytest.fixture(scope='module')
def pages(tmp_path_factory):
  """The page of one run, and that of three."""
  folder = tmp_path_factory.mktemp('pages')
  make = sample_report.run
  runs = [make('a'), make('b', accuracy=0.8), make('c', relative_bops=0.01)]
  return (
    report_lib.write_page(runs[:1], folder / 'one.html'),
    report_lib.write_page(runs, folder / 'many.html'),
  )


@pytest.fixture
def opened(browser):
  """Opens a page; at the end there must have been no error on its console."""
  errors, contexts = [], []

  def open_page(path, **options):
    contexts.append(browser.new_context(offline=True, **options))
    tab = contexts[-1].new_page()
    tab.on('console', lambda message: errors.append(message.text))
    tab.on('pageerror', lambda error: errors.append(str(error)))
    tab.on('request', lambda r: r.url.startswith('http') and errors.append(r))
    tab.goto(path.as_uri())
    return tab

  yield open_page
  for context in contexts:
    context.close()
  assert errors == []


def column(tab, number):
  cells = tab.locator(f'#run0-layers tbody tr > :nth-child({number})')
  return [
    float(v) for v in cells.evaluate_all('a => a.map(c => c.dataset.value)')
  ]


def test_table_sorts(opened, pages):
  tab = opened(pages[0])
  before = column(tab, 7)
  head = tab.get_by_role('columnheader', name='BOPs', exact=True)
  button = head.get_by_role('button')
  button.click()
  assert column(tab, 7) == sorted(before, reverse=True) != before
  assert head.get_attribute('aria-sort') == 'descending'
  button.press('Enter')
  assert column(tab, 7) == sorted(before)
  assert head.get_attribute('aria-sort') == 'ascending'
  assert 'sorted by BOPs, ascending' in tab.locator('#said').inner_text()
  tab.get_by_role('columnheader', name='Layer').get_by_role('button').click()
  assert column(tab, 7) == before  # the order of execution
  assert tab.locator('[aria-sort]').count() == 1


def test_numbers_by_pointer_and_keyboard(opened, pages):
  tab = opened(pages[0])
  tip = tab.locator('#tip')
  assert tip.is_hidden()
  tab.locator('#run0-layers tbody tr').nth(1).hover()
  assert '829,440 BOPs, 81.61 % of the model' in tip.inner_text()
  drawn = tab.locator('#run0-training svg[role=img]').nth(1)
  drawn.hover()
  assert 'model:' in tip.inner_text()
  drawn.press('Home')
  assert tip.inner_text() == 'step 20, search\nmodel: 25 %'
  drawn.press('ArrowRight')
  assert tip.inner_text() == 'step 30, search\nmodel: 12.5 %'
  assert 'step 30' in tab.locator('#said').inner_text()
  drawn.press('Escape')
  assert tip.is_hidden()


def test_weights_of_any_layer(opened, pages):
  tab = opened(pages[0])
  shown = tab.locator('.grids:visible h3')
  assert shown.all_inner_texts() == ['conv1']
  tab.get_by_label('Layer', exact=True).select_option('fc')
  assert shown.all_inner_texts() == ['fc']
  tab.get_by_role('button', name='conv2').press('Enter')
  assert shown.all_inner_texts() == ['conv2']
  focused = tab.evaluate('document.activeElement.tagName')
  assert focused == 'SELECT'


def test_runs_are_tabs(opened, pages):
  tab = opened(pages[1])
  shown = tab.locator('article:visible')
  assert shown.count() == 1
  tab.get_by_role('tab', name='a').press('ArrowRight')
  assert shown.locator('h2').inner_text() == 'b'
  tab.get_by_role('link', name='c').click()
  # The page follows its address by an event that comes after the click.
  tab.get_by_role('tab', name='c', selected=True).wait_for()
  assert shown.locator('h2').inner_text() == 'c'
  assert tab.get_by_role('tab', selected=True).inner_text() == 'c'
  tab.emulate_media(media='print')
  assert shown.count() == 3


def test_everything_can_be_reached_by_tab(opened, pages):
  tab = opened(pages[0])
  wanted = tab.evaluate(
    'document.querySelectorAll(\'a, button, select, summary, [tabindex="0"]\')'
    '.values().filter(e => e.checkVisibility()).toArray().length'
  )
  seen = set()
  for _ in range(wanted):
    tab.keyboard.press('Tab')
    seen.add(
      tab.evaluate("""() => {
        const e = document.activeElement;
        const style = getComputedStyle(e);
        return [...document.querySelectorAll('*')].indexOf(e)
          + ' ' + (style.outlineStyle !== 'none');
      }""")
    )
  assert len(seen) == wanted
  assert all(found.endswith('true') for found in seen)


def test_without_script_all_is_there(browser, pages):
  context = browser.new_context(java_script_enabled=False)
  tab = context.new_page()
  tab.goto(pages[1].as_uri())
  assert tab.locator('article:visible').count() == 3
  assert tab.locator('.grids:visible').count() == 9
  assert tab.locator('.choose:visible, .tabs:visible').count() == 0
  context.close()


@pytest.mark.parametrize(
  ('name', 'options'),
  [
    ('light', {'color_scheme': 'light'}),
    ('dark', {'color_scheme': 'dark'}),
    ('narrow', {'viewport': {'width': 400, 'height': 800}}),
  ],
)
def test_pictures(opened, pages, tmp_path, name, options):
  folder = pathlib.Path(os.environ.get('PICTURES', tmp_path))
  tab = opened(pages[1], **options)
  tab.screenshot(path=folder / f'{name}.png', full_page=True)
  image = Image.open(folder / f'{name}.png').convert('RGB')
  dark = sum(image.getpixel((2, 2))) < 200
  assert dark == (name == 'dark')
  assert len(image.getcolors(1 << 24)) > 100
  # Nothing sticks out to the right; wide tables scroll by themselves.
  assert image.width == tab.viewport_size['width']


def test_print(opened, pages, tmp_path):
  folder = pathlib.Path(os.environ.get('PICTURES', tmp_path))
  tab = opened(pages[1], color_scheme='dark')
  tab.pdf(path=folder / 'print.pdf', format='A4')
  tab.emulate_media(media='print')
  back = tab.evaluate('getComputedStyle(document.body).backgroundColor')
  assert back == 'rgb(255, 255, 255)'
  assert tab.locator('nav:visible, .choose:visible, .tabs:visible').count() == 0
