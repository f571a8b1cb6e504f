"""`python -m data_tools` is `infini-data`."""

import sys

from data_tools.cli import main

if __name__ == "__main__":  # a worker process imports this module, too
    sys.exit(main())
