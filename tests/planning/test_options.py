"""What a cut comes to and which one is recommended, by figures worked out by hand."""

from typing import Any

import pytest

from lesft.spec import LossSpec
from lesft_client.planning.link_speed import LinkSpeed
from lesft_client.planning.memory import MemoryModel
from lesft_client.planning.options import (
    Conditions,
    MeasuredBack,
    best_option,
    option,
    recommended,
    shallowest_cut,
)
from lesft_client.planning.report import make_plan, page, terminal
from lesft_client.planning.workload import Tokens, Workload
from tests.planning.conditions import conditions, run_spec


def link(up: float, down: float = 1e9, round_trip: float = 0.0) -> LinkSpeed:
    return LinkSpeed(
        round_trip_seconds=round_trip, up_bytes_per_second=up, down_bytes_per_second=down
    )


def work(reference: float = 0, fresh_share: float = 1.0) -> Workload:
    return conditions().workload.model_copy(
        update={"tokens": Tokens(100, reference, 20), "fresh_share": fresh_share}
    )


def test_a_cuts_seconds_and_bytes_are_those_of_its_micro_batches() -> None:
    found = option(conditions(), 2, "raw", "raw", "raw")
    assert found.device_seconds == pytest.approx(4 * (0.2 + 0.4))
    assert found.server_seconds == pytest.approx(4 * (0.1 + 6 * 0.2))
    assert found.mb_up == pytest.approx(4 * (100 * 64 * 4 + 20 * 4) / 1e6)
    assert found.mb_down == pytest.approx(4 * 100 * 64 * 4 / 1e6)
    assert found.up_seconds == pytest.approx(4 * 25_680 / 256_000)
    assert found.down_seconds == pytest.approx(0.4)
    # One forward and one upload until the server begins, the last download, and one backward.
    assert found.step_seconds == pytest.approx(0.2 + 25_680 / 256_000 + 5.2 + 0.1 + 0.4)
    assert found.bottleneck == "server"


def test_a_deeper_cut_moves_layers_from_the_server_to_the_device() -> None:
    found = option(conditions(), 7, "raw", "raw", "raw")
    assert found.device_seconds == pytest.approx(4 * 7 * 0.3)
    assert found.server_seconds == pytest.approx(4 * 0.3)
    assert found.bottleneck == "device"


def test_quantised_values_take_their_bits_and_a_scale_for_64() -> None:
    found = option(conditions(), 2, "int8", "int4", "raw")
    assert found.mb_up == pytest.approx(4 * (100 * (64 + 2) + 80) / 1e6)
    assert found.mb_down == pytest.approx(4 * 100 * (32 + 2) / 1e6)


def test_the_reference_path_is_computed_without_gradient_and_sent_as_often_as_it_is_due() -> None:
    spec = run_spec(loss=LossSpec(reference_refresh=0))
    found = option(conditions(spec=spec, workload=work(200, 0.25)), 2, "raw", "raw", "raw")
    assert found.device_seconds == pytest.approx(4 * (0.6 + 0.25 * 200 * 2 * 0.0005))
    assert found.mb_up == pytest.approx(4 * ((100 + 0.25 * 200) * 256 + 0.25 * 80) / 1e6)
    assert found.mb_down == pytest.approx(4 * 100 * 256 / 1e6)
    # Measured with 100 tokens of base path, 2 units each; now another 50 of one unit.
    assert found.server_seconds == pytest.approx(4 * 1.3 * 250 / 200)


def test_a_reference_path_that_trains_costs_as_the_base_path_does() -> None:
    spec = run_spec(loss=LossSpec(reference_nll_weight=0.1))
    found = option(conditions(spec=spec, workload=work(200)), 2, "raw", "raw", "raw")
    assert found.device_seconds == pytest.approx(4 * 300 * 2 * 0.003)
    assert found.mb_down == pytest.approx(4 * 300 * 256 / 1e6)


def test_a_front_that_does_not_train_computes_and_sends_only_what_is_new() -> None:
    spec = run_spec(train_front=False)
    found = option(conditions(spec=spec, workload=work(fresh_share=0.5)), 2, "raw", "raw", "raw")
    assert found.device_seconds == pytest.approx(4 * 0.5 * 100 * 2 * 0.0005)
    assert found.mb_up == pytest.approx(4 * 0.5 * 25_680 / 1e6)
    assert (found.mb_down, found.down_seconds) == (0, 0)
    assert found.server_seconds == pytest.approx(4 * 1.3)


