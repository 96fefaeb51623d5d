"""`python -m stillgraph` is `stillgraph`."""

import sys

from stillgraph.cli import main

sys.exit(main())
