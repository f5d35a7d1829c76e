"""`python -m lightrft`, the same as the command `lightrft`."""

from __future__ import annotations

import sys

from lightrft.cli import main

if __name__ == "__main__":
    sys.exit(main())
