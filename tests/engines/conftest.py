"""Programs beside the tests can be imported by name, and so can those that engines share with other tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[1] / "weight_sync"))
