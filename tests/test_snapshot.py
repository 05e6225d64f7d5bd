"""A snapshot puts every bit of a training job's state back, wherever the job failed.

Each test runs on CPU tensors, whose values are real, and on a real GPU where there is one.
"""

from __future__ import annotations

import copy
import gc
import random
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from fakes import out_of_memory
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from autobatch.errors import AutobatchError, UsageError
from autobatch.snapshot import Snapshot, state_hash

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    return name


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


class InjectedError(RuntimeError):
    """Stands for the out-of-memory error of a trial."""


class _FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, *_grads: torch.Tensor) -> torch.Tensor:
        raise InjectedError("in backward")


class Net(nn.Module):
    """Dropout, batch-norm in both modes, tied weights, a non-persistent and a replaced buffer, a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.frozen_norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.tied = nn.Linear(6, 6, bias=False)
        self.tied.weight = self.first.weight
        self.head = nn.Linear(6, 3)
        self.head.bias.requires_grad_(False)
        self.running: torch.Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("running", torch.zeros(6))
        self.calls: torch.Tensor
        self.fail_at = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.dropout(self.norm(self.first(x)))
        self.running = 0.9 * self.running + x.detach().mean(0)
        if self.fail_at == "forward":
            raise InjectedError("in forward")
        if self.fail_at == "backward":
            x = _FailsBackward.apply(x)
        out: torch.Tensor = self.head(self.frozen_norm(self.tied(x)))
        return out


class Job:
    """A training job with everything that a snapshot has to cover."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.model = Net().to(device).train()
        self.model.frozen_norm.eval()
        body = [p for n, p in self.model.named_parameters() if not n.startswith("head")]
        groups: list[dict[str, Any]] = [{"params": body}, {"params": list(self.model.head.parameters()), "lr": 3e-3}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=[0.1, 0.2], total_steps=40)
        self.scaler = torch.amp.GradScaler(device, init_scale=8.0, growth_interval=2)

    @property
    def objects(self) -> list[object]:
        return [self.model, self.optimizer, self.scheduler, self.scaler]

    def step(self, fail_at: str = "") -> None:
        self.model.fail_at = fail_at if fail_at in ("forward", "backward") else ""
        try:
            draws = random.uniform(0, 1), float(np.random.rand())
            x = torch.randn(8, 6, device=self.device) * draws[0] + draws[1]
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(self.model(x).square().mean()).backward()
            self.scaler.unscale_(self.optimizer)
            if fail_at == "unscaled":
                raise InjectedError("between unscale_ and update")
            if fail_at == "step":
                # AdamW has updated its first group when it finds that it cannot take this gradient of the second.
                weight = self.model.head.weight
                weight.grad = torch.zeros_like(weight).to_sparse()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
        finally:
            self.model.fail_at = ""

    def disturb(self, fail_at: str) -> None:
        """Train two windows, then fail."""
        self.step()
        self.step()
        if fail_at:
            with pytest.raises(RuntimeError):
                self.step(fail_at)


def _plain(value: Any) -> Any:
    """Copy a tree by value in a form that `==` compares to the last bit."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).tolist()
        return ("tensor", str(value.dtype), tuple(value.shape), str(value.device), value.requires_grad, raw)
    if isinstance(value, dict):
        return [(_plain(k) if isinstance(k, torch.Tensor) else k, _plain(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    return copy.deepcopy(value)


def _by_hand(job: Job) -> dict[str, Any]:
    """Read the state directly, by none of the snapshot's own code."""
    model, optimizer = job.model, job.optimizer
    return {
        "parameters": [(n, id(p), p.data_ptr(), _plain(p)) for n, p in model.named_parameters(remove_duplicate=False)],
        "gradients": [(n, None if p.grad is None else _plain(p.grad)) for n, p in model.named_parameters()],
        "buffers": [(n, id(b), b.data_ptr(), _plain(b)) for n, b in model.named_buffers()],
        "modes": [(n, m.training) for n, m in model.named_modules()],
        "keys": list(model.state_dict()),
        "state": _plain(optimizer.state),
        "groups": _plain(optimizer.param_groups),
        "leftovers": (sorted(vars(optimizer)), getattr(optimizer, "grad_scale", None)),
        "scheduler": _plain(job.scheduler.state_dict()),
        "scaler": _plain(job.scaler.state_dict()),
        "scaler per optimizer": _plain(dict(job.scaler._per_optimizer_states)),
        "scale": _plain([job.scaler._scale, job.scaler._growth_tracker]),
        "random": random.getstate(),
        "numpy": _plain(np.random.get_state()),
        "torch": _plain(torch.get_rng_state()),
        "cuda": _plain(torch.cuda.get_rng_state_all()) if job.device == "cuda" else None,
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.enabled),
    }


