"""Find the largest micro-batch that really trains on a GPU, and hit an effective batch size exactly."""

from __future__ import annotations

import logging

from autobatch._version import __version__

__all__ = ["__version__"]

logging.getLogger(__name__).addHandler(logging.NullHandler())
