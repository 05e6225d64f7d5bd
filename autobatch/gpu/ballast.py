"""Device memory taken out of reach, straight from the driver."""

from __future__ import annotations

import ctypes

from autobatch.errors import UnavailableError
from autobatch.units import format_bytes

__all__ = ["Ballast"]

# The driver hands out whole granules of 2 MiB; what is less than one is left alone.
_GRANULE_BYTES = 2 << 20


class Ballast:
    """One allocation on the current device that nobody uses, so that nobody else can have it.

    Attributes:
        size_bytes: what it holds now.
    """

    def __init__(self) -> None:
        self.size_bytes = 0
        self._pointer = ctypes.c_uint64(0)

    def resize(self, size_bytes: int) -> None:
        """Hold so much instead, rounded down to 2 MiB.

        Raises:
            UnavailableError: the driver does not give it.
        """
        wanted = max(0, size_bytes) // _GRANULE_BYTES * _GRANULE_BYTES
        if wanted == self.size_bytes:
            return
        self.drop()
        if not wanted:
            return
        driver = ctypes.CDLL("libcuda.so.1")
        status = driver.cuMemAlloc_v2(ctypes.byref(self._pointer), ctypes.c_size_t(wanted))
        if status != 0:
            raise UnavailableError(
                f"the driver did not give the {format_bytes(wanted)} that keep the allocator to its budget (error {status}): "
                "another process took memory meanwhile; try again"
            )
        self.size_bytes = wanted

    def drop(self) -> None:
        """Give it back. May be called again."""
        if self.size_bytes:
            ctypes.CDLL("libcuda.so.1").cuMemFree_v2(self._pointer)
            self.size_bytes = 0
