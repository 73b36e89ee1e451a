"""`python -m pals_jax` is `pals-jax`."""

import sys

from pals_jax.cli import main

sys.exit(main())
