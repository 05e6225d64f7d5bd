"""The search finds the exact maximum with its certificate, in few trials, whatever the curve."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
from curves import Curve, recorded_curves, search_curve, synthetic_curve
from hypothesis import given, settings
from hypothesis import strategies as st

from autobatch.search import SearchSpace, find_bracket, next_size
from autobatch.trial import Outcome

RECORDED = recorded_curves()
CEILINGS = (256, 1024, 4096)


def certified(curve: Curve, candidates: range) -> int | None:
    """The answer of a search, checked against its own trials and, where the curve is monotone, against brute force."""
    search = search_curve(curve, candidates)
    fits, fails = search.bracket.fits, search.bracket.fails
    tried = {trial.micro_batch_size: trial.fits for trial in search.trials}
    if fits is None:
        assert tried[candidates[0]] is False
    else:
        assert tried[fits] is True
        assert all(ok for size, ok in tried.items() if size <= fits)
        assert fits == candidates[-1] or tried[candidates[candidates.index(fits) + 1]] is False
        assert fails is None or fails > fits
    return fits


@pytest.mark.parametrize("ceiling", CEILINGS)
@pytest.mark.parametrize("curve", RECORDED, ids=lambda curve: curve.name)
def test_recorded_curves_are_answered_exactly_in_few_trials(curve: Curve, ceiling: int):
    """On every recorded curve: the maximum of brute force, in at most 8 sizes.

    Where the curve is not monotone, any size that fits with its next one failing, and no failing tried size below it.
    """
    search = search_curve(curve, range(1, ceiling + 1))
    answers = curve.right_answers(ceiling)
    assert certified(curve, range(1, ceiling + 1)) in answers
    assert curve.true_maximum(ceiling) in answers
    assert search.num_sizes <= 8, search.path


def test_all_but_a_few_recorded_curves_have_one_right_answer():
    """The test above says little of a curve with many right answers: few have more than one, and none many."""
    several = [curve.name for curve in RECORDED if len(curve.right_answers(4096)) > 1]
    assert len(several) <= 3, several
    assert all(len(curve.right_answers(4096)) <= 2 for curve in RECORDED)


def test_the_median_search_takes_four_sizes_and_one_oom():
    """Over the recorded curves: a median of at most 4 sizes and at most one out-of-memory error."""
    searches = [search_curve(curve, range(1, ceiling + 1)) for curve in RECORDED for ceiling in CEILINGS]
    assert len(searches) >= 3 * 12
    assert statistics.median(search.num_sizes for search in searches) <= 4
    assert statistics.median(search.num_ooms for search in searches) <= 1


@given(
    base=st.floats(0, 5000),
    per_sample=st.floats(0.5, 6000),
    step=st.sampled_from([1, 1, 2, 8, 32]),
    noise=st.sampled_from([0, 0, 50, 500]),
    overhead=st.floats(0, 0.5),
    ceiling=st.integers(1, 5000),
    seed=st.integers(0, 100),
)
@settings(max_examples=400, deadline=None)
def test_synthetic_curves_end_with_a_certificate(base, per_sample, step, noise, overhead, ceiling, seed):
    """Affine, stepped and noisy curves of any slope: a certificate, in no more than bisection would take and a few."""
    curve = synthetic_curve(
        base_mib=base, per_sample_mib=per_sample, step=step, noise_mib=noise, overhead=overhead, seed=seed
    )
    answer = certified(curve, range(1, ceiling + 1))
    search = search_curve(curve, range(1, ceiling + 1))
    assert search.num_sizes <= 8 + ceiling.bit_length(), search.path
    if not noise:
        fitting = [n for n in range(1, ceiling + 1) if curve.trial_at(n).fits]
        assert answer == (max(fitting) if fitting else None)


@given(failing=st.lists(st.integers(60, 100), max_size=5), ceiling=st.integers(50, 300))
@settings(max_examples=100, deadline=None)
def test_a_curve_that_is_not_monotone_near_the_top_still_ends_with_a_certificate(failing, ceiling):
    """Sizes that fail between sizes that fit: any answer with its neighbour failing and nothing failing below is right."""
    certified(synthetic_curve(failing=failing), range(1, ceiling + 1))


@pytest.mark.parametrize("true", [7, 37, 100, 300, 1000])
def test_the_peers_table_is_answered_exactly(true: int):
    """The maxima of the peers' comparison (7 to 1000), which none of them but two answers exactly, in at most 8 sizes."""
    curve = synthetic_curve(budget_mib=40_000, base_mib=2000, per_sample_mib=(40_000 - 300 - 2000) / (true + 0.5))
    search = search_curve(curve, range(1, 2049))
    assert search.bracket.fits == true
    assert search.num_sizes <= 8, search.path
    assert search.num_ooms <= 4, search.path