def test_aggregation_is_spread_over_its_rounds_and_leaves_personal_layers_out() -> None:
    changes: dict[str, Any] = {"aggregate": True, "aggregation_interval": 5}
    without = option(conditions(), 2, "raw", "raw", "raw")
    one = 4 * (1 << 20) / 16 / 5
    both = option(
        conditions(spec=run_spec(**changes), link=link(256_000, 256_000, 0.5)),
        2,
        "raw",
        "raw",
        "raw",
    )
    assert both.mb_up == pytest.approx(without.mb_up + 2 * one / 1e6)
    assert both.step_seconds == pytest.approx(
        without.step_seconds + 0.5 + 2 * 2 * one / 256_000 + 2 * 0.5 / 5
    )
    assert (without.bottleneck, both.bottleneck) == ("server", "server")
    thin = option(conditions(spec=run_spec(**changes), link=link(20_000)), 2, "int4", "raw", "raw")
    assert thin.up_seconds == pytest.approx((4 * (100 * 34 + 80) + 2 * one) / 20_000)
    assert thin.bottleneck == "uplink"
    spec = run_spec(**changes, personal_layers=(0,))
    assert option(conditions(spec=spec), 2, "raw", "raw", "raw").mb_up == pytest.approx(
        without.mb_up + one / 1e6
    )


# ---------------------------------------------------------------------- memory


def test_memory_is_the_sum_of_what_the_client_holds() -> None:
    memory, workload = conditions().memory, conditions().workload
    sent = 2 * 420 * 256 / (1 << 20)
    # Process; weights; adapters of 1/16 Mi parameters, 16 bytes each; a layer of 120 tokens under
    # way; 420 tokens of graph; these two with 40% more, for gaps.
    assert memory.mib(2, workload, trains=True) == pytest.approx(
        300 + 2 * 10 + 2 * 1 + sent + 1.4 * (1.2 + 2 * 4.2)
    )
    assert memory.mib(2, workload, trains=False) == pytest.approx(300 + 20 + 0.5 + sent + 1.68)
    checkpointing = memory.model_copy(update={"gradient_checkpointing": True})
    assert checkpointing.mib(2, workload, trains=True) == pytest.approx(
        300 + 20 + 2 + sent + 1.4 * (1.2 + 2 * 420 * 256 / (1 << 20))
    )


# ---------------------------------------------------------------------- which to take


def chosen(given: Conditions) -> tuple[int, str, str]:
    best = make_plan("server:1", given).recommended
    assert best is not None
    return best.cut_layer, best.activation_encoding, best.gradient_encoding


def test_the_cut_with_the_shortest_step_is_recommended() -> None:
    # Up to cut 4 the server is in the way, from 5 on the device.
    steps = [best_option(conditions(), cut).step_seconds for cut in range(2, 8)]
    assert steps == pytest.approx([6.0, 5.5, 5.0, 6.0, 7.2, 8.4], abs=0.001)
    assert chosen(conditions()) == (4, "raw", "raw")


def test_encodings_are_no_leaner_than_it_takes_for_the_link_not_to_hold_the_step_up() -> None:
    # A step of cut 2: the server is busy for 5.2 s, an upload of 25,680 bytes must take 1.3 s.
    for rate, encoding in ((20_000, "raw"), (15_000, "bf16"), (6_000, "int8"), (4_000, "int4")):
        found = best_option(conditions(link=link(rate)), 2)
        assert (found.activation_encoding, found.gradient_encoding) == (encoding, "raw")
        assert found.bottleneck == "server"
    found = best_option(conditions(link=link(100, 100)), 2)
    assert (found.activation_encoding, found.gradient_encoding) == ("int4", "int4")
    assert found.bottleneck == "uplink"


def test_adapters_are_no_leaner_than_shortens_a_step() -> None:
    def adapters(rate: float, **changes: Any) -> str:
        spec = run_spec(aggregate=True, aggregation_interval=5, **changes)
        return best_option(conditions(spec=spec, link=link(rate, rate)), 2).adapter_encoding

    # A step of cut 2 takes 6 s. Of it, adapters of 2 x 1/16 Mi parameters take both ways, every
    # 5 rounds, 0.2 MB raw and about a quarter and an eighth of it in int8 and int4.
    assert adapters(10e6) == "raw"  # 0.02 s: no 2% of a step to save
    assert adapters(1e6) == "int8"  # 0.21 s, 0.05 s, 0.03 s
    assert adapters(150_000) == "int4"  # 1.40 s, 0.35 s, 0.18 s
    spec = run_spec(adapter_encoding="int8")  # nothing to send: the run's own
    assert best_option(conditions(spec=spec, link=link(100, 100)), 2).adapter_encoding == "int8"


