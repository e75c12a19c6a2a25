"""Seeds: the same on every machine, and another for every draw."""

import itertools

import pytest
import torch

from lesft.seeds import derive_seed


@pytest.mark.parametrize(
    ("arguments", "seed"),
    [
        ((0,), 3_456_079_177_858_693_020),
        ((7, "server", 0, 0), 8_320_545_121_188_615_791),
        ((7, "client", "client-0", 3, 1), 6_225_155_917_860_829_772),
        ((2**63 - 1, "lora", "model.layers.0.mlp.up_proj.lora_A.weight"), 565_491_734_689_969_952),
        ((7, "client", "Zoë"), 290_139_796_451_147_017),
    ],
)
def test_known_seeds_stay_what_they_are(arguments: tuple[int | str, ...], seed: int) -> None:
    assert derive_seed(*arguments) == seed  # type: ignore[arg-type]


def test_every_draw_of_a_run_has_a_seed_of_its_own() -> None:
    names: list[tuple[int | str, ...]] = [("server",), ("order", "a"), ("order", "b")]
    names += [("client", client) for client in ("a", "b", "ab", "1", "11", "client-1", "client-11")]
    numbers = (0, 1, 2, 11, 111)
    seeds = [
        derive_seed(run_seed, *name, round_index, micro)
        for run_seed in (0, 1, 2**63 - 1)
        for name in names
        for round_index, micro in itertools.product(numbers, repeat=2)
    ]
    assert len(set(seeds)) == len(seeds) == 3 * 10 * 25


def test_a_part_is_not_joined_with_the_next() -> None:
    assert derive_seed(1, "a", "bc") != derive_seed(1, "ab", "c")
    assert derive_seed(1, 1, 11) != derive_seed(1, 11, 1) != derive_seed(11, 1, 1)
    assert derive_seed(1) != derive_seed(1, "")


def test_seeds_fill_63_bits_which_torch_takes() -> None:
    seeds = [derive_seed(0, index) for index in range(200)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    torch.Generator().manual_seed(2**63 - 1)
