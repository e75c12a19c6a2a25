"""`lesft-client plan` as a whole, against a server that listens, by the files that it writes."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lesft.errors import DataError, InvalidInput, ModelError, Unreachable
from lesft_client.main import main
from lesft_client.planning import command, device_speed
from lesft_client.planning.command import plan
from lesft_client.planning.settings import PlanSettings
from lesft_client.train import train
from lesft_server import planning
from tests.client.harness import train_settings
from tests.harness import running_server, save_tiny_model, server_settings
from tests.planning.harness import serving, spec_at


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds only to be exact takes less."""
    monkeypatch.setattr(command, "measure_link", partial(command.measure_link, aim_seconds=0.05))
    monkeypatch.setattr(device_speed, "_MOST", 3)


def settings_for(address: str, model: Path, output: Path, **changes: Any) -> PlanSettings:
    values: dict[str, Any] = {"data": "wordproblems", "samples": 6, "threads": 1}
    return PlanSettings(server=address, model=str(model), output=output, **{**values, **changes})


def test_a_plan_is_written_down_and_applied_and_survives_a_restart(
    eight_layers: Path, tmp_path: Path
) -> None:
    # Cut 1 is none that a plan has: the least is a quarter of the layers.
    settings = server_settings(
        eight_layers, tmp_path / "server", accept_plans=True, max_length=512, fresh=True
    )
    output = tmp_path / "plan"
    with serving(settings) as address:
        before = spec_at(address)
        said = plan(settings_for(address, eight_layers, output, apply=True))
        now = spec_at(address)
    made = json.loads((output / "plan.json").read_text())

    assert [option["cut_layer"] for option in made["options"]] == [1, 2, 3, 4, 5, 6, 7]
    assert (made["present"]["cut_layer"], made["present"]["is_deep_enough"]) == (1, False)
    assert made["spec_fingerprint"] == before.fingerprint()
    for option in (*made["options"], made["present"]):
        parts = [option[f"{part}_seconds"] for part in ("device", "up", "server", "down")]
        assert all(seconds > 0 for seconds in parts)
        assert max(parts) <= option["step_seconds"] <= 1.01 * sum(parts) + 0.5
    memory = [option["memory_mib"] for option in made["options"]]
    assert memory == sorted(memory)
    assert 50 < memory[0] < 5000
    conditions = made["conditions"]
    assert conditions["device"]["micro_batches"] >= 3
    assert 0 < sum(conditions["device"]["forward"].values()) < 0.1
    # Weights of attention and MLP, and two norms; A and B of three linear layers, rank 8.
    assert conditions["memory"]["front"]["layer_bytes"] == 4 * (
        2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    )
    assert conditions["memory"]["front"]["adapter_parameters"] == 3 * 8 * (32 + 48)
    assert conditions["memory"]["front"]["hidden_bytes"] == 32 * 4

    assert f"|{made['recommended']['cut_layer']}|" in (output / "plan.md").read_text()
    assert (output / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert now.cut_layer == made["recommended"]["cut_layer"] >= 2
    assert said == f"applied: the run's cut layer is {now.cut_layer} now"
    with serving(settings.model_copy(update={"fresh": False})) as address:
        assert spec_at(address).fingerprint() == now.fingerprint()


def test_the_bytes_of_a_plan_are_those_that_training_sends(model: Path, tmp_path: Path) -> None:
    # Three rounds of four: each of the six samples twice, whatever their order.
    options: dict[str, Any] = {"aggregate": False, "max_length": 512, "rounds": 3}
    data: dict[str, Any] = {"model": str(model), "data": "wordproblems", "samples": 6}
    with running_server(server_settings(model, tmp_path / "server", **options)) as server:
        plan(settings_for(server.grpc, model, tmp_path / "plan"))
        train(train_settings(server, "", tmp_path, **data))
    present = json.loads((tmp_path / "plan" / "plan.json").read_text())["present"]
    wire = json.loads((tmp_path / "state" / "result.json").read_text())["wire"]
    sent = sum(count for kind, count in wire["up"].items() if kind != "other")
    assert present["mb_up"] * 1e6 * 3 == pytest.approx(sent)
    assert present["mb_down"] * 1e6 * 3 == pytest.approx(wire["down"]["gradients"])


def test_what_does_not_fit_together_is_refused_with_nothing_written(
    model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "plan"
    with (
        running_server(server_settings(model, tmp_path / "short")) as server,
        pytest.raises(DataError, match=r"none of the 6 samples .*; 64 is the run's limit"),
    ):
        plan(settings_for(server.grpc, model, output))
    few_tokens = save_tiny_model(tmp_path / "few", vocab_size=97)
    with (
        running_server(server_settings(few_tokens, tmp_path / "long", max_length=512)) as server,
        pytest.raises(ModelError, match=r"gives token \d+, but the run's model knows 97"),
    ):
        plan(settings_for(server.grpc, model, output))
    with pytest.raises(Unreachable, match=r"is it running and is the address right\?"):
        plan(settings_for("127.0.0.1:1", model, output, patience_seconds=0.1))
    assert not output.exists()


def test_a_server_that_cannot_measure_itself_counts_as_never_in_the_way(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: object) -> None:
        raise InvalidInput("out of memory")

    monkeypatch.setattr(planning, "measure_back", fail)
    with running_server(server_settings(model, tmp_path / "server", max_length=512)) as server:
        said = plan(settings_for(server.grpc, model, tmp_path / "plan"))
    assert "the server was not measured: server 127.0.0.1:" in capsys.readouterr().err
    assert "the server could not measure itself and counts as never in the way" in said
    present = json.loads((tmp_path / "plan" / "plan.json").read_text())["present"]
    assert present["server_seconds"] == 0


def test_the_command_is_one_of_the_clients(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert "  plan " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert "--allow-shallower" in capsys.readouterr().out
