"""`python -m autobatch_server` is `autobatch serve`."""

import sys

from autobatch.cli import main

sys.exit(main(["serve", *sys.argv[1:]]))
