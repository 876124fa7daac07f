"""The embedded model, and the data set it is trained on."""

from pathlib import Path

EMBEDDED = {"tiny": Path(__file__).parent / "checkpoint"}
"""Models inside this package, by name. A directory of the same name is reached as `./tiny`."""
