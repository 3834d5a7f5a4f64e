"""The examples are scripts, not a package: put their folder where they find each other when they run."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
