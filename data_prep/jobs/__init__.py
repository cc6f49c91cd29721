"""Long work on many files: in order, with its progress, continued where it stopped, on processes or a Ray cluster.

Imports data_prep/rows.
"""

from typing import Literal

EngineName = Literal["local", "ray"]
"""Who does the work; here, so that a command line needs no more for its options."""
