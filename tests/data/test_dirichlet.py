from statistics import fmean, pvariance

import pytest

from lesft_client.data.dirichlet import dirichlet


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1, 3, 40])
def test_proportions_have_the_mean_and_variance_of_the_distribution(alpha: float) -> None:
    draws = [dirichlet(seed, alpha, 4) for seed in range(4000)]
    for client in range(4):
        proportions = [draw[client] for draw in draws]
        variance = 3 / (16 * (4 * alpha + 1))
        assert fmean(proportions) == pytest.approx(1 / 4, abs=4 * (variance / 4000) ** 0.5)
        assert pvariance(proportions) == pytest.approx(variance, rel=0.12)


def test_two_proportions_with_an_alpha_of_one_are_uniform() -> None:
    firsts = sorted(dirichlet(seed, 1, 2)[0] for seed in range(2000))
    most = max(abs((place + 0.5) / 2000 - value) for place, value in enumerate(firsts))
    assert most < 0.036  # Kolmogorov and Smirnov, at 1 %


@pytest.mark.parametrize("alpha", [5e-324, 1e-12, 0.001])
def test_a_tiny_alpha_gives_everything_to_one(alpha: float) -> None:
    for seed in range(20):
        proportions = dirichlet(seed, alpha, 5)
        assert sum(proportions) == pytest.approx(1)
        assert max(proportions) > 0.9


@pytest.mark.parametrize("alpha", [1e12, 1.7e308])
def test_a_huge_alpha_gives_equal_proportions(alpha: float) -> None:
    assert dirichlet(1, alpha, 5) == pytest.approx([0.2] * 5, abs=1e-5)


def test_one_client_has_it_all() -> None:
    assert dirichlet(3, 0.5, 1) == [1]


def test_the_proportions_are_the_same_on_every_machine_and_python() -> None:
    assert dirichlet(0, 0.5, 4) == pytest.approx(
        [0.48520274517680645, 0.3315152721907129, 0.060624156120578344, 0.12265782651190217],
        rel=1e-9,
    )
    assert dirichlet(0, 2.0, 4) == pytest.approx(
        [0.3208005405885762, 0.03603470884677664, 0.40926588941094333, 0.23389886115370392],
        rel=1e-9,
    )
