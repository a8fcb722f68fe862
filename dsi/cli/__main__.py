"""`python -m dsi.cli`: the command line where its script is not on the path."""

import sys

from dsi.cli import main

sys.exit(main())
