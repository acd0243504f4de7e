"""Which packages: setup.cfg can find them or list them, and not do both."""

import setuptools

# The top-level folder configs/ travels inside the package.
setuptools.setup(
  packages=[
    *setuptools.find_packages(include=['djpq_jax', 'djpq_jax.*']),
    'djpq_jax.configs',
  ],
  package_dir={'djpq_jax.configs': 'configs'},
)
