"""``python -m gac.cli`` is the command ``gac``."""

import sys

from gac.cli import main

if __name__ == "__main__":
    sys.exit(main())
