"""Lets the tests of this room import their reference, whatever the directory pytest is started in."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
