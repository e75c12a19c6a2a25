"""Each client's share where shares are to differ: in the labels of their samples, or in size."""

from collections import Counter
from collections.abc import Sequence

from lesft.errors import DataError
from lesft.seeds import derive_seed
from lesft_client.data.dirichlet import dirichlet
from lesft_client.data.labels import Skew, skew_labels
from lesft_client.data.order import permutation
from lesft_client.data.samples import Sample


def skewed_share(
    samples: Sequence[Sample], index: int, of: int, skew: Skew, alpha: float, seed: int
) -> list[Sample]:
    """The samples of client `index` (from 0) of `of`: disjoint from others', and none is left out.

    The samples of each label are split in proportions over the clients that are drawn from
    Dirichlet(alpha), as in Yurochkin et al. 2019 (arXiv:1905.12022); Hsu et al. 2019
    (arXiv:1909.06335) draw proportions over the labels for each client instead. With `size` all
    samples have one label, so that only the sizes differ. A client that would get nothing gets one
    sample of the client with the most.

    All clients must call it with the same arguments but `index`. Raises DataError when there are
    fewer samples than clients, or no labels to skew by.
    """
    assert skew != "none"
    assert 0 <= index < of
    if len(samples) < of:
        raise DataError(
            f"{of} clients need {of} samples at least, but there are only {len(samples)}; give "
            "more data or fewer shares"
        )
    order = permutation(derive_seed(seed, "share"), len(samples))
    shuffled = [samples[i] for i in order]
    owners = _owners(skew_labels(shuffled, skew), of, skew, alpha, seed)
    _give_each_one(owners, of)
    return [sample for sample, owner in zip(shuffled, owners, strict=True) if owner == index]


def _owners(labels: Sequence[str], of: int, skew: Skew, alpha: float, seed: int) -> list[int]:
    """The client that each place of the labels falls to.

    What a client is owed of a label is rarely a whole number. What it gets too little or too much
    is settled with the next label: each label rounded alone would give the few samples of rare
    labels always to the client of the largest proportion, and large alphas no equal sizes.
    """
    owners = [0] * len(labels)
    owed = [0.0] * of
    by_label: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        by_label.setdefault(label, []).append(place)
    for label, places in sorted(by_label.items()):
        proportions = dirichlet(derive_seed(seed, "skew", skew, label), alpha, of)
        exact = [proportion * len(places) for proportion in proportions]
        counts = _rounded(exact, owed, len(places))
        owed = [before + e - c for before, e, c in zip(owed, exact, counts, strict=True)]
        clients = [client for client, count in enumerate(counts) for _ in range(count)]
        for place, client in zip(places, clients, strict=True):
            owners[place] = client
    return owners


def _rounded(exact: Sequence[float], owed: Sequence[float], total: int) -> list[int]:
    """Whole numbers that add up to `total`, each the exact one rounded down or up.

    Those are rounded up whose remainder, with what they are owed already, is largest.
    """
    counts = [int(value) for value in exact]
    wants = [value - count + debt for value, count, debt in zip(exact, counts, owed, strict=True)]
    for client in sorted(range(len(exact)), key=lambda i: -wants[i])[: total - sum(counts)]:
        counts[client] += 1
    return counts


def _give_each_one(owners: list[int], of: int) -> None:
    sizes = Counter(owners)
    for client in range(of):
        if not sizes[client]:
            richest = max(range(of), key=lambda i: sizes[i])
            owners[owners.index(richest)] = client
            sizes[richest] -= 1
            sizes[client] += 1