def test_encodings_that_a_width_makes_no_leaner_are_not_considered() -> None:
    # Odd: there is no int4, and int8 has a scale of two bytes for each value.
    memory = conditions().memory
    front = memory.front.model_copy(update={"hidden_bytes": 63 * 4})
    odd = MemoryModel(**{**dict(memory), "front": front})
    found = best_option(conditions(hidden_size=63, memory=odd, link=link(100, 100)), 2)
    assert (found.activation_encoding, found.gradient_encoding) == ("bf16", "bf16")
    front = memory.front.model_copy(update={"hidden_bytes": 64 * 2})
    halves = MemoryModel(**{**dict(memory), "front": front})  # bf16 already, as they are computed
    found = best_option(conditions(memory=halves, link=link(8_000)), 2)
    assert found.activation_encoding == "int8"


def test_what_does_not_fit_or_shows_too_much_is_not_recommended() -> None:
    best = chosen(conditions())[0]
    needs = option(conditions(), best, "raw", "raw", "raw").memory_mib
    assert chosen(conditions(memory_mib=needs - 1))[0] == best - 1
    shallow = conditions(back=None, device=conditions().device, shallowest_cut=2)
    assert chosen(shallow)[0] == 2  # the device alone decides: the fewer layers, the sooner
    assert chosen(shallow.model_copy(update={"shallowest_cut": 1}))[0] == 1
    assert (shallowest_cut(30, False), shallowest_cut(30, True)) == (7, 1)


def test_of_cuts_that_take_nearly_as_long_the_deepest_is_recommended() -> None:
    options = [
        option(conditions(), cut, "raw", "raw", "raw").model_copy(update={"step_seconds": seconds})
        for cut, seconds in ((2, 10.0), (3, 10.1), (4, 10.15), (5, 10.3))
    ]
    best = recommended(options)
    assert best is not None
    assert best.cut_layer == 4


def test_a_plan_without_a_cut_that_fits_says_what_would_help() -> None:
    plan = make_plan("server:1", conditions(memory_mib=200))
    assert plan.recommended is None
    least = option(conditions(), 2, "raw", "raw", "raw").memory_mib
    assert (
        f"No cut of at least 2 layers fits into 200 MiB, the smallest needs {least:.0f}: try "
        "--precision int8"
    ) in plan.explanation[1]
    assert "It needs more than the 200 MiB" in plan.explanation[0]
    assert "does not fit" in terminal(plan)


# ---------------------------------------------------------------------- words


def test_table_and_page_mark_the_runs_cut_and_the_recommended_one() -> None:
    plan = make_plan("server:1", conditions())
    best = plan.recommended
    assert best is not None
    lines = terminal(plan).splitlines()
    assert lines[0].split()[:3] == ["cut", "memory", "MiB"]
    rows = {line.split()[0]: line for line in lines[1:8]}
    assert rows["1"].endswith("shallow")
    assert rows["2"].endswith("the run's")
    assert rows[str(best.cut_layer)].endswith("recommended")
    assert f"{best.step_seconds:.2f}" in rows[str(best.cut_layer)].split()
    text = page(plan)
    assert f"|{best.cut_layer}|{best.memory_mib:.0f}|" in text
    assert (
        f"lesft-server ... --cut-layer {best.cut_layer} --activation-encoding raw "
        "--gradient-encoding raw --adapter-encoding raw"
    ) in text


def test_a_plan_says_what_was_not_measured() -> None:
    measured = make_plan("server:1", conditions()).explanation
    assert "; the server's own back" in measured[-3]
    unmeasured = make_plan("server:1", conditions(back=None)).explanation
    assert "the server's own back" not in unmeasured[-3]
    assert unmeasured[-2].endswith("could not measure itself and counts as never in the way.")
    many = conditions(
        spec=run_spec(clients=4),
        back=MeasuredBack(fixed_seconds=1, layer_seconds=1, tokens=Tokens(1, 0, 1)),
    )
    assert "all 4 clients" in make_plan("server:1", many).explanation[-3]


def test_a_run_that_is_as_recommended_is_said_to_be_so() -> None:
    best = make_plan("server:1", conditions(spec=run_spec(cut_layer=4)))
    assert best.recommended == best.present
    assert best.explanation[1].startswith("It is what is recommended. It has the shortest step")
