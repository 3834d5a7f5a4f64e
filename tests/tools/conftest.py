"""The scripts in tools/ are no package: they are imported by their file names."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
