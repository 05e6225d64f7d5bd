"""The training state by value, so that an in-process probe can put everything back bit for bit."""

from __future__ import annotations

from autobatch.snapshot.record import Snapshot, state_hash

__all__ = ["Snapshot", "state_hash"]
