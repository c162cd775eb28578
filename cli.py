"""`python cli.py …` in a checkout is the same program as `nanocupy …`."""

import sys
from importlib.util import find_spec
from pathlib import Path

import nanocupy

# Installed, `exporters/` and `kernels_cu/` are parts of the package. In a checkout that was not
# installed they lie beside it, so the package also looks there.
if find_spec("nanocupy.exporters") is None:
    nanocupy.__path__.append(str(Path(__file__).resolve().parent))

from nanocupy.cli import main

if __name__ == "__main__":
    sys.exit(main())
