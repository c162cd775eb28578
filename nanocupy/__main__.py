"""`python -m nanocupy` is the same program as `nanocupy`."""

import sys

from nanocupy.cli import main

if __name__ == "__main__":
    sys.exit(main())
