"""`python -m data_tools` is `infini-data`."""

import sys

from data_tools.cli import main

sys.exit(main())
