"""What is planned: how many runs, under which names, with which options."""

import json
import shlex
from pathlib import Path

import pytest

from lesft.errors import InvalidInput
from lesft.settings import load_settings
from lesft_client.settings import EvaluateSettings
from lesft_testbed.comparison import presets
from lesft_testbed.comparison.manifest import MANIFEST, MANIFEST_LINES, write_manifest
from lesft_testbed.comparison.plan import PlannedRun
from lesft_testbed.comparison.settings import CompareSettings
from lesft_testbed.methods import METHODS
from lesft_testbed.settings import RunSettings
from tests.comparison.harness import MODEL, plan_of, settings_of


def options_of(runs: tuple[PlannedRun, ...], method: str) -> list[dict[str, object]]:
    return [dict(run.options) for run in runs if run.method == method]


def test_every_method_runs_at_every_value_of_every_axis() -> None:
    plan = plan_of("--methods=lesft,sl", "--samples=10,40", "--clients=2,4", "--seeds=3,5,8")
    # 2 methods x 2 sizes x 2 numbers of clients x 3 seeds, and the untuned model twice a seed.
    assert len(plan.runs) == 2 * 2 * 2 * 3 + 2 * 3
    assert len(plan.places) == 4
    assert plan.methods == ("zero-shot", "few-shot", "lesft", "sl")


def test_a_method_without_a_split_is_run_once_for_all_cuts_and_shown_at_each() -> None:
    plan = plan_of("--methods=lesft,fedavg,centralized", "--cuts=1/2,1/5", "--seeds=0")
    assert [options["cut_layer"] for options in options_of(plan.runs, "lesft")] == [15, 6]
    assert len(options_of(plan.runs, "fedavg")) == len(options_of(plan.runs, "centralized")) == 1
    names = {plan.shown[place, "fedavg", 0] for place in plan.places}
    assert names == {"fedavg_tiny_wordproblems_samples-40_clients-4_seed-0"}
    assert "cut_layer" not in options_of(plan.runs, "fedavg")[0]


def test_a_fixed_total_is_shared_out_among_the_clients() -> None:
    plan = plan_of("--preset=fig5", "--methods=lesft", "--clients=1,3", "--seeds=0")
    found = [(o["clients"], o["samples"]) for o in options_of(plan.runs, "lesft")]
    assert found == [(1, 40), (3, 13)]


def test_methods_that_are_the_same_under_several_names_share_their_runs() -> None:
    plan = plan_of("--methods=uniform-1,lesft,splitlora,base-only", "--seeds=0")
    assert {run.method for run in plan.runs} == {"zero-shot", "few-shot", "lesft", "splitlora"}
    [place] = plan.places
    names = {plan.shown[place, method, 0] for method in ("uniform-1", "splitlora", "base-only")}
    assert names == {"splitlora_tiny_wordproblems_cut-1-4_samples-40_clients-4_seed-0"}
    alone = plan_of("--methods=lesft,base-only", "--seeds=0")
    assert {run.method for run in alone.runs} >= {"lesft", "base-only"}


def test_the_untuned_model_answers_the_same_questions_without_and_with_examples() -> None:
    plan = plan_of("--methods=lesft", "--seeds=7", "--questions=60", "--shots=3")
    zero, few, run = plan.runs
    assert (zero.options["shots"], few.options["shots"]) == (0, 3)
    for untuned in (zero, few):
        assert untuned.options["data_seed"] == run.options["seed"] == 7
        assert untuned.options["questions"] == run.options["questions"] == 60
        assert untuned.options["untuned"] is True


def test_without_questions_the_untuned_model_has_no_rows() -> None:
    plan = plan_of("--preset=table2")
    assert {run.method for run in plan.runs} == {
        *("lesft", "splitlora", "sl", "splitfrozen", "fedavg", "centralized")
    }
    assert len(plan.runs) == 6


def test_the_presets_at_paper_scale_have_the_paper_s_sizes() -> None:
    plan = plan_of("--preset=table1", "--scale=paper", "--seeds=0")
    lesft = options_of(plan.runs, "lesft")
    assert len(lesft) == 3 * 3  # models x data sets
    assert {o["clients"] * o["samples"] for o in lesft} == {800}  # type: ignore[operator]
    papers = {
        "clients": 4,
        "epochs": 10,
        "accumulation": 4,
        "batch_size": 1,
        "aggregation_interval": 5,
        "precision": "bf16",
        "server_threads": 0,
        "lora.rank": 8,
        "lora.alpha": 16.0,
        "lora.dropout": 0.2,
        "optimizer.learning_rate": 5e-5,
        "questions": 1319,
        "max_tokens": 512,
    }
    for options in lesft:
        assert {name: options[name] for name in papers} == papers
        assert options["lora.target_modules"] == ["gate_proj", "up_proj", "down_proj"]
    assert [o["cut_layer"] for o in lesft] == [6, 6, 6, 7, 7, 7, 9, 9, 9]


