"""`python -m sinkjax_kernels.bench`."""

import sys

from sinkjax_kernels.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
