"""What breaks accumulation is named by evidence, what does not is found equal, and the caller's things stay as they are."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from autobatch.errors import UsageError, WorkloadError
from autobatch.plan import make_plan
from autobatch.snapshot import state_hash
from autobatch.training.equivalence import EquivalenceReport, check_equivalence

if TYPE_CHECKING:
    from collections.abc import Callable

IGNORED = -100


def points(samples: int = 8, width: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(samples, width, generator=generator),
        torch.randint(0, 3, (samples,), generator=generator),
    )


def sequences(lengths: tuple[int, ...], vocab: int = 11, seed: int = 0) -> dict[str, torch.Tensor]:
    """Token sequences of these lengths, padded; labels are the tokens, ignored where padded."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, vocab, (len(lengths), max(lengths)), generator=generator)
    labels = tokens.clone()
    for row, length in enumerate(lengths):
        labels[row, length:] = IGNORED
    return {"input_ids": tokens, "labels": labels}


class Language(nn.Module):
    """Embedding and head, the loss shifted inside, as causal language models of libraries have it."""

    def __init__(self, vocab: int = 11) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, 5)
        self.head = nn.Linear(5, vocab)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, *, shifted: bool) -> torch.Tensor:
        logits = self.head(self.embedding(input_ids).cumsum(dim=1))
        if shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def classify(model: nn.Module, batch: Any) -> torch.Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def perceptron(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.ReLU(), nn.Linear(8, 3))


def names(report: EquivalenceReport) -> set[str]:
    return {cause.name for cause in report.causes}


def checked(model: nn.Module, batch: Any, loss_fn: Callable[..., torch.Tensor], **options: Any) -> EquivalenceReport:
    """A check that has to leave everything as it was."""
    before = state_hash([model])
    try:
        return check_equivalence(model, batch, loss_fn, **options)
    finally:
        assert state_hash([model]) == before


@settings(max_examples=12, deadline=None)
@given(st.integers(2, 9), st.integers(1, 8))
def test_a_mean_over_samples_is_equal_however_it_is_split(samples: int, size: int) -> None:
    """A plain model is equal in float64, and the split is the plan's."""
    size = min(size, samples - 1)
    report = checked(perceptron(nn.LayerNorm(8)), points(samples), classify, micro_batch_size=size)
    assert report.equal, report
    assert report.dtype == "float64"
    assert report.relative_difference <= 1e-12
    assert sum(report.micro_batch_sizes) == samples
    assert max(report.micro_batch_sizes) <= size
    assert report.causes == report.notes == ()


@pytest.mark.parametrize("loss_takes_model", [True, False])
def test_the_callers_model_is_left_alone(loss_takes_model: bool) -> None:
    """Gradients, batch statistics, modes, `requires_grad`, generators: the state is the same bit for bit, objects too."""
    model = perceptron(nn.BatchNorm1d(8), nn.Dropout(0.3))
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad])
    classify(model, points(seed=3)).backward()
    optimizer.step()
    before = state_hash([model, optimizer])
    attributes = [id(module.__dict__) for module in model.modules()]
    objects = [id(one) for one in (*model.parameters(), *model.buffers())]
    calls: list[int] = []

    def own(batch: Any) -> torch.Tensor:
        calls.append(len(batch[0]))
        return classify(model, batch)

    report = check_equivalence(model, points(), classify if loss_takes_model else own)
    assert not report.equal
    assert loss_takes_model or calls
    assert state_hash([model, optimizer]) == before
    assert [id(module.__dict__) for module in model.modules()] == attributes
    assert [id(one) for one in (*model.parameters(), *model.buffers())] == objects


def test_the_model_is_left_alone_when_the_loss_fails() -> None:
    """A loss that fails on a part is the workload's error, and everything is put back."""
    model = perceptron(nn.BatchNorm1d(8))
    before = state_hash([model])

    def fails_on_parts(batch: Any) -> torch.Tensor:
        torch.rand(3)
        if len(batch[0]) < 8:
            raise ValueError("no parts please")
        return classify(model, batch)

    with pytest.raises(WorkloadError, match=r"failed on a part of the batch: ValueError: no parts"):
        check_equivalence(model, points(), fails_on_parts)
    assert state_hash([model]) == before


