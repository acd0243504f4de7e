"""`python -m djpq_jax.cli` is `djpq`."""

import sys

from djpq_jax import cli

sys.exit(cli.main())
