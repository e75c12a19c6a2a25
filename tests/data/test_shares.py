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


@pytest.mark.parametrize(("of", "per_client", "most"), [(4, 11, 10), (44, 1, 0), (44, None, 0)])
def test_too_few_samples_are_refused_with_their_number(
    of: int, per_client: int | None, most: int
) -> None:
    with pytest.raises(DataError, match=f"there are only 43; ask for at most {most} each"):
        client_share(SAMPLES, 0, of, per_client, seed=0)