FAILURES = ["", "forward", "backward", "unscaled", "step"]


@pytest.mark.parametrize("fail_at", FAILURES)
@pytest.mark.parametrize("steps_before", [0, 3])
def test_state_is_bit_identical_after_training_and_failing_anywhere(
    device: str, steps_before: int, fail_at: str
) -> None:
    """With and without optimizer state, gradients and a scale before, all of it is as before."""
    job = Job(device)
    for _ in range(steps_before):
        job.step()
    hash_before, before = state_hash(job.objects), _by_hand(job)
    snapshot = Snapshot.take(job.objects)
    assert _by_hand(job) == before
    weight, head = job.model.first.weight.tolist(), job.model.head.weight.tolist()
    job.disturb(fail_at)
    assert job.model.first.weight.tolist() != weight
    assert job.model.head.weight.tolist() != head
    snapshot.restore()
    assert _by_hand(job) == before
    assert state_hash(job.objects) == hash_before


@pytest.mark.parametrize("fail_at", FAILURES)
def test_training_afterwards_gives_the_weights_of_training_undisturbed(device: str, fail_at: str) -> None:
    """Five steps after a probe end in the very weights, state and random numbers that they end in without one."""

    def train(*, disturbed: bool) -> str:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        job = Job(device)
        job.step()
        if disturbed:
            snapshot = Snapshot.take(job.objects)
            job.disturb(fail_at)
            snapshot.restore()
        for _ in range(5):
            job.step()
        return state_hash(job.objects)

    assert train(disturbed=True) == train(disturbed=False)


def test_peers_defect_7_weights_statistics_rng_and_gradients_are_put_back(device: str) -> None:
    """One finder trains the caller's weights and batch-norm statistics; another leaves RNG and gradients changed."""
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model[0].weight.grad = torch.full_like(model[0].weight, 7.0)
    weights = copy.deepcopy(model.state_dict())
    generator = torch.cuda if device == "cuda" else torch
    rng = generator.get_rng_state()
    snapshot = Snapshot.take([model, optimizer])
    for _ in range(3):
        model(torch.randn(8, 4, device=device)).sum().backward()
        optimizer.step()
    assert int(model[1].num_batches_tracked) == 3
    assert not torch.equal(model[0].weight, weights["0.weight"])
    assert not torch.equal(generator.get_rng_state(), rng)
    snapshot.restore()
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert torch.equal(generator.get_rng_state(), rng)
    assert torch.equal(model[0].weight.grad, torch.full_like(model[0].weight, 7.0))
    assert model[3].weight.grad is None
    assert not optimizer.state


def test_restore_twice_and_restore_after_nothing_change_nothing(device: str) -> None:
    job = Job(device)
    job.step()
    before = state_hash(job.objects)
    snapshot = Snapshot.take(job.objects)
    snapshot.restore()
    assert state_hash(job.objects) == before
    for fail_at in ("backward", "unscaled"):
        job.disturb(fail_at)
        snapshot.restore()
        snapshot.restore()
        assert state_hash(job.objects) == before


