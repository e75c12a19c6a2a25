import pytest
from hypothesis import given
from hypothesis import strategies as st

from lesft.errors import DataError
from lesft_client.data import Sample, client_share

SAMPLES = [Sample(f"prompt {i}", "target", "reference", "answer") for i in range(43)]


@given(st.integers(1, 10), st.integers(0, 2**63 - 1))
def test_shares_are_equal_disjoint_and_as_large_as_they_can_be(of: int, seed: int) -> None:
    shares = [client_share(SAMPLES, i, of, None, seed) for i in range(of)]
    assert [len(share) for share in shares] == [43 // of] * of
    assert len({sample.prompt for share in shares for sample in share}) == of * (43 // of)


def test_a_smaller_share_is_the_beginning_of_the_whole_one() -> None:
    whole = client_share(SAMPLES, 2, 4, None, seed=5)
    assert client_share(SAMPLES, 2, 4, 6, seed=5) == whole[:6]


def test_the_seed_decides_who_gets_what() -> None:
    assert client_share(SAMPLES, 0, 4, 10, seed=1) == client_share(SAMPLES, 0, 4, 10, seed=1)
    assert client_share(SAMPLES, 0, 4, 10, seed=1) != client_share(SAMPLES, 0, 4, 10, seed=2)


def test_a_share_is_shuffled_out_of_the_whole_data() -> None:
    share = client_share(SAMPLES, 0, 2, None, seed=0)
    positions = [SAMPLES.index(sample) for sample in share]
    assert positions != sorted(positions)
    assert min(positions) < 8
    assert max(positions) > 30


def test_too_large_shares_are_refused_with_the_largest_possible() -> None:
    with pytest.raises(
        DataError, match=r"need 44 samples, but there are only 43; ask for at most 10 each"
    ):
        client_share(SAMPLES, 0, 4, 11, seed=0)


@pytest.mark.parametrize("per_client", [1, None])
def test_more_clients_than_samples_are_refused(per_client: int | None) -> None:
    with pytest.raises(
        DataError, match=r"^44 clients need 44 samples at least, but there are only 43; "
    ):
        client_share(SAMPLES, 0, 44, per_client, seed=0)
