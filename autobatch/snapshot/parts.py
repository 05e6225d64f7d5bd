"""Objects that are put back as a whole: module modes, extra state, state dictionaries, generators."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from autobatch.errors import UsageError
from autobatch.snapshot.containers import Part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from autobatch.snapshot.digest import Digest

__all__ = ["GeneratorState", "ModuleMode", "OwnState", "Stateful"]


@runtime_checkable
class Stateful(Protocol):
    """Anything that gives its state as a value and takes it back."""

    def state_dict(self) -> object:
        """Return the state."""

    def load_state_dict(self, state: object, /) -> object:
        """Take the state back."""


class ModuleMode(Part):
    """Train or eval mode of one module, and names that must not hide its parameters and buffers."""

    def __init__(self, module: torch.nn.Module, *, label: str, number: int) -> None:
        super().__init__(label=label, number=number)
        self._module = module
        self._training = module.training
        # A plain attribute hides the parameter or buffer of the same name, so one that a job sets has to go.
        attributes = vars(module)
        slots = [*attributes.get("_parameters", ()), *attributes.get("_buffers", ())]
        self._slots = [name for name in slots if name not in attributes]

    def put_back(self) -> None:
        """Delete hiding attributes and set the mode."""
        for name in self._slots:
            vars(self._module).pop(name, None)
        if self._module.training != self._training:
            self._module.training = self._training

    def describe(self, digest: Digest) -> None:
        """Append class and mode."""
        digest.add(type(self._module).__qualname__, self._training)


class OwnState(Part):
    """State that an object hands out and takes back by two calls of its own, kept as a deep copy on the host."""

    def __init__(
        self, read: Callable[[], object], load: Callable[[object], object], *, label: str, number: int
    ) -> None:
        super().__init__(label=label, number=number)
        self._load = load
        self._state = read()
        self._devices: dict[int, tuple[torch.Tensor, torch.device]] = {}

    def keep(self) -> None:
        """Exchange the state, which aliases live tensors, for a copy."""
        memo: dict[int, object] = {}
        for tensor in _tensors_in(self._state):
            host = tensor.detach().to("cpu", copy=True)
            memo[id(tensor)] = host
            self._devices[id(host)] = (host, tensor.device)
        try:
            self._state = copy.deepcopy(self._state, memo)
        except (TypeError, RuntimeError) as error:
            raise UsageError(
                f"the state of {self.label} cannot be copied ({error}): leave it out of restore"
            ) from error

    @property
    def host_bytes(self) -> int:
        """Bytes of the tensors kept."""
        return sum(host.nbytes for host, _ in self._devices.values())

    def write(self) -> None:
        """Hand a copy to the object, tensors on the devices that they were on."""
        memo: dict[int, object] = {key: host.to(device, copy=True) for key, (host, device) in self._devices.items()}
        # A further copy: the object may keep what it is given, and this one must serve again.
        self._load(copy.deepcopy(self._state, memo))

    def describe(self, digest: Digest) -> None:
        """Append the state as the object gives it."""
        digest.add_value(self._state)


def _tensors_in(tree: object) -> Iterator[torch.Tensor]:
    import torch

    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from _tensors_in(item)
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors_in(item)


class GeneratorState(Part):
    """A random generator that the caller gave, on any device."""

    def __init__(self, generator: torch.Generator, *, label: str, number: int) -> None:
        super().__init__(label=label, number=number)
        self._generator = generator
        self._state = generator.get_state().clone()

    def write(self) -> None:
        """Set the state."""
        self._generator.set_state(self._state.clone())

    def describe(self, digest: Digest) -> None:
        """Append the state."""
        digest.add_memory(self._state)
