"""`python -m gpt_jax`: the same as the `gpt-jax` command."""

import sys

from gpt_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
