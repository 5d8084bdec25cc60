"""`python -m phema_dist` is the command line."""

import sys

from phema_dist.cli import main

sys.exit(main())