def test_nothing_fits_ends_with_the_smallest_size_tried():
    """Nothing fits: no answer, and the smallest size is among the trials (PEERS defect 2)."""
    search = search_curve(synthetic_curve(base_mib=20_000), range(1, 257))
    assert search.bracket.fits is None
    assert search.bracket.fails == 1


def test_everything_fits_ends_at_the_ceiling_that_was_tried():
    """Everything fits: the ceiling itself ran (PEERS defect 1), in two sizes."""
    search = search_curve(synthetic_curve(per_sample_mib=1), range(1, 257))
    assert search.bracket.fits == 256
    assert search.bracket.fails is None
    assert search.num_sizes == 2


@pytest.mark.parametrize(("per_sample", "answer"), [(100, 1), (20_000, None)])
def test_one_candidate_takes_one_trial(per_sample: float, answer: int | None):
    """One size only: one trial, whatever comes of it."""
    search = search_curve(synthetic_curve(per_sample_mib=per_sample), range(1, 2))
    assert search.bracket.fits == answer
    assert search.num_sizes == 1


@pytest.mark.parametrize("candidates", [range(8, 257, 8), [1, 2, 3, 4, 5, 7, 9, 12, 16, 22, 32, 64, 128, 256]])
def test_only_candidates_are_tried(candidates):
    """Multiples, or the sizes at which a plan changes: nothing else is tried, and the neighbour is the next candidate."""
    curve = synthetic_curve()
    search = search_curve(curve, candidates)
    assert {trial.micro_batch_size for trial in search.trials} <= set(candidates)
    assert search.bracket.fits == max(n for n in candidates if curve.trial_at(n).fits)
    assert search.bracket.fails == min(n for n in candidates if not curve.trial_at(n).fits)


def test_a_negative_slope_between_small_sizes_only_misleads_a_proposal():
    """PEERS defect 11: a fit over cached blocks with a negative slope may only propose; the answer stays exact."""
    curve = synthetic_curve()

    def misleading(size: int):
        trial = curve.trial_at(size)
        if size > 20:
            return trial
        held = trial.held_bytes
        return dataclasses.replace(trial, peak_allocated_bytes=held - 1, peak_reserved_bytes=held, footprint_bytes=held)

    search = search_curve(dataclasses.replace(curve, trial_at=misleading), range(1, 1025))
    assert search.bracket.fits == curve.true_maximum(1024)


def test_a_search_goes_on_from_its_journal():
    """The trials are all the state: interrupted anywhere, a search proposes the same next size."""
    curve = synthetic_curve(noise_mib=300)
    whole = search_curve(curve, range(1, 1025)).trials
    space = SearchSpace(candidates=range(1, 1025), budget_bytes=curve.budget_bytes, share=1025)
    for cut in range(len(whole)):
        assert next_size(whole[:cut], space) == whole[cut].micro_batch_size
    assert next_size(whole, space) is None


