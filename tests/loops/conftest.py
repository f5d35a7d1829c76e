"""The folder of the loop's tests is importable, so that they share `runs`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
