"""`python -m runtime` is `stillgraph`."""

import sys

from runtime.cli import main

sys.exit(main())
