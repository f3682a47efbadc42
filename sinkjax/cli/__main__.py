"""`python -m sinkjax.cli` is `sinkjax`."""

import sys

from sinkjax.cli.entry import main

sys.exit(main())