def test_without_a_preset_the_values_are_the_small_scale_s() -> None:
    settings = CompareSettings()
    dumped = settings.model_dump()
    for name, value in presets.SMALL.items():
        assert dumped[name] == value, name
    assert presets.SMALL.keys() == presets.PAPER.keys()
    assert CompareSettings(optimizer={"learning_rate": 1.0}).optimizer.max_grad_norm == 1.0


def test_a_preset_has_a_folder_of_its_own() -> None:
    assert settings_of("--preset=fig4").output == Path("runs/fig4")
    assert settings_of("--preset=fig4", "--output=out").output == Path("out")
    assert settings_of().output == Path("runs/comparison")


@pytest.mark.parametrize("preset", ["table1", "table2", "table3", "fig3", "fig4", "fig5"])
@pytest.mark.parametrize("scale", ["small", "paper"])
def test_every_preset_names_methods_that_exist(preset: str, scale: str) -> None:
    plan = plan_of(f"--preset={preset}", f"--scale={scale}")
    assert {run.method for run in plan.runs if run.kind == "training"} <= METHODS.keys()


def test_explicit_options_go_before_a_preset_s() -> None:
    settings = settings_of("--preset=fig4", "--scale=paper", "--optimizer.weight-decay=0.1")
    assert settings.samples == (10, 20, 30, 40, 50)
    assert (settings.optimizer.learning_rate, settings.optimizer.weight_decay) == (5e-5, 0.1)
    settings = settings_of("--preset=fig4", "--samples=7", "--optimizer.learning-rate=1e-3")
    assert (settings.samples, settings.optimizer.learning_rate) == ((7,), 1e-3)
    assert settings_of("--preset=fig5", "--samples=7").total_samples == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods=lesft,fedavgg"], "fedavgg is none (did you mean fedavg?)"),
        (["--seeds=1,2,1"], "1 comes twice"),
        (["--cuts=0"], "must be numbers of layers from 1, or parts of the model such as 1/4"),
        (["--reference=sl", "--methods=lesft"], "--reference must be one of --methods (lesft)"),
        (["--total-samples=9", "--samples=3"], "give one of them"),
        (["--total-samples=3"], "must give each of 4 clients one at least, got 3"),
        (["--samples=1", "--accumulation=4"], "must be at least --accumulation x --batch-size (4)"),
        (["--collect", "--manifest-only"], "give one of them"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        settings_of(*words)
    assert message in capsys.readouterr().err


def test_two_models_of_one_name_are_refused() -> None:
    with pytest.raises(InvalidInput, match="two are called tiny"):
        plan_of("--models=a/tiny,b/tiny")
    with pytest.raises(InvalidInput, match="two are called my-notes in the names of runs"):
        plan_of("--data=My_Notes.jsonl,my-notes.jsonl")


def test_data_of_names_in_any_script_have_runs_of_their_own() -> None:
    runs = plan_of("--data=データ.jsonl,試験.jsonl").runs
    assert len({run.name for run in runs}) == len(runs)
    assert {run.data for run in runs} == {"データ.jsonl", "試験.jsonl"}


def test_a_cut_outside_the_model_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"between 1 and 29 for models/tiny .* got 30"):
        plan_of("--cuts=30")
    with pytest.raises(InvalidInput, match="whose number of layers is not known here"):
        plan_of("--models=someone/unheard-of", "--cuts=1/3")


def test_a_quarter_of_an_unknown_model_is_left_to_the_run() -> None:
    plan = plan_of("--models=someone/unheard-of", "--methods=lesft", "--seeds=0")
    assert options_of(plan.runs, "lesft")[0]["cut_layer"] == 0


def test_the_manifest_has_a_valid_command_for_every_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = plan_of("--methods=lesft,fedavg", "--seeds=4", "--output=out dir")
    write_manifest(plan, tmp_path / "out dir", Path.home() / ".cache/lesft")
    lines = (tmp_path / "out dir" / MANIFEST).read_text().splitlines()
    records = (tmp_path / "out dir" / MANIFEST_LINES).read_text().splitlines()
    commands = [shlex.split(line) for line in lines]
    assert commands == [json.loads(record)["command"] for record in records]
    untuned = load_settings(EvaluateSettings, "evaluate", commands[1][2:])
    assert commands[1][:2] == ["lesft-client", "evaluate"]
    assert (untuned.shots, untuned.data_seed, untuned.model) == (4, 4, MODEL)
    run = load_settings(RunSettings, "run", commands[3][2:])
    assert commands[3][:2] == ["lesft-testbed", "run"]
    assert (run.method, run.split, run.seed, run.measure_before) == ("fedavg", False, 4, False)
    assert run.output == Path("out dir/runs/fedavg_tiny_wordproblems_samples-40_clients-4_seed-4")
    assert not any(str(tmp_path) in line or str(Path.home()) in line for line in lines)
