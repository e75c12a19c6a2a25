"""Each client's share of a data set that several clients split among them."""

from collections.abc import Sequence

from lesft.errors import DataError
from lesft.seeds import derive_seed
from lesft_client.data.order import permutation
from lesft_client.data.samples import Sample


def client_share(
    samples: Sequence[Sample], index: int, of: int, per_client: int | None, seed: int
) -> list[Sample]:
    """The samples of client `index` (from 0) of `of`: its part of a shuffle, disjoint from others'.

    All clients must call it with the same samples and seed. With `per_client` None a share is as
    large as it can be while all are equal; a smaller `per_client` takes the first of the same
    share. Raises DataError when there are not enough samples.
    """
    assert 0 <= index < of
    largest = len(samples) // of
    wanted = per_client if per_client is not None else max(largest, 1)
    if largest == 0:
        raise DataError(
            f"{of} clients need {of} samples at least, but there are only {len(samples)}; give "
            "more data or fewer shares"
        )
    if wanted > largest:
        raise DataError(
            f"{of} clients with {wanted} samples each need {of * wanted} samples, but there are "
            f"only {len(samples)}; ask for at most {largest} each or give more data"
        )
    order = permutation(derive_seed(seed, "share"), len(samples))
    return [samples[i] for i in order[index::of][:wanted]]
