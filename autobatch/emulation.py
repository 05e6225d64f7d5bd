"""What an emulated answer has to say of itself: what it leaves out, and how far off it is to be expected."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autobatch.facts import AnswerRemarks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autobatch.workload.inspection import Inspection

__all__ = ["describe_emulation"]

_NOT_MODELLED = (
    "NCCL buffers",
    "memory taken by CUDA code that is linked statically into extensions",
    "growth of the CUDA context beyond the card's typical size",
)
_WORKSPACES = "cuDNN workspaces (0 bytes here)"
_BENCHMARK = "what cuDNN would choose by time (torch.backends.cudnn.benchmark): here the first of its own list"

# Language models: this version against published figures of real cards, most of them with an older torch, each rebuilt by
# `tests/benchmarks/against_real.py`; a test holds the words against what it wrote. Convolutions: a prototype of this emulation
# against published figures of the RTX 3060, A100, V100, A10G and RTX 3090, as the project's design notes have it. It had no
# workspaces of cuDNN, which are here now; how much nearer that comes, only a card can tell, and one is still to come.
_LANGUAGE_ERROR = (
    "peak memory within about 4 % (against 106 published figures of real cards: median 0.8 %, 9 of 10 within 3.7 %)"
)
_CONVOLUTION_ERROR = (
    "peak memory within about ±20 % for convolutions (a prototype without cuDNN's workspaces against real cards: median 3.5 %, "
    "at most 18 %)"
)


def describe_emulation(inspection: Inspection, unsupported_calls: Sequence[str]) -> AnswerRemarks:
    """Say what an answer for this job leaves out.

    Args:
        inspection: what one micro-batch of the job did.
        unsupported_calls: calls that it made and that failed, since the emulation does not have them.
    """
    not_modelled = [*_NOT_MODELLED]
    if inspection.has_convolutions:
        not_modelled.insert(0, _BENCHMARK if inspection.workspaces_known else _WORKSPACES)
    not_modelled += [f"{call} (called, and refused)" for call in unsupported_calls]
    return AnswerRemarks(
        data_dependent=inspection.data_dependent,
        not_modelled=tuple(not_modelled),
        expected_error=_CONVOLUTION_ERROR if inspection.has_convolutions else _LANGUAGE_ERROR,
    )
