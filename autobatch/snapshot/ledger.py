"""The list of everything that a snapshot covers, each thing once, made by walking the objects given."""

from __future__ import annotations

from collections import deque
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from autobatch.errors import UsageError
from autobatch.snapshot.containers import Leaf, Part, SavedDict, SavedSequence, SavedSet, Slot, ignore_nothing
from autobatch.snapshot.parts import GeneratorState, ModuleMode, OwnState, Stateful
from autobatch.snapshot.tensors import HeldTensor, LooseTensor, SavedTensor
from autobatch.snapshot.wrapped import gather_nothing, is_handled, wrappers_below

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

__all__ = ["Ledger"]

# Classes of these modules keep state in other processes or in flat buffers that they alone know how to handle; DDP and FSDP2
# do not: their parameters are the module's own, whole or each rank's part of them.
_DISTRIBUTED = ("torch.distributed.", "deepspeed.")


class Ledger:
    """Everything found below the objects given, in the order found; nothing is copied yet.

    Tensors are entered first: those that a module, an optimizer or the caller holds must keep their
    memory, and whatever else refers to one of them (a container of an optimizer's state) is to find it so.
    """

    def __init__(self, objects: Sequence[object]) -> None:
        import torch

        self.tensors: list[SavedTensor] = []
        self.parts: list[Part] = []
        self.wrappers: list[tuple[str, Callable[[], object]]] = []
        """What readies wrappers for several ranks after a pass that failed."""
        self._tensor_of: dict[int, SavedTensor] = {}
        self._part_of: dict[int, Part] = {}
        self._objects: dict[int, tuple[int, object]] = {}
        for number, each in enumerate(objects):
            _refuse_distributed(each)
            self._objects[id(each)] = (number, each)
            if isinstance(each, torch.nn.Module):
                gather_nothing(each)
                self.wrappers.extend(wrappers_below(each))
            self._hold_tensors(each)
        for each in objects:
            label = type(each).__name__
            if not self._enter(each, label):
                raise UsageError(
                    f"restore cannot take a {label}: give torch.nn.Module, torch.optim.Optimizer, learning-rate "
                    "schedulers, GradScaler, torch.Tensor, torch.Generator, or an object with state_dict() and "
                    "load_state_dict()"
                )
        for held in [tensor for tensor in self.tensors if isinstance(tensor, HeldTensor)]:
            grad = held.present_grad
            if grad is not None:
                held.grad = self._tensor(grad, f"the gradient of {held.label}")

    def _hold_tensors(self, each: object) -> None:
        import torch

        label = type(each).__name__
        if isinstance(each, torch.Tensor):
            self._hold(each, "a tensor given")
        elif isinstance(each, torch.nn.Module):
            for prefix, module in each.named_modules():
                for name, tensor in [
                    *module.named_parameters(recurse=False),
                    *module.named_buffers(recurse=False),
                ]:
                    self._hold(tensor, f"{label}.{prefix}.{name}" if prefix else f"{label}.{name}")
        elif isinstance(each, torch.optim.Optimizer):
            for position, group in enumerate(each.param_groups):
                for index, tensor in enumerate(group["params"]):
                    self._hold(tensor, f"parameter {index} of group {position} of {label}")

    def _hold(self, tensor: torch.Tensor, label: str) -> None:
        if not isinstance(self._tensor_of.get(id(tensor)), HeldTensor):
            self._number_tensor(tensor, HeldTensor(tensor, label=label, number=len(self.tensors)))

    def _tensor(self, tensor: torch.Tensor, label: str) -> SavedTensor:
        known = self._tensor_of.get(id(tensor))
        if known is not None:
            return known
        return self._number_tensor(tensor, LooseTensor(tensor, label=label, number=len(self.tensors)))

    def _number_tensor(self, tensor: torch.Tensor, saved: SavedTensor) -> SavedTensor:
        self.tensors.append(saved)
        self._tensor_of[id(tensor)] = saved
        return saved

    def _enter(self, each: object, label: str) -> bool:
        """Enter an object of a known kind; return False for any other."""
        import torch

        if isinstance(each, torch.Tensor):
            pass  # held already
        elif isinstance(each, torch.nn.Module):
            self._enter_modules(each, label)
        elif isinstance(each, torch.Generator):
            self.parts.append(GeneratorState(each, label=label, number=len(self.parts)))
        elif self._enter_nested(each, label):
            pass
        elif isinstance(each, Stateful):
            self._enter_own_state(each.state_dict, each.load_state_dict, label)
        else:
            return False
        return True

    def _enter_modules(self, root: torch.nn.Module, label: str) -> None:
        import torch

        for prefix, module in root.named_modules():
            if id(module) in self._part_of:
                continue
            name = f"{label}.{prefix}" if prefix else label
            self._number_part(module, ModuleMode(module, label=name, number=len(self.parts)))
            # The registries themselves: setattr would run the module's own logic and lose the order.
            for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
                self._slot(vars(module).get(registry), f"{name}.{registry}")
            if type(module).get_extra_state is not torch.nn.Module.get_extra_state:
                self._enter_own_state(module.get_extra_state, module.set_extra_state, f"{name} (extra state)")

    def _enter_nested(self, each: object, label: str) -> bool:
        """Enter what also occurs inside others: an optimizer in an optimizer, schedulers in a scheduler.

        Their attributes are put back one by one. `load_state_dict` would cast an optimizer's state to the
        dtype of its parameters, drop a GradScaler's state of each optimizer, and keep keys that a job added.
        """
        import torch

        if isinstance(each, torch.optim.Optimizer):
            self._hold_tensors(each)
            # Hooks are not training state, and a probe that counts steps registers its own.
            self._dict(vars(each), label, ignore=_is_hooks)
        elif isinstance(each, torch.optim.lr_scheduler.LRScheduler):
            self._dict(vars(each), label, ignore=_is_optimizer)
            for function in vars(each).get("lr_lambdas") or ():
                if hasattr(function, "__dict__") and not isinstance(function, (FunctionType, MethodType)):
                    self._dict(vars(function), f"{label}.lr_lambdas")
        elif isinstance(each, torch.amp.GradScaler):
            self._dict(vars(each), label)
        else:
            return False
        return True

    def _enter_own_state(self, read: Callable[[], object], load: Callable[[Any], object], label: str) -> None:
        self.parts.append(OwnState(read, load, label=label, number=len(self.parts)))

    def _number_part(self, of: object, part: Part) -> None:
        """Add a part; `of` must live as long as the part, since it is known by its id."""
        self.parts.append(part)
        self._part_of[id(of)] = part

    def _slot(self, value: object, label: str) -> Slot:
        """Return what puts a value back where it was found, entering what lies below it."""
        import torch

        if isinstance(value, torch.Tensor):
            return self._tensor(value, label)
        if isinstance(value, dict):
            return self._dict(value, label)
        if isinstance(value, (list, deque, set)):
            return self._collection(value, label)
        if isinstance(value, tuple):
            return Leaf(value, tuple(self._slot(item, f"{label}[{index}]") for index, item in enumerate(value)))
        self._enter_nested(value, label)
        return Leaf(value)

    def _collection(self, value: list[Any] | deque[Any] | set[Any], label: str) -> SavedSequence | SavedSet:
        known = self._part_of.get(id(value))
        if isinstance(known, (SavedSequence, SavedSet)):
            return known
        if isinstance(value, set):
            elements = SavedSet(value, label=label, number=len(self.parts))
            self._number_part(value, elements)
            return elements
        sequence = SavedSequence(value, label=label, number=len(self.parts))
        self._number_part(value, sequence)  # before its items, which may lead back to it
        sequence.items = [self._slot(item, f"{label}[{index}]") for index, item in enumerate(value)]
        return sequence

    def _dict(self, target: dict[Any, Any], label: str, ignore: Callable[[object], bool] = ignore_nothing) -> SavedDict:
        known = self._part_of.get(id(target))
        if isinstance(known, SavedDict):
            return known
        saved = SavedDict(target, ignore=ignore, label=label, number=len(self.parts))
        self._number_part(target, saved)  # before its items, which may lead back to it
        saved.items = [
            (key, self._key(key, label), self._slot(value, f"{label}.{key}" if isinstance(key, str) else label))
            for key, value in target.items()
            if not ignore(key)
        ]
        return saved

    def _key(self, key: object, label: str) -> Slot:
        """Return a key as the hash reads it: an address stands for the object that lies there."""
        if isinstance(key, int) and key in self._objects:
            return Leaf(("object", self._objects[key][0]))
        return self._slot(key, f"a key of {label}")


def _is_hooks(key: object) -> bool:
    return str(key).endswith("_hooks")


def _is_optimizer(key: object) -> bool:
    return key == "optimizer"


def _refuse_distributed(each: object) -> None:
    import torch

    if isinstance(each, torch.Tensor):
        return  # judged where it is held
    for inner in each.modules() if isinstance(each, torch.nn.Module) else (each,):
        if is_handled(inner):
            continue
        if any(cls.__module__.startswith(_DISTRIBUTED) for cls in type(inner).__mro__):
            raise UsageError(
                f"{type(inner).__name__} cannot be put back in this process after a failed backward pass: "
                "probe it from the command line, which runs each trial in a child process, or give the bare model"
            )