class MasterMomentum(torch.optim.Optimizer):
    """Keeps float32 weights and momentum for bfloat16 parameters, nested in lists, and a count in Python."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": torch.tensor(0.1)})
        self.calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None, *, fail_after: int | None = None) -> None:  # type: ignore[override]
        self.calls += 1
        for index, p in enumerate(self.param_groups[0]["params"]):
            if index == fail_after:
                raise InjectedError("half-way in step")
            state = self.state[p]
            if not state:
                state["nested"] = [{"master": p.float()}, [torch.zeros_like(p, dtype=torch.float32)]]
                state["count"] = 0
            state["count"] += 1
            master, momentum = state["nested"][0]["master"], state["nested"][1][0]
            momentum.mul_(0.9).add_(p.grad.float())
            master.sub_(momentum * float(self.param_groups[0]["lr"]))
            p.copy_(master)


def test_float32_state_of_bfloat16_parameters_keeps_its_bits_and_objects(device: str) -> None:
    """`Optimizer.load_state_dict` would have cast it; a step that failed half-way is undone too."""
    model = nn.Linear(5, 5).to(device, torch.bfloat16)
    optimizer = MasterMomentum(model.parameters())

    def step(**options: Any) -> None:
        optimizer.zero_grad()
        model(torch.randn(3, 5, device=device, dtype=torch.bfloat16)).float().square().sum().backward()
        optimizer.step(**options)

    step()
    master = optimizer.state[model.weight]["nested"][0]["master"]
    value, pointer = master.clone(), master.data_ptr()
    cast = copy.deepcopy(optimizer)
    cast.load_state_dict(optimizer.state_dict())
    assert cast.state[cast.param_groups[0]["params"][0]]["nested"][0]["master"].dtype is torch.bfloat16
    before = state_hash([model, optimizer])
    snapshot = Snapshot.take([model, optimizer])
    step()
    optimizer.param_groups[0]["lr"].mul_(0.5)
    with pytest.raises(InjectedError):
        step(fail_after=1)
    snapshot.restore()
    after = optimizer.state[model.weight]["nested"][0]["master"]
    assert after is master
    assert after.dtype is torch.float32
    assert after.data_ptr() == pointer
    assert torch.equal(after, value)
    assert optimizer.calls == 1
    assert state_hash([model, optimizer]) == before


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"capturable": True}, {"amsgrad": True}])
def test_adamw_in_every_implementation(device: str, options: dict[str, Any]) -> None:
    """`step` tensors are put back on the device where each implementation keeps them."""
    if options.get("capturable") and device == "cpu":
        pytest.skip("capturable needs CUDA")
    model = nn.Linear(4, 4).to(device)
    lr: Any = torch.tensor(1e-2, device=device) if options.get("fused") else 1e-2
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, **options)

    def step() -> None:
        model(torch.randn(2, 4, device=device)).sum().backward()
        optimizer.step()

    step()
    before = state_hash([model, optimizer])
    snapshot = Snapshot.take([model, optimizer])
    step()
    snapshot.restore()
    assert state_hash([model, optimizer]) == before
    assert float(optimizer.state[model.weight]["step"]) == 1


def test_gradients_keep_object_value_and_dtype_and_none_stays_none(device: str) -> None:
    model = nn.Linear(3, 3).to(device)
    grad = torch.randn(3, 3, device=device)
    model.weight.grad = grad
    value = grad.clone()
    snapshot = Snapshot.take([model])
    model(torch.ones(2, 3, device=device)).sum().backward()
    grad_after_job = model.bias.grad
    model.weight.grad = torch.zeros_like(grad)
    model.half()
    snapshot.restore()
    assert model.weight.grad is grad
    assert torch.equal(grad, value)
    assert model.bias.grad is None
    assert grad_after_job is not None


def test_a_gradient_changed_in_dtype_stays_the_same_object(device: str) -> None:
    """`Module.half` assigns to the gradient's `.data`."""
    model = nn.Linear(3, 3).to(device)
    grad = model.weight.grad = torch.randn(3, 3, device=device)
    value = grad.clone()
    snapshot = Snapshot.take([model])
    model.half()
    assert grad.dtype is torch.float16
    snapshot.restore()
    assert model.weight.grad is grad
    assert torch.equal(grad, value)


