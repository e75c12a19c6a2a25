"""What the part `wan` makes of its readings, and one real run over a narrow link."""

from pathlib import Path

import pytest

from lesft_testbed.bench.part import Bench
from lesft_testbed.bench.settings import BenchSettings, WanSettings
from lesft_testbed.bench.wan import Reading, Wan, figures_between, measure_run, utilisation
from lesft_testbed.emulated_link import LinkShape
from lesft_testbed.link_calibration import MeasuredLink
from lesft_testbed.tiny_model import save_tiny_data, save_tiny_model

FIRST = Reading(100.0, 2, 1_000_000, 3_000_000, 4.0, 9.0, 0.5)
LAST = Reading(110.0, 7, 11_000_000, 23_000_000, 6.0, 16.0, 1.0)


def test_shares_are_of_what_the_link_was_measured_to_move_and_of_the_time() -> None:
    figures = figures_between(FIRST, LAST, MeasuredLink(51.0, 16.0, 40.0, 2.0))
    assert figures == pytest.approx(
        {
            "up_share": 0.5,  # 10 MB in 10 s, of 16 Mbit/s
            "down_share": 0.4,
            "client_busy_share": 0.2,
            "server_busy_share": 0.7,
            "round_seconds": 2.0,
            "up_mb_per_round": 2.0,
            "down_mb_per_round": 4.0,
            "proxy_cpu_share": 0.05,
            "measured_round_trip_ms": 51.0,
            "measured_up_mbit": 16.0,
            "measured_down_mbit": 40.0,
            "measured_proxy_seconds_per_100_mb": 2.0,
        }
    )


def test_without_a_link_there_are_no_shares_of_it() -> None:
    figures = figures_between(FIRST, LAST, None)
    assert {"up_share", "down_share", "measured_up_mbit"}.isdisjoint(figures)
    assert figures["server_busy_share"] == pytest.approx(0.7)


@pytest.mark.parametrize(
    "busiest", ["up_share", "down_share", "client_busy_share", "server_busy_share"]
)
def test_utilisation_is_that_of_whatever_is_used_most_over_the_link_with_the_target(
    busiest: str,
) -> None:
    names = ("up_share", "down_share", "client_busy_share", "server_busy_share")
    shares = dict.fromkeys(names, 0.3) | {busiest: 0.93}
    values = {"wan": shares, "far": dict.fromkeys(names, 0.99)}
    assert utilisation(values) == 0.93
    (figure,) = Wan.figures
    assert (figure.is_met(0.93), figure.is_met(0.89)) == (True, False)


def test_a_run_over_a_narrow_link_is_bound_by_it(tmp_path: Path) -> None:
    """Its rounds last as long as their bytes take, and little longer."""
    (tmp_path / "model").mkdir()
    (tmp_path / "scratch").mkdir()
    settings = BenchSettings(
        output=tmp_path,
        cache=tmp_path / "cache",
        data=str(save_tiny_data(tmp_path / "data.jsonl", 200)),
        samples=8,
        threads=1,
        wan=WanSettings(rounds=2, skipped_rounds=1, calibration_seconds=0.2),
    )
    bench = Bench(
        settings, str(save_tiny_model(tmp_path / "model", 1)), tmp_path, tmp_path / "scratch"
    )
    shape = LinkShape(round_trip_ms=10, up_mbit=0.5, down_mbit=50)
    figures = measure_run(bench, shape)
    fastest = figures["up_mb_per_round"] * 8 / 0.5
    assert fastest * 0.95 <= figures["round_seconds"] <= fastest * 3
    assert 0.3 <= figures["up_share"] <= 1.1
    assert figures["up_share"] > 10 * figures["down_share"]
    assert 0 < figures["client_busy_share"] < 1
    assert 0 < figures["server_busy_share"] < 1
    assert 10 <= figures["measured_round_trip_ms"] <= 30
