"""The snapshot of a training job's state, and the hash that proves that nothing changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autobatch.errors import AutobatchError
from autobatch.snapshot.digest import Digest
from autobatch.snapshot.ledger import Ledger
from autobatch.snapshot.parts import OwnState
from autobatch.snapshot.process import ProcessState
from autobatch.snapshot.tensors import assign_host_copies

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from autobatch.snapshot.containers import Part
    from autobatch.snapshot.tensors import SavedTensor

__all__ = ["Snapshot", "state_hash"]


class Snapshot:
    """The state of a training job, copied by value to host memory, to be put back bit for bit.

    Covered, for the objects given:

    - `torch.nn.Module`, compiled ones too: parameters, buffers (persistent or not), gradients (None stays
      None), `requires_grad`, train or eval mode of every submodule, which parameters, buffers and
      submodules it has, extra state. Parameters and buffers stay the same objects over the same memory,
      also where the job assigned others to their names or to `.data`.
    - `torch.optim.Optimizer`: its parameters and their gradients, its state with every dtype, device and
      key as it was (absent keys are absent again), the parameter groups and their hyper-parameters,
      its other attributes.
    - Learning-rate schedulers and `torch.amp.GradScaler`: all attributes by value, nested schedulers and the
      scaler's state of each optimizer included.
    - `torch.Tensor` and `torch.Generator`.
    - Anything else with `state_dict` and `load_state_dict`: its state as a deep copy.

    Always covered: the random generators of `random`, numpy (where loaded), torch and every CUDA device
    (where CUDA is initialized), cuDNN's flags, the float32 precision of matrix products, deterministic
    algorithms, default dtype, grad mode.

    Not covered: data iterators, a user's own `Generator`s unless given, plain Python attributes of modules
    and the insides of objects of other kinds.

    `DistributedDataParallel` and FSDP2 (`fully_shard`) are covered on each rank for its own part, and made ready for
    another pass where one failed half-way. FSDP1, ZeRO optimizers and DeepSpeed are refused: they cannot be put back in
    this process.

    Cost: `host_bytes` of pageable host memory, copied once by `take` and once more by each `restore`. No
    device memory, save where the job exchanges a parameter, a buffer or a whole dictionary of optimizer
    state (`load_state_dict`) for another: the old one lives until the snapshot goes. Old gradients, and
    tensors exchanged within a dictionary, are not kept alive. `restore` allocates device memory only for
    gradients and optimizer state that the job let go of, after letting go of what the job added.

    Call `restore` outside of any `except` clause that caught the job's failure: the exception holds the
    frames, and they hold the job's tensors. Any number of calls is allowed.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> snapshot = Snapshot.take([model])
        >>> before = state_hash([model])
        >>> model(torch.randn(8, 4)).sum().backward()
        >>> state_hash([model]) == before
        False
        >>> snapshot.restore()
        >>> state_hash([model]) == before
        True
    """

    def __init__(self, ledger: Ledger, process: ProcessState) -> None:
        self._ledger = ledger
        self._process = process

    @classmethod
    def take(cls, objects: Sequence[object]) -> Snapshot:
        """Copy the state of `objects` and of the process to host memory; nothing is changed.

        Args:
            objects: models, optimizers, schedulers, scalers, tensors, … in any order. What two of
                them share (the parameters of a model and its optimizer, tied weights) is kept once.

        Raises:
            UsageError: an object of a kind that cannot be put back, named with what can.
        """
        import torch

        with torch.no_grad():
            ledger = Ledger(objects)
            _synchronize(ledger)
            assign_host_copies(ledger.tensors)
            for part in ledger.parts:
                if isinstance(part, OwnState):
                    part.keep()
        return cls(ledger, ProcessState())

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that the copies of tensors take."""
        tensors = sum(tensor.host.nbytes for tensor in self._ledger.tensors if tensor.host is not None)
        return tensors + sum(part.host_bytes for part in self._ledger.parts if isinstance(part, OwnState))

    def restore(self) -> None:
        """Put everything back as it was when the snapshot was taken.

        Raises:
            AutobatchError: some of it could not be put back (its cause is an `ExceptionGroup`); all the
                rest has been.
        """
        import torch

        failures: list[tuple[str, Exception]] = []
        with torch.no_grad():
            _attempt(self._state_actions(), failures)
        _attempt(self._process.actions(), failures)
        if failures:
            label, first = failures[0]
            raise AutobatchError(
                f"{len(failures)} parts of the training state could not be put back, the first being {label} "
                f"({type(first).__name__}: {first}): start training afresh, or probe from the command line, "
                "which runs each trial in a child process"
            ) from ExceptionGroup("parts that could not be put back", [error for _, error in failures])

    def _state_actions(self) -> Iterator[tuple[str, Callable[[], object]]]:
        yield "CUDA", lambda: _synchronize(self._ledger)  # the job's kernels may still be writing
        yield from self._ledger.wrappers
        everything: list[SavedTensor | Part] = [*self._ledger.tensors, *self._ledger.parts]
        for each in everything:
            yield each.label, each.release
        for each in everything:
            yield each.label, each.put_back
        for each in everything:
            yield each.label, each.write


def state_hash(objects: Sequence[object]) -> str:
    """Return the SHA-256 of everything that a snapshot of `objects` covers, process state included.

    Equal hashes mean equal values to the last bit, dtypes, devices, strides, modes, presence of
    gradients and keys, sharing of tensors, random generators and flags. Addresses do not count, so two models made
    and trained alike hash alike. Tensors are read one at a time; nothing is kept.

    Args:
        objects: as for `Snapshot.take`; their order counts.

    Returns:
        64 hexadecimal digits.

    Raises:
        UsageError: as for `Snapshot.take`.
    """
    import torch

    digest = Digest()
    with torch.no_grad():
        ledger = Ledger(objects)
        for part in ledger.parts:
            part.describe(digest)
        for tensor in ledger.tensors:
            tensor.describe(digest)
    ProcessState().describe(digest)
    return digest.hexdigest()


def _attempt(actions: Iterator[tuple[str, Callable[[], object]]], failures: list[tuple[str, Exception]]) -> None:
    for label, action in actions:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - whatever fails, the rest is put back; raised together later
            failures.append((label, error))


def _synchronize(ledger: Ledger) -> None:
    import torch

    for device in {tensor.device for tensor in ledger.tensors if tensor.device.type == "cuda"}:
        torch.cuda.synchronize(device)
