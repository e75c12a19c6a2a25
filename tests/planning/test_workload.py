"""What the run's data come to, counted by hand."""

import pytest

from lesft.spec import LossSpec
from lesft_client.data import EncodedSample
from lesft_client.planning.workload import Tokens, fresh_share, micro_batches, workload
from tests.planning.conditions import run_spec


def sample(base: int, reference: int, target: int) -> EncodedSample:
    return EncodedSample([1] * base, [1] * reference, [1] * target)


def test_a_micro_batchs_tokens_are_those_of_both_paths_with_the_target_on_each() -> None:
    spec = run_spec(loss=LossSpec())
    batches = [
        [sample(10, 20, 5), sample(1, 2, 3)],
        [sample(4, 6, 1), sample(4, 6, 1)],
        [sample(2, 2, 2), sample(2, 2, 2)],
    ]
    work = workload(spec, batches, num_samples=6, in_flight=2)
    assert work.tokens == Tokens((19 + 10 + 8) / 3, (30 + 14 + 8) / 3, (8 + 2 + 4) / 3)
    assert work.most_tokens == 30
    assert work.window_tokens == 29
    assert work.window_sent_tokens == 19 + 30 + 10 + 14
    assert workload(run_spec(), batches, 6, 2).tokens.reference == 0


def test_micro_batches_visit_each_sample_once_an_epoch() -> None:
    samples = [sample(number, 1, 1) for number in range(6)]
    batches = micro_batches(run_spec(rounds=2, accumulation=3, batch_size=2), samples, "a")
    assert [len(batch) for batch in batches] == [2] * 6
    drawn = [len(s.base_ids) for batch in batches for s in batch]
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"loss": LossSpec()}, 1.0),
        ({"loss": LossSpec(reference_refresh=0)}, 1 / 5),
        ({"loss": LossSpec(reference_refresh=2)}, 3 / 5),
        ({"loss": LossSpec(reference_refresh=3)}, 2 / 5),
        ({"loss": LossSpec(reference_refresh=9)}, 1 / 5),
        ({"train_front": False}, 1 / 5),
        ({"train_front": False, "rounds": 1}, 1.0),
    ],
)
def test_what_the_server_keeps_is_sent_in_the_epochs_in_which_it_is_due(
    options: dict[str, object], share: float
) -> None:
    # 10 rounds of 4 micro-batches: 8 samples five times.
    assert fresh_share(run_spec(**options), num_samples=8) == pytest.approx(share)
