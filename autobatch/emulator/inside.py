"""What a program on an emulated card can ask of the emulation that it runs on."""

from __future__ import annotations

__all__ = ["workspaces_are_known"]


def workspaces_are_known() -> bool:
    """Whether convolutions take the workspaces that cuDNN names for the current card; else they take 0 bytes.

    cuDNN answers for a card that is not there from 9.8 on; `AUTOBATCH_EMULATED_WORKSPACES=0` leaves it unasked.
    """
    import ctypes

    ask = getattr(ctypes.CDLL(None), "abg_workspaces_are_known", None)  # of the library that LD_PRELOAD names
    return ask is not None and bool(ask())
