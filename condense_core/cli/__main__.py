"""``python -m condense_core.cli``, which ``accelerate launch -m`` needs."""

import sys

from condense_core.cli import main

if __name__ == "__main__":
    sys.exit(main())