@pytest.mark.parametrize("tracked", [True, False])
def test_batch_norm_is_named_and_eval_mode_is_equal(tracked: bool) -> None:
    """Training-mode batch norm differs and is named by its place, also without running statistics; in eval mode it is equal."""
    model = perceptron(nn.BatchNorm1d(8, track_running_stats=tracked))
    report = checked(model, points(), classify)
    assert not report.equal
    assert names(report) == {"batch statistics"}
    assert "1 (BatchNorm1d)" in report.causes[0].why
    if tracked:
        assert any("running_mean" in note for note in report.notes)
        model[1].eval()
        assert checked(model, points(), classify).equal


def test_a_normalization_of_ones_own_is_named_by_what_it_does() -> None:
    """A module that is no BatchNorm, but normalizes by the batch and keeps running statistics, is found."""

    class Whitening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("level", torch.zeros(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.training:
                return x - self.level
            with torch.no_grad():
                self.level.lerp_(x.mean(0), 0.1)
            return x - x.mean(0)

    report = checked(perceptron(Whitening()), points(), classify)
    assert names(report) == {"batch statistics"}
    assert "Whitening" in report.causes[0].why


def test_buffers_that_the_forward_reads_and_writes_are_named() -> None:
    """A scale that follows the forwards is another one in the second micro-batch."""

    class Following(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * self.scale.clone()
            self.scale.mul_(1.1)
            return y

    report = checked(perceptron(Following()), points(), classify)
    assert names(report) == {"buffers"}
    assert "1.scale" in report.causes[0].why


def test_a_sum_taken_for_a_mean_and_the_reverse() -> None:
    """Each is named with the reduction to pass, and equal once it is passed."""

    def total(model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    model = perceptron()
    wrong = checked(model, points(), total)
    assert names(wrong) == {"sum"}
    assert not wrong.equal
    assert wrong.worst_parameter in dict(model.named_parameters())
    assert checked(model, points(), total, loss_reduction="sum").equal
    assert names(checked(model, points(), classify, loss_reduction="sum")) == {"mean"}


@pytest.mark.parametrize("shifted", [False, True])
def test_transformers_34191_trl_2175_unweighted_token_losses(shifted: bool) -> None:
    """Sequences of unlike lengths averaged per micro-batch differ; the count that mends it is named, shifted or not."""
    torch.manual_seed(0)
    model, batch = Language(), sequences((7, 2, 5, 3, 6, 4))

    def loss(batch: Any) -> torch.Tensor:
        result: torch.Tensor = model(**batch, shifted=shifted)
        return result

    report = checked(model, batch, loss)
    assert not report.equal
    assert names(report) == {"token mean"}
    part = "[:, 1:]" if shifted else ""
    assert report.causes[0].way_out == f"pass count=lambda batch: (batch['labels']{part} != -100).sum()"
    named = eval(report.causes[0].way_out.removeprefix("pass count="))  # noqa: S307 - the advice itself is what is tested
    assert checked(model, batch, loss, count=named).equal
    # A count that forgets the shift is wrong too, and the right one is found.
    if shifted:
        wrong = checked(model, batch, loss, count=lambda one: (one["labels"] != IGNORED).sum())
        assert names(wrong) == {"token mean"}


def test_equal_lengths_need_no_count() -> None:
    """Where every micro-batch has as many labels for each sample, the plain weights are right."""
    model = Language()
    assert checked(model, sequences((5,) * 6), lambda batch: model(**batch, shifted=True)).equal


def test_an_uncounted_mean_is_told_from_samples_that_depend_on_each_other() -> None:
    """A mean weighted by something that is not in the batch as whole numbers is still a weighted mean."""

    def weighted(model: nn.Module, batch: Any) -> torch.Tensor:
        losses = functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        importance = batch[0][:, 0].exp()
        return (losses * importance).sum() / importance.sum()

    report = checked(perceptron(), points(), weighted)
    assert names(report) == {"uncounted mean"}
    assert checked(perceptron(), points(), weighted, count=lambda batch: batch[0][:, 0].double().exp().sum()).equal


def contrastive(model: nn.Module, batch: Any) -> torch.Tensor:
    one = functional.normalize(model(batch[0]), dim=1)
    other = functional.normalize(model(batch[0].flip(1)), dim=1)
    return functional.cross_entropy(one @ other.T / 0.2, torch.arange(len(one)))


def test_an_in_batch_contrastive_loss_is_named() -> None:
    """Negatives from the batch: what a sample adds depends on the others, which no weights mend."""
    report = checked(perceptron(), points(), contrastive)
    assert not report.equal
    assert names(report) == {"in-batch loss"}


def test_two_samples_show_a_contrastive_loss() -> None:
    """The least batch: each alone has no negative at all."""
    assert names(checked(perceptron(), points(2), contrastive)) == {"in-batch loss"}


def test_batch_norm_under_a_contrastive_loss_is_named_beside_it() -> None:
    """Where no change makes both equal, what else normalizes over the batch is not passed over."""
    report = checked(perceptron(nn.BatchNorm1d(8)), points(), contrastive)
    assert names(report) == {"batch statistics", "in-batch loss"}


def test_a_statistic_over_the_batch_in_the_loss_is_named() -> None:
    """A loss of the outputs' spread couples samples although it has no negatives."""
    report = checked(perceptron(), points(), lambda model, batch: (1 - model(batch[0]).std(0)).square().mean())
    assert names(report) == {"in-batch loss"}


def test_two_causes_are_both_named() -> None:
    """Batch norm and a sum at once: neither change alone removes the difference."""

    def total(model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    assert names(checked(perceptron(nn.BatchNorm1d(8)), points(), total)) == {"batch statistics", "sum"}


def test_dropout_is_compared_with_the_seeds_held_for_each_sample() -> None:
    """A model with dropout is equal once a sample's mask is the same whole and split, and the report says how."""
    # Two layers: with one, a generator that just runs on would draw the same masks by chance of its order.
    report = checked(perceptron(nn.Dropout(0.4), nn.Dropout(0.2)), points(), classify)
    assert report.equal, report
    assert report.relative_difference <= 1e-12
    assert any("stochastic" in note and "seeds held for each sample" in note for note in report.notes)


def test_dropout_between_the_layers_of_an_lstm_is_held() -> None:
    """Its draws have the samples in the second dimension."""
    torch.manual_seed(0)
    model = nn.LSTM(6, 8, 2, dropout=0.3, batch_first=True)
    report = checked(model, torch.randn(6, 5, 6), lambda one, batch: one(batch)[0].square().mean())
    assert report.equal, report
    assert any("stochastic" in note for note in report.notes)


def test_a_transformer_with_dropout_and_unlike_lengths() -> None:
    """Attention's dropout is held as well; the count is the only cause."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
    model = nn.Sequential(nn.Embedding(11, 8), layer, nn.Linear(8, 11))
    batch = sequences((6, 2, 5, 4))
    report = checked(
        model,
        batch,
        lambda one, part: functional.cross_entropy(one(part["input_ids"]).flatten(0, 1), part["labels"].flatten()),
    )
    assert names(report) == {"token mean"}


def test_held_noise_hides_no_error() -> None:
    """Dropout together with a sum taken for a mean is still a difference, by the sum alone."""

    def total(model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    assert names(checked(perceptron(nn.Dropout(0.4)), points(), total)) == {"sum"}


@pytest.mark.parametrize("noise", ["randn_like", "normal_", "rand", "weights"])
def test_noise_of_other_kinds_is_held(noise: str) -> None:
    """Noise drawn in the loss itself, and noise on weights, which all samples share."""

    def noisy(model: nn.Module, batch: Any) -> torch.Tensor:
        x = batch[0]
        match noise:
            case "randn_like":
                x = x + 0.3 * torch.randn_like(x)
            case "normal_":
                x = x + torch.empty_like(x).normal_(std=0.3)
            case "rand":
                x = x * torch.rand(len(x), 1, dtype=x.dtype)
            case _:
                x = x * (torch.rand(6, dtype=x.dtype) > 0.3)
        return classify(model, (x, batch[1]))

    report = checked(perceptron(), points(), noisy)
    assert report.equal, report
    assert any("stochastic" in note for note in report.notes)


def test_draws_that_cannot_be_held_are_said() -> None:
    """A shuffle across the batch belongs to no sample: stochastic, and seen to be equal without it."""

    class Mixing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x[torch.randperm(len(x))] if self.training else x

    report = checked(perceptron(Mixing()), points(), classify)
    assert not report.equal
    assert names(report) == {"stochastic"}
    assert "randperm" in report.causes[0].why


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("takes_model", [True, False])
def test_gradient_checkpointing_is_equal(reentrant: bool, takes_model: bool) -> None:
    """What is computed again in the backward is the copy's, with the same dropout."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block = nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh())
            self.head = nn.Linear(8, 3)

        def middle(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.block(x)
            return result

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(checkpoint(self.middle, self.first(x), use_reentrant=reentrant))  # type: ignore[no-any-return]

    model = Checkpointed()
    report = checked(model, points(), classify if takes_model else lambda batch: classify(model, batch))
    assert report.equal, report


def test_what_cannot_run_in_float64_is_compared_in_its_own_precision() -> None:
    """A model that insists on float32 is equal within rounding; the report says so, and a real difference is still found."""

    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = perceptron()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert self.inner[0].weight.dtype is torch.float32, "single precision only"
            result: torch.Tensor = self.inner(x)
            return result

    report = checked(Single(), points(), classify)
    assert report.equal, report
    assert report.dtype == "float32"
    assert report.tolerance >= 1e-5
    assert any("single precision only" in note for note in report.notes)

    def total(model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    assert names(checked(Single(), points(), total)) == {"sum"}


def test_parts_in_float32_are_no_difference() -> None:
    """A sum over samples in float32, inside a float64 run, leaves a rounding that reordered samples show as well."""

    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.linear(x.float(), self.weight.float()).to(x.dtype)

    torch.manual_seed(0)
    report = checked(perceptron(Casting()), points(48), classify)
    assert report.dtype == "float64"
    assert report.relative_difference > 1e-10, "the case is there"
    assert report.equal, report
    assert report.tolerance <= 1e-5
    assert any("below float64" in note for note in report.notes)


def test_a_plan_is_split_by() -> None:
    """The micro-batches are the plan's where the batch is its whole share, and fewer where it holds less."""
    plan = make_plan(target=8, max_micro_batch_size=3, split="balanced")
    assert checked(perceptron(), points(8), classify, plan=plan).micro_batch_sizes == (3, 3, 2)
    assert checked(perceptron(), points(5), classify, plan=plan).micro_batch_sizes == (3, 2)


def test_what_would_prove_nothing_is_refused() -> None:
    """One sample, one micro-batch, another model's loss, no trained parameter."""
    model, other = perceptron(), perceptron()
    with pytest.raises(UsageError, match="has 1 sample"):
        check_equivalence(model, points(1), classify)
    with pytest.raises(UsageError, match="8 samples is one micro-batch of up to 8"):
        check_equivalence(model, points(8), classify, micro_batch_size=8)
    with pytest.raises(UsageError, match="give one"):
        check_equivalence(
            model, points(), classify, micro_batch_size=2, plan=make_plan(target=8, max_micro_batch_size=4)
        )
    with pytest.raises(UsageError, match="does loss_fn run the model that was given"):
        checked(model, points(), lambda batch: classify(other, (batch[0].float(), batch[1])))
    model.requires_grad_(False)
    with pytest.raises(UsageError, match="0 parameters"):
        check_equivalence(model, points(), classify)


def test_gradients_that_are_not_finite_are_the_workloads_error() -> None:
    """Nothing can be compared with infinity."""
    with pytest.raises(WorkloadError, match="not finite on the whole batch"):
        checked(perceptron(), points(), lambda model, batch: classify(model, batch) * float("inf"))


def test_the_report_has_a_json_form() -> None:
    """Everything that it says is in the form, and the form is JSON."""
    form = check_equivalence(perceptron(nn.BatchNorm1d(8)), points(), classify).to_dict()
    read = json.loads(json.dumps(form))
    assert read["equal"] is False
    assert read["causes"][0]["name"] == "batch statistics"
    assert set(read["causes"][0]) == {"name", "why", "way_out"}
    assert read["worst_parameter"]
