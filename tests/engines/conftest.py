"""Programs beside the tests can be imported by name, and so can those that engines share with other tests."""

from __future__ import annotations

import sys
import warnings
from contextlib import suppress
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[1] / "weight_sync"))

with warnings.catch_warnings(), suppress(ImportError):
    # the one in SGLang's environment is old, and says that its own library is not for this torch
    warnings.simplefilter("ignore")
    import_module("torchvision")
