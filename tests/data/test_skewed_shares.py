from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lesft.errors import DataError
from lesft.seeds import derive_seed
from lesft_client.data import Sample, Skew, label_counts, skewed_share
from lesft_client.data.dirichlet import dirichlet

SKEWS: tuple[Skew, ...] = ("label", "answer", "steps", "size")
SEEDS = st.integers(0, 2**63 - 1)


def made(count: int, num_labels: int = 5) -> list[Sample]:
    """Samples whose label, letter and number of steps go together, `num_labels` in turn."""
    kinds = [index % num_labels for index in range(count)]
    return [
        Sample(f"prompt {i}", "x\n" * (1 + kind), "reference", "ABCDEFGHIJ"[kind], f"kind {kind}")
        for i, kind in enumerate(kinds)
    ]


def shares_of(
    samples: list[Sample], of: int, skew: Skew, alpha: float, seed: int = 0
) -> list[list[Sample]]:
    return [skewed_share(samples, i, of, skew, alpha, seed) for i in range(of)]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(0, 80),
    st.sampled_from(SKEWS),
    st.sampled_from([1e-9, 0.1, 0.5, 3, 1e6]),
    SEEDS,
)
def test_shares_are_disjoint_and_complete_and_none_is_empty(
    of: int, more: int, skew: Skew, alpha: float, seed: int
) -> None:
    samples = made(max(of, 2) + more)
    shares = shares_of(samples, of, skew, alpha, seed)
    prompts = [sample.prompt for share in shares for sample in share]
    assert len(prompts) == len(samples)
    assert set(prompts) == {sample.prompt for sample in samples}
    assert min(map(len, shares)) >= 1


@pytest.mark.parametrize("skew", SKEWS)
def test_a_large_alpha_gives_equal_shares_of_every_label(skew: Skew) -> None:
    for share in shares_of(made(400), 4, skew, 1e9):
        assert len(share) == 100
        if skew != "size":
            assert set(label_counts(share, skew).values()) == {20}


def test_a_large_alpha_gives_equal_sizes_also_where_labels_are_rare() -> None:
    shares = shares_of(made(40, num_labels=10), 8, "label", 1e9)
    assert [len(share) for share in shares] == [5] * 8


def test_a_small_alpha_gives_each_label_to_few_clients() -> None:
    owners = [
        max(Counter(sample.label for sample in share)[f"kind {kind}"] for share in shares) / 20
        for seed in range(40)
        for shares in [shares_of(made(100), 4, "label", 0.05, seed)]
        for kind in range(5)
    ]
    assert sum(owner > 0.9 for owner in owners) > 0.7 * len(owners)


def test_the_smaller_alpha_the_farther_apart_sizes_are() -> None:
    def largest(alpha: float) -> float:
        seeds = range(60)
        sizes = [max(map(len, shares_of(made(80), 4, "size", alpha, s))) for s in seeds]
        return sum(sizes) / len(sizes)

    assert 20 <= largest(1e6) < 21 < largest(10) < 35 < largest(0.5) < 60 < largest(0.1) <= 77


def test_a_skew_of_size_leaves_the_mixture_alone() -> None:
    samples = made(2000)
    sizes = set()
    for share in shares_of(samples, 4, "size", 2, seed=3):
        sizes.add(len(share))
        for count in label_counts(share, "size").values():
            assert abs(count - len(share) / 5) < 3 * (len(share) * 0.2 * 0.8) ** 0.5
    assert len(sizes) == 4


def test_each_label_is_split_as_drawn_up_or_down_to_whole_samples() -> None:
    shares = shares_of(made(500), 4, "label", 0.7, seed=11)
    for kind in range(5):
        drawn = dirichlet(derive_seed(11, "skew", "label", f"kind {kind}"), 0.7, 4)
        for share, proportion in zip(shares, drawn, strict=True):
            count = sum(sample.label == f"kind {kind}" for sample in share)
            assert abs(count - 100 * proportion) < 1


def test_who_would_get_nothing_gets_one_sample_of_the_largest_share() -> None:
    shares = shares_of(made(30), 6, "size", 1e-9)
    assert sorted(map(len, shares)) == [1, 1, 1, 1, 1, 25]


def test_the_seed_decides_who_gets_what() -> None:
    samples = made(60)
    first = skewed_share(samples, 0, 4, "label", 0.5, 1)
    assert first == skewed_share(samples, 0, 4, "label", 0.5, 1)
    assert first != skewed_share(samples, 0, 4, "label", 0.5, 2)


def test_a_share_is_in_shuffled_order() -> None:
    kinds = [sample.label for sample in skewed_share(made(200), 0, 2, "label", 5, 0)]
    assert kinds != sorted(kinds)
    assert len(set(kinds)) == 5


def test_the_shares_are_the_same_on_every_machine_and_python() -> None:
    shares = shares_of(made(24), 3, "label", 0.5, seed=7)
    assert [[int(s.prompt.split()[1]) for s in share] for share in shares] == [
        [6, 9],
        [11, 1, 8, 7, 23, 15, 18],
        [21, 16, 17, 2, 4, 22, 0, 14, 13, 20, 10, 19, 12, 5, 3],
    ]
    shares = shares_of(made(24), 3, "size", 0.5, seed=7)
    assert [[int(s.prompt.split()[1]) for s in share] for share in shares] == [
        [6, 11],
        [1, 21, 8, 16],
        [7, 9, 23, 17, 2, 4, 15, 22, 0, 14, 18, 13, 20, 10, 19, 12, 5, 3],
    ]


@pytest.mark.parametrize("skew", SKEWS)
def test_more_clients_than_samples_are_refused(skew: Skew) -> None:
    with pytest.raises(
        DataError, match=r"^44 clients need 44 samples at least, but there are only 43; give more"
    ):
        skewed_share(made(43), 0, 44, skew, 0.5, 0)
