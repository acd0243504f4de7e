"""How Sphinx makes the site from these pages; `make docs` runs it.

The pages have to read well on GitHub too, so links between them are plain
relative ones, and the two places where GitHub and the site differ are bridged
here: the notebook, which lies outside of this folder, and single backticks in
docstrings.
"""

import pathlib

from docutils import nodes
from docutils.utils.math import latex2mathml

import djpq_jax

HERE = pathlib.Path(__file__).parent
NOTEBOOK = 'one_layer.ipynb'

project = 'djpq_jax'
author = 'the djpq_jax authors'
release = version = djpq_jax.__version__

extensions = ['sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'myst_nb']
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3
myst_update_mathjax = False
nb_execution_mode = 'off'  # its results are in the file
nb_merge_streams = True
html_math_renderer = 'mathml'

html_theme = 'furo'
html_title = f'djpq_jax {release}'
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False

# A name in single backticks is a link where it is known, else code.
default_role = 'py:obj'
autodoc_member_order = 'bysource'
autodoc_preserve_defaults = True
autodoc_default_options = {'members': True, 'special-members': '__call__'}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
add_module_names = False

# Types of other packages have no page here; ours must have one, but for type
# variables and aliases.
nitpicky = True
nitpick_ignore_regex = [
  ('py:.*', r'(?!djpq_jax).*'),
  ('py:class', r'djpq_jax\..*\.(T|Images)'),
]


def _fetch_notebook(app):
  """Copies the notebook to where Sphinx finds it; git ignores the copy."""
  del app
  text = (HERE.parent / 'examples' / NOTEBOOK).read_text()
  copy = HERE / NOTEBOOK
  text = text.replace('](../docs/', '](')
  if not copy.exists() or copy.read_text() != text:
    copy.write_text(text)


def _link_notebook(app, docname, source):
  """Points links to the notebook at its page."""
  del app, docname
  source[0] = source[0].replace(f'](../examples/{NOTEBOOK})', f']({NOTEBOOK})')


def _as_code(app, env, node, content):
  """Shows what is in single backticks, and is no name of ours, as code."""
  del app, env
  return content if node.get('reftype') == 'obj' else None


def _formula(translator, node, *, display):
  """Writes a formula as MathML, which browsers show without a script."""
  text = latex2mathml.tex2mathml(node.astext(), as_block=display)
  if display:
    text = f'<div style="margin: 1em 0; overflow-x: auto">{text}</div>'
  translator.body.append(text)
  raise nodes.SkipNode


def setup(app):
  """Called by Sphinx."""
  app.connect('builder-inited', _fetch_notebook)
  app.connect('source-read', _link_notebook)
  app.connect('missing-reference', _as_code)
  app.add_html_math_renderer(
    'mathml',
    (lambda t, n: _formula(t, n, display=False), None),
    (lambda t, n: _formula(t, n, display=True), None),
  )