def test_gradients_and_state_that_the_job_drops_are_freed_and_made_anew(device: str) -> None:
    """A snapshot that kept old gradients alive would raise the peak that the trials measure."""
    model = nn.Linear(3, 3).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(2, 3, device=device)).sum().backward()
    optimizer.step()
    before = state_hash([model, optimizer])
    assert model.weight.grad is not None
    old = [weakref.ref(model.weight.grad), weakref.ref(optimizer.state[model.weight]["momentum_buffer"])]
    snapshot = Snapshot.take([model, optimizer])
    model.zero_grad(set_to_none=True)
    optimizer.state[model.weight]["momentum_buffer"] = None
    del optimizer.state[model.bias]["momentum_buffer"]
    gc.collect()
    assert [reference() for reference in old] == [None, None]
    snapshot.restore()
    assert state_hash([model, optimizer]) == before


def test_parameters_get_their_objects_and_memory_back(device: str) -> None:
    """Whatever the job did to a slot: `.data`, dtype, another object, deletion, a new name, a hiding attribute."""
    model: Any = Job(device).model
    objects = {n: (t, t.data_ptr()) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    order = list(model.state_dict())
    before = state_hash([model])
    snapshot = Snapshot.take([model])
    model.half()
    model.first.weight.data = torch.zeros(2, 2, device=device)
    model.head.weight = nn.Parameter(torch.zeros(3, 6, device=device))
    model.running = torch.ones(6, device=device)
    del model.norm.bias
    model.norm.bias = None
    del model.tied._parameters["weight"]
    model.tied.__dict__["weight"] = torch.zeros(6, 6, device=device)
    model.register_buffer("added", torch.zeros(1, device=device))
    model.extra = nn.Linear(1, 1)
    for parameter in model.parameters():
        parameter.requires_grad_(not parameter.requires_grad)
    model.eval()
    model.frozen_norm.train()
    snapshot.restore()
    for name, (tensor, pointer) in objects.items():
        now = model.get_parameter(name) if name in dict(model.named_parameters()) else model.get_buffer(name)
        assert now is tensor, name
        assert now.data_ptr() == pointer, name
    assert model.tied.weight is model.first.weight
    assert list(model.state_dict()) == order
    assert state_hash([model]) == before


def test_shared_memory_is_copied_once_and_stays_shared(device: str) -> None:
    """Views of one flat tensor, tied weights and expanded buffers: one copy of each byte, and still views after."""
    flat = torch.randn(32, device=device)
    model: Any = nn.Module()
    model.register_buffer("view", flat[8:16].view(2, 4))
    model.register_buffer("expanded", flat[:1].expand(5))
    model.register_buffer("flat", flat)
    model.register_buffer("columns", torch.randn(4, 6, device=device)[:, ::2])
    model.weight = nn.Parameter(torch.randn(4, 4, device=device))
    model.tied = model.weight
    before = state_hash([model])
    snapshot = Snapshot.take([model, model.weight])
    assert snapshot.host_bytes == 4 * (32 + 12 + 16)
    with torch.no_grad():
        flat.zero_()
        model.weight.zero_()
        model.columns.zero_()
    snapshot.restore()
    assert state_hash([model]) == before
    assert model.view.data_ptr() == flat.data_ptr() + 32


def test_elements_between_those_of_a_view_are_left_alone(device: str) -> None:
    base = torch.zeros(4, 4, device=device)
    snapshot = Snapshot.take([base[:, 0]])
    base.fill_(3)
    snapshot.restore()
    assert base[:, 0].tolist() == [0, 0, 0, 0]
    assert base[:, 1:].eq(3).all()


def test_a_view_with_gaps_does_not_carry_what_lies_in_its_gaps(device: str) -> None:
    base = torch.zeros(4, 4, device=device)
    snapshot = Snapshot.take([base[:, 0], base[1, 1:3]])
    base.fill_(3)
    snapshot.restore()
    assert base.sum() == 3 * (16 - 4 - 2)


def test_low_precision_copies_in_the_cache_of_autocast_are_forgotten(device: str) -> None:
    """Within one autocast region, a forward pass after the restoration reads the weights put back."""
    model, x = nn.Linear(3, 3).to(device), torch.ones(2, 3, device=device)
    with torch.autocast(device, torch.bfloat16):
        expected = model(x)
    snapshot = Snapshot.take([model])
    with torch.autocast(device, torch.bfloat16):
        model.weight.data.zero_()
        assert not torch.equal(model(x), expected)
        snapshot.restore()
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_memory_formats_and_dtypes(device: str, memory_format: torch.memory_format) -> None:
    model: Any = nn.Conv2d(3, 4, 2).to(device).to(memory_format=memory_format)
    for dtype in (torch.bfloat16, torch.float16, torch.bool, torch.complex64, torch.int8, torch.float8_e4m3fn):
        model.register_buffer(str(dtype).replace(".", "_"), torch.ones(3, device=device).to(dtype))
    model.register_buffer("none", None)
    model.register_buffer("empty", torch.zeros(0, 3, device=device))
    before = state_hash([model])
    snapshot = Snapshot.take([model])
    for tensor in model.state_dict().values():
        tensor.copy_(torch.zeros_like(tensor))
    assert state_hash([model]) != before
    snapshot.restore()
    assert state_hash([model]) == before


def test_storage_freed_by_the_job_and_buffers_drawn_into_its_graph(device: str) -> None:
    model: Any = nn.Linear(3, 3).to(device)
    model.register_buffer("sum", torch.zeros(3, device=device))
    before = state_hash([model])
    snapshot = Snapshot.take([model])
    model.sum.add_(model(torch.ones(3, device=device)))
    assert model.sum.requires_grad
    model.weight.untyped_storage().resize_(0)
    snapshot.restore()
    assert not model.sum.requires_grad
    assert state_hash([model]) == before


def test_buffers_made_under_inference_mode(device: str) -> None:
    model: Any = nn.Module()
    with torch.inference_mode():
        model.register_buffer("cache", torch.arange(3.0, device=device))
    snapshot = Snapshot.take([model])
    with torch.inference_mode():
        model.cache.zero_()
    snapshot.restore()
    assert model.cache.tolist() == [0, 1, 2]


def test_optimizer_parameters_that_no_given_model_holds(device: str) -> None:
    """Their values and gradients are covered, and so is what the optimizer gained: groups, keys, attributes."""
    loose: Any = torch.ones(3, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([loose], lr=0.1, momentum=0.9)
    groups, step = optimizer.param_groups, optimizer.step
    snapshot = Snapshot.take([optimizer])
    loose.sum().backward()
    optimizer.step()
    optimizer.add_param_group({"params": [torch.zeros(1, device=device, requires_grad=True)]})
    optimizer.param_groups[0]["lr"] = 5.0
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    snapshot.restore()
    assert loose.tolist() == [1, 1, 1]
    assert loose.grad is None
    assert optimizer.param_groups is groups
    assert [(len(g["params"]), g["lr"], "initial_lr" in g) for g in groups] == [(1, 0.1, False)]
    assert dict(optimizer.state) == {}
    assert optimizer.step == step


def test_an_optimizer_within_an_optimizer(device: str) -> None:
    """As sharpness-aware and look-ahead optimizers have."""
    weight: Any = torch.ones(3, device=device, requires_grad=True)
    outer: Any = torch.optim.SGD([weight], lr=0.1)
    outer.base = torch.optim.AdamW([weight], lr=0.1)
    before = state_hash([outer])
    snapshot = Snapshot.take([outer])
    weight.sum().backward()
    outer.base.step()
    assert state_hash([outer]) != before
    snapshot.restore()
    assert not outer.base.state
    assert state_hash([outer]) == before


class _CountingDecay:
    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, epoch: int) -> float:
        self.seen.append(epoch)
        return 0.5**epoch


def _sequential(optimizer: torch.optim.Optimizer) -> Any:
    first = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=2)
    second = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [first, second], milestones=[2])


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=30),
    "multi step": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, milestones=[1, 1, 3]),
    "sequential": _sequential,
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, _CountingDecay()),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:The epoch parameter")  # torch 2.8 warns of its own SequentialLR
def test_schedulers_go_on_as_if_undisturbed(device: str, kind: str) -> None:
    weight = torch.ones(1, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scheduler = SCHEDULERS[kind](optimizer)

    def rates(count: int) -> list[float]:
        seen = []
        for _ in range(count):
            optimizer.step()
            scheduler.step(*([1.0] if kind == "plateau" else []))
            seen.append(optimizer.param_groups[0]["lr"])
        return seen

    rates(1)
    objects = [optimizer, scheduler]
    before, state = state_hash(objects), _plain(scheduler.state_dict())
    snapshot = Snapshot.take(objects)
    undisturbed = rates(6)
    assert state_hash(objects) != before
    snapshot.restore()
    assert _plain(scheduler.state_dict()) == state
    assert state_hash(objects) == before
    assert rates(6) == undisturbed


def test_restoring_a_scheduler_alone_leaves_its_optimizer_alone() -> None:
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    snapshot = Snapshot.take([scheduler])
    optimizer.step()
    scheduler.step()
    snapshot.restore()
    assert scheduler.last_epoch == 0
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_scaler_not_yet_used_is_unused_again(device: str) -> None:
    """A scale that is made on first use is absent again, and an unscaled optimizer may be unscaled again."""
    job = Job(device)
    snapshot = Snapshot.take(job.objects)
    with pytest.raises(InjectedError):
        job.step("unscaled")
    made = ("_scale", "_growth_tracker")
    assert all(vars(job.scaler)[name] is not None for name in made)
    snapshot.restore()
    assert all(vars(job.scaler)[name] is None for name in made)
    assert not job.scaler._per_optimizer_states
    job.step()


class _Average:
    """A moving average with a state of its own, which keeps what it is given."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.settings = {"decay": [0.9]}

    def state_dict(self) -> dict[str, object]:
        return {"shadow": self.shadow, "settings": self.settings}

    def load_state_dict(self, state: Any) -> None:
        self.shadow, self.settings = state["shadow"], state["settings"]


def test_anything_with_a_state_dict_by_value_and_more_than_once(device: str) -> None:
    average = _Average(nn.Linear(2, 2).to(device))
    before = state_hash([average])
    snapshot = Snapshot.take([average])
    assert snapshot.host_bytes == 4 * 6
    for _ in range(2):
        average.shadow["weight"].zero_()
        average.settings["decay"].append(0.5)
        assert state_hash([average]) != before
        snapshot.restore()
        assert state_hash([average]) == before
        assert average.shadow["weight"].device.type == device


class _WithExtraState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scales = [1.0]

    def get_extra_state(self) -> dict[str, list[float]]:
        return {"scales": self.scales}

    def set_extra_state(self, state: Any) -> None:
        self.scales = state["scales"]


def test_extra_state_of_modules() -> None:
    model: Any = nn.Sequential(_WithExtraState())
    snapshot = Snapshot.take([model])
    model[0].scales.append(2.0)
    snapshot.restore()
    assert model[0].scales == [1.0]


def test_compiled_models(device: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).to(device)
    compiled: Any = torch.compile(model, backend="eager")
    before, weight = state_hash([compiled]), model[0].weight
    snapshot = Snapshot.take([compiled])
    compiled(torch.randn(4, 3, device=device)).sum().backward()
    compiled.eval()
    assert state_hash([compiled]) != before
    snapshot.restore()
    assert compiled.training
    assert model[0].weight is weight
    assert state_hash([compiled]) == before


def test_generators_that_are_given(device: str) -> None:
    generator = torch.Generator(device).manual_seed(5)
    snapshot = Snapshot.take([generator])
    drawn = torch.rand(3, generator=generator, device=device)
    snapshot.restore()
    assert torch.equal(torch.rand(3, generator=generator, device=device), drawn)


def test_flags_and_modes_of_the_process() -> None:
    cudnn = torch.backends.cudnn
    before = state_hash([])
    seen = cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, torch.get_float32_matmul_precision()
    snapshot = Snapshot.take([])
    changes: list[Callable[[], object]] = [
        lambda: setattr(cudnn, "enabled", not seen[0]),
        lambda: setattr(cudnn, "benchmark", not seen[1]),
        lambda: setattr(cudnn, "deterministic", not seen[2]),
        lambda: setattr(cudnn, "allow_tf32", not seen[3]),
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: torch.use_deterministic_algorithms(True, warn_only=True),
        lambda: torch.set_default_dtype(torch.float64),
        lambda: torch.set_grad_enabled(False),
        lambda: random.seed(9),
        lambda: np.random.seed(9),
        lambda: torch.rand(1),
    ]
    for change in changes:
        try:
            change()
            assert state_hash([]) != before
        finally:
            snapshot.restore()
        assert state_hash([]) == before
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() is torch.float32
    assert (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == seen[:4]


class _Stubborn(_Average):
    def load_state_dict(self, state: Any) -> None:
        raise InjectedError("will not load")


def test_what_cannot_be_put_back_does_not_keep_the_rest_from_it(device: str) -> None:
    model = nn.Linear(2, 2).to(device)
    stubborn = _Stubborn(model)
    before = state_hash([model])
    snapshot = Snapshot.take([stubborn, model])
    model(torch.randn(1, 2, device=device)).sum().backward()
    with pytest.raises(AutobatchError, match=r"1 part.*_Stubborn .*InjectedError: will not load") as raised:
        snapshot.restore()
    assert isinstance(raised.value.__cause__, ExceptionGroup)
    assert state_hash([model]) == before


def test_hash_tells_every_kind_of_change_and_nothing_else(device: str) -> None:
    """Two jobs made alike hash alike, though they lie at other addresses; any one change shows."""

    def make() -> Job:
        torch.manual_seed(2)
        job = Job(device)
        job.step()
        with pytest.raises(InjectedError):
            job.step("unscaled")  # the scaler now knows the optimizer, by its address
        random.seed(2)
        np.random.seed(2)
        torch.manual_seed(2)
        return job

    random.seed(2)
    np.random.seed(2)
    reference = state_hash(make().objects)
    random.seed(2)
    np.random.seed(2)
    assert state_hash(make().objects) == reference
    changes: dict[str, Callable[[Job], object]] = {
        "one bit": lambda j: j.model.head.weight.data.view(torch.int32)[0, :1].bitwise_xor_(1),
        "mode": lambda j: j.model.dropout.eval(),
        "requires_grad": lambda j: j.model.norm.weight.requires_grad_(False),
        "gradient": lambda j: setattr(j.model.head.weight, "grad", None),
        "untied": lambda j: setattr(j.model.tied, "weight", nn.Parameter(j.model.first.weight.detach().clone())),
        "buffer": lambda j: j.model.get_buffer("norm.num_batches_tracked").add_(1),
        "lr": lambda j: j.optimizer.param_groups[1].update(lr=1.0),
        "state key": lambda j: j.optimizer.state[j.model.head.weight].update(new=1),
        "state dtype": lambda j: j.optimizer.state[j.model.head.weight].update(
            exp_avg=j.optimizer.state[j.model.head.weight]["exp_avg"].double()
        ),
        "scheduler": lambda j: setattr(j.scheduler, "last_epoch", 9),
        "scaler": lambda j: j.scaler._per_optimizer_states.clear(),
    }
    for name, change in changes.items():
        random.seed(2)
        np.random.seed(2)
        job = make()
        change(job)
        assert state_hash(job.objects) != reference, name


def test_host_bytes_count_parameters_buffers_gradients_and_state(device: str) -> None:
    model = nn.Linear(10, 10, bias=False).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert Snapshot.take([model, optimizer]).host_bytes == 400
    model(torch.ones(1, 10, device=device)).sum().backward()
    optimizer.step()
    assert Snapshot.take([optimizer, model]).host_bytes == 1200


@pytest.mark.gpu
def test_restoring_asks_for_no_device_memory_where_nothing_was_dropped() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    model = nn.Linear(512, 512).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 512, device="cuda")).sum().backward()
    optimizer.step()
    snapshot = Snapshot.take([model, optimizer])
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    snapshot.restore()
    assert torch.cuda.max_memory_allocated() == before


@pytest.mark.parametrize("unknown", [object(), [nn.Linear(1, 1)], "model"])
def test_unknown_objects_are_refused_by_name(unknown: object) -> None:
    with pytest.raises(UsageError, match=rf"cannot take a {type(unknown).__name__}: give .*state_dict"):
        Snapshot.take([unknown])


def test_tensors_without_plain_memory_are_refused() -> None:
    with pytest.raises(UsageError, match=r"Linear\.weight is on the meta device"):
        Snapshot.take([nn.Linear(2, 2, device="meta")])
    with pytest.raises(UsageError, match=r"LazyLinear\.weight is not initialized: run one forward pass"):
        Snapshot.take([nn.LazyLinear(2)])
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UsageError, match=r"the gradient of Embedding\.weight .*zero_grad"):
        Snapshot.take([embedding])


def test_sparse_gradients_that_the_job_makes_are_dropped() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    snapshot = Snapshot.take([embedding])
    embedding(torch.tensor([1])).sum().backward()
    snapshot.restore()
    assert embedding.weight.grad is None


@pytest.fixture
def _one_process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Fails(nn.Module):
    """Fails in its forward, or in its backward, when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.fails_in = ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fails_in == "forward":
            raise out_of_memory()
        y: torch.Tensor = self.linear(x)
        if self.fails_in == "backward":
            y.register_hook(self._fail)
        return y

    def _fail(self, gradient: torch.Tensor) -> torch.Tensor:
        raise out_of_memory()


def wrapped_model(wrapper: str) -> tuple[nn.Module, Fails]:
    """Three layers for several ranks, of which the middle one can be told to fail."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    fails = Fails()
    model = nn.Sequential(nn.Linear(4, 4), fails, nn.Linear(4, 4))
    if wrapper == "ddp":
        return nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1e-5), fails
    mesh = init_device_mesh("cpu", (1,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh), fails


@pytest.mark.parametrize("gradients", [False, True], ids=["cleared", "kept"])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.usefixtures("_one_process_group")
def test_wrapped_models_are_put_back_wherever_a_pass_fails(wrapper: str, where: str, gradients: bool) -> None:
    """The same hash, and the same training from there on as of a model that met no failure."""

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        torch.manual_seed(1)
        for _ in range(2):
            model(torch.randn(3, 4)).square().sum().backward()
            optimizer.step()
        if not gradients:
            optimizer.zero_grad()

    hashes = []
    for met in (False, True):
        model, fails = wrapped_model(wrapper)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        train(model, optimizer)
        if met:
            snapshot = Snapshot.take([model, optimizer])
            before = state_hash([model, optimizer])
            train(model, optimizer)  # optimizer state and gradients of its own
            fails.fails_in = where
            with pytest.raises(torch.OutOfMemoryError):
                model(torch.randn(3, 4)).sum().backward()
            fails.fails_in = ""
            snapshot.restore()
            assert state_hash([model, optimizer]) == before
        train(model, optimizer)
        hashes.append(state_hash([model, optimizer]))
    assert hashes[0] == hashes[1]


@pytest.mark.usefixtures("_one_process_group")
def test_what_keeps_its_state_elsewhere_is_refused() -> None:
    """FSDP1's flat parameters and ZeRO's shards are known to themselves alone."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.Linear(2, 2)
    with pytest.raises(UsageError, match=r"ZeroRedundancyOptimizer .*child process"):
        Snapshot.take([model, ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam)])
