"""Simulated clients of a server in this process, and the figure made of what they measure."""

import os
from pathlib import Path

import pytest

from lesft_testbed.bench.scale import Scale
from lesft_testbed.bench.simulated_clients import measured_steps
from tests.harness import running_server, save_tiny_model, server_settings


def test_all_clients_take_every_step_and_time_is_by_token(tmp_path: Path) -> None:
    clients, tokens, steps, skipped = 3, 8, 2, 1
    settings = server_settings(
        save_tiny_model(tmp_path / "model"),
        tmp_path / "state",
        clients=clients,
        rounds=1,
        accumulation=1000,
    )
    with running_server(settings) as server:
        values = measured_steps(
            {
                "server": server.grpc,
                "server_control": server.control,
                "server_pid": os.getpid(),
                "tokens": tokens,
                "steps": steps,
                "seconds": 0,
                "skipped_steps": skipped,
            }
        )
        members = server.engine.run.members
        micros = {name: member.next_key.micro for name, member in members.items()}
        back = server.engine.clock.seconds.labels("back")._sum.get()
    assert values["steps"] == steps
    assert micros.keys() == {f"client-{index}" for index in range(clients)}
    # One more is sent ahead, which may or may not have come.
    assert set(micros.values()) <= {skipped + steps, skipped + steps + 1}
    measured = values["back_wall_us_per_token"] * steps * clients * 2 * tokens / 1e6
    assert 0 < measured < back
    assert values["wall_us_per_token"] > 0
    assert values["server_cpu_us_per_token"] <= values["wall_us_per_token"] * (os.cpu_count() or 1)


def test_the_figure_is_of_the_servers_processor_time_alone() -> None:
    values = {
        "1 client": {"server_cpu_us_per_token": 12.0, "wall_us_per_token": 90.0},
        "4 clients": {"server_cpu_us_per_token": 10.0, "wall_us_per_token": 10.0},
        "16 clients": {"server_cpu_us_per_token": 11.0, "wall_us_per_token": 10.0},
    }
    (figure,) = Scale.figures
    assert figure.compute(values) == pytest.approx(1.2)
    assert (figure.is_met(1.14), figure.is_met(1.16)) == (True, False)