def test_a_size_that_fails_once_is_no_answer():
    """A size that both fitted and failed (a confirmation that failed) counts as failing, and the search goes below it."""
    curve = synthetic_curve()
    search = search_curve(curve, range(1, 257))
    answer = search.bracket.fits
    assert answer is not None
    refuted = dataclasses.replace(curve.trial_at(answer + 1), micro_batch_size=answer, window=(), confirmation=True)
    trials = [*search.trials, refuted]
    bracket = find_bracket(trials)
    assert bracket.fails == answer
    assert bracket.fits is not None
    assert bracket.fits < answer
    space = SearchSpace(candidates=range(1, 257), budget_bytes=curve.budget_bytes, share=257)
    following = next_size(trials, space)
    assert following is None or bracket.fits < following < answer


def test_thrashing_and_over_budget_bound_the_answer_like_an_oom():
    """Whatever is no fit bounds the answer, without an error's figures to go by."""
    curve = synthetic_curve()

    def softly(size: int):
        trial = curve.trial_at(size)
        return (
            trial if trial.fits else dataclasses.replace(trial, outcome=Outcome.THRASHES, oom_request_bytes=0, steps=3)
        )

    search = search_curve(dataclasses.replace(curve, trial_at=softly), range(1, 1025))
    assert search.bracket.fits == curve.true_maximum(1024)
    assert search.num_sizes <= 8, search.path


def whole_share_curve(share: int, *, gradient_mib: int) -> Curve:
    """Sizes below the share hold gradients beside their activations; the share itself, in one micro-batch, does not."""
    accumulating = synthetic_curve(base_mib=500 + gradient_mib)
    whole = synthetic_curve(base_mib=500)

    def trial_at(size: int):
        gradients = gradient_mib * (1 << 20)
        if size < share:
            return dataclasses.replace(accumulating.trial_at(size), gradient_bytes=gradients)
        return dataclasses.replace(whole.trial_at(size), micro_batches_per_step=1, window=())

    return dataclasses.replace(accumulating, trial_at=trial_at)


def search_share(curve: Curve, share: int):
    space = SearchSpace(candidates=range(1, share + 1), budget_bytes=curve.budget_bytes, share=share)
    trials = []
    while (size := next_size(trials, space)) is not None:
        trials.append(curve.trial_at(size))
        assert len(trials) < 32
    return trials, find_bracket(trials)


def test_a_share_that_fits_whole_is_found_where_smaller_sizes_fail_for_their_gradients():
    """N = share runs without accumulation, and may fit where share - 1 does not: it is tried, and is the answer."""
    share = 84  # 10,000 MiB hold 92 samples without 900 MiB of gradients, 83 with them
    trials, bracket = search_share(whole_share_curve(share, gradient_mib=1300), share)
    assert any(not trial.fits for trial in trials)
    assert bracket.fits == share
    assert bracket.fails is None


def test_a_share_far_above_what_fits_is_not_tried_whole():
    """Without its gradients the share would still not fit: no trial is spent on it."""
    share = 200
    trials, bracket = search_share(whole_share_curve(share, gradient_mib=1300), share)
    assert max(trial.micro_batch_size for trial in trials) < share
    assert bracket.fails == (bracket.fits or 0) + 1


def test_a_share_is_tried_whole_where_not_even_the_smallest_size_holds_its_gradients():
    """Two samples with gradients are too much, both at once without them are not: the share whole is the answer."""
    share = 2
    trials, bracket = search_share(whole_share_curve(share, gradient_mib=9_500), share)
    assert [trial.fits for trial in trials] == [False, True]
    assert bracket.fits == share


@settings(max_examples=100, deadline=None)
@given(true=st.integers(1, 999), off=st.integers(-3, 3))
def test_a_search_that_knows_where_to_begin(true: int, off: int):
    """Right to the sample it takes two trials; some samples beside it still ends with the certificate, in few."""
    curve = synthetic_curve(budget_mib=40_000, base_mib=2000, per_sample_mib=(40_000 - 300 - 2000) / (true + 0.5))
    expected = search_curve(curve, range(1, 1001)).bracket
    search = search_curve(curve, range(1, 1001), first=max(1, true + off))
    assert (search.bracket.fits, search.bracket.fails) == (expected.fits, expected.fails)
    assert search.num_sizes <= 10
    exact = search_curve(curve, range(1, 1001), first=expected.fits)
    assert exact.num_sizes == 2
