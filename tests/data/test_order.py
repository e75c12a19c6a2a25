from hypothesis import given
from hypothesis import strategies as st

from lesft_client.data.order import permutation, sample_index

SIZES = st.integers(min_value=1, max_value=60)
SEEDS = st.integers(min_value=0, max_value=2**63 - 1)


@given(SEEDS, SIZES, st.integers(min_value=0, max_value=5))
def test_every_epoch_visits_every_sample_once(seed: int, size: int, epoch: int) -> None:
    start = epoch * size
    visited = [sample_index(seed, "clinic", start + i, size) for i in range(size)]
    assert sorted(visited) == list(range(size))


@given(SEEDS, SIZES, st.lists(st.integers(min_value=0, max_value=500), max_size=20))
def test_a_position_gives_the_same_sample_whatever_was_asked_before(
    seed: int, size: int, positions: list[int]
) -> None:
    forward = {p: sample_index(seed, "clinic", p, size) for p in sorted(positions)}
    assert [sample_index(seed, "clinic", p, size) for p in positions] == [
        forward[p] for p in positions
    ]


def test_epochs_clients_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, client: str, epoch: int) -> list[int]:
        return [sample_index(seed, client, epoch * 50 + i, 50) for i in range(50)]

    first = order(1, "a", 0)
    assert first != order(1, "a", 1)
    assert first != order(1, "b", 0)
    assert first != order(2, "a", 0)
    assert first == order(1, "a", 0)


def test_the_order_is_the_same_on_every_machine_and_python() -> None:
    order = [sample_index(0, "client-1", i, 8) for i in range(16)]
    assert order == [5, 1, 4, 7, 6, 3, 2, 0, 7, 5, 6, 1, 2, 4, 0, 3]


def test_a_permutation_is_fair_to_every_place() -> None:
    firsts = [permutation(seed, 4)[0] for seed in range(4000)]
    assert all(850 < firsts.count(i) < 1150 for i in range(4))
