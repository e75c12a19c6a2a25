"""comparison.json, comparison.md and the pictures, from made-up results."""

import json
from pathlib import Path

import pytest

from lesft_testbed.comparison import pictures
from lesft_testbed.comparison.capacity import TimeLeft, num_layers, runs_at_once, work
from lesft_testbed.comparison.compare import compare
from lesft_testbed.comparison.figures import read_run
from lesft_testbed.comparison.plan import Place
from lesft_testbed.comparison.results import Comparison
from tests.comparison.fake_run import questions_of
from tests.comparison.harness import MODEL, fill, plan_of, settings_of

COMMON = (f"--models={MODEL}", "--questions=50", "--output=out", "--samples=10,40")


@pytest.fixture(autouse=True)
def below_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    if "picture" not in request.node.name:  # drawing takes seconds
        monkeypatch.setattr(pictures, "draw_pictures", lambda comparison, folder: [])


def compared(*words: str) -> Comparison:
    fill(plan_of(*COMMON, *words), Path("out"))
    compare(settings_of(*COMMON, *words, "--collect"))
    return Comparison.model_validate_json(Path("out/comparison.json").read_bytes())


def test_a_cell_is_the_mean_over_seeds_of_the_questions_own_figures() -> None:
    found = compared("--methods=lesft,splitlora", "--seeds=0,1,2")
    place = Place(MODEL, "wordproblems", "1/4", 40, 4)
    cell = found.cell(place, "lesft")
    asked = [questions_of("lesft", seed, 50, 40) for seed in (0, 1, 2)]
    shares = [sum(each["right"] for each in questions) / 50 for questions in asked]
    assert cell is not None
    assert cell.accuracy is not None
    assert cell.nll is not None
    assert cell.accuracy.mean == pytest.approx(sum(shares) / 3)
    per_token = [sum(each["nll"] for each in questions) / 1000 for questions in asked]
    assert cell.nll.mean == pytest.approx(sum(per_token) / 3)
    assert cell.wire["activations_reference"] == {"up": 160_000_000, "down": 0}
    assert "other" not in cell.wire


def test_methods_are_tested_by_pairs_of_seeds_and_corrected_within_a_table() -> None:
    found = compared("--methods=lesft,splitlora", "--seeds=0,1,2")
    place = Place(MODEL, "wordproblems", "1/4", 10, 4)
    test = found.test(place, "splitlora", "accuracy")
    assert test is not None
    assert (test.reference, test.seeds, test.family) == ("lesft", [0, 1, 2], 3)
    ours, theirs = (
        [[each["right"] for each in questions_of(m, seed, 50, 10)] for seed in (0, 1, 2)]
        for m in ("splitlora", "lesft")
    )
    differences = [(sum(a) - sum(b)) / 50 for a, b in zip(ours, theirs, strict=True)]
    assert test.difference.mean == pytest.approx(sum(differences) / 3)
    assert test.mcnemar is not None
    assert test.mcnemar.questions == 150
    assert test.mcnemar.only_method == sum(
        mine and not other
        for a, b in zip(ours, theirs, strict=True)
        for mine, other in zip(a, b, strict=True)
    )
    assert found.test(place, "lesft", "accuracy") is None
    untuned = found.test(place, "zero-shot", "nll")
    assert untuned is not None
    assert untuned.verdict == "worse"
    assert untuned.p_holm == pytest.approx(3 * (untuned.p or 0), rel=3)


def test_a_question_that_several_seeds_ask_counts_once_for_the_first_of_them() -> None:
    words = (*COMMON, "--methods=lesft,splitlora", "--seeds=0,1,2")
    plan = plan_of(*words)
    fill(plan, Path("out"))
    for file in Path("out").glob("runs/*/*.json"):
        text = file.read_text()
        for seed in (1, 2):  # all ask the first seed's, but for the last two of the third
            text = text.replace(f"seed {seed} question", "seed 0 question")
        file.write_text(text.replace("seed 0 question 49", f"{file.parent.name[-6:]} question 49"))
    compare(settings_of(*words, "--collect"))
    found = Comparison.model_validate_json(Path("out/comparison.json").read_bytes())
    test = found.test(Place(MODEL, "wordproblems", "1/4", 10, 4), "splitlora", "accuracy")
    assert test is not None
    assert test.mcnemar is not None
    assert (test.mcnemar.questions, test.repeated_questions) == (52, 98)
    ours, theirs = (
        [[each["right"] for each in questions_of(m, seed, 50, 10)] for seed in (0, 1, 2)]
        for m in ("splitlora", "lesft")
    )
    counted = [
        *zip(ours[0], theirs[0], strict=True),
        *((ours[s][49], theirs[s][49]) for s in (1, 2)),
    ]
    assert test.mcnemar.only_method == sum(mine and not other for mine, other in counted)
    page = Path("out/comparison.md").read_text()
    assert "Seeds ask the same questions here: of 150, 52 are different and count" in page


def test_a_method_under_a_second_name_is_shown_and_not_tested() -> None:
    found = compared("--methods=lesft,splitlora,base-only,uniform-1", "--seeds=0,1")
    place = Place(MODEL, "wordproblems", "1/4", 10, 4)
    assert found.same_as == {"base-only": "splitlora", "uniform-1": "splitlora"}
    assert {test.method for test in found.tests} == {"zero-shot", "few-shot", "splitlora"}
    assert {test.family for test in found.tests} == {3}
    cells = [found.cell(place, method) for method in ("splitlora", "base-only")]
    assert cells[0] is not None
    assert cells[1] is not None
    assert cells[0].accuracy == cells[1].accuracy
    page = Path("out/comparison.md").read_text()
    assert page.count("| same as splitlora |") == 2 * 2 * 2  # names, measures, places
    assert "has the same runs; it is shown, and not\ntested" in page
    assert "`uniform-` rows above 0\ndiffer only where gradients are clipped" in page


def test_the_reference_is_the_one_that_others_are_the_same_as() -> None:
    found = compared("--methods=lesft,splitlora,base-only", "--seeds=0", "--reference=base-only")
    assert found.same_as == {"splitlora": "base-only"}
    assert {test.method for test in found.tests} == {"zero-shot", "few-shot", "lesft"}


def test_the_page_has_pictures_a_table_for_each_place_and_one_along_the_axis() -> None:
    compared("--methods=lesft,splitlora,fedavg", "--seeds=0,1")
    page = Path("out/comparison.md").read_text()
    assert "## tiny on wordproblems: 4 clients, 10 samples each, cut 1/4" in page
    assert "## Accuracy by samples per client\n\ntiny on wordproblems: cut 1/4, 4 clients." in page
    assert "| method | 10 | 40 |" in page
    assert "| lesft | 40.0 MB | 40.0 MB | 40.0 MB | 500.0 kB | 500.0 kB | 121.0 MB |" in page
    assert "| fedavg | 0 bytes | 0 bytes | 0 bytes | 500.0 kB | 500.0 kB | 1.0 MB |" in page
    assert "no method can be called better" not in page
    assert "### Test solutions, -log P per token" in page
    assert "held-out" not in page.lower()
    assert "`centralized` is one process of 1 CPU\nthreads" in page
    assert {path.name for path in Path("out").glob("*.png")} == {
        *("methods.png", "samples.png", "bytes.png", "time.png")
    }
    assert all(path.stat().st_size > 10_000 for path in Path("out").glob("*.png"))


def test_with_one_seed_there_is_no_interval_and_no_verdict_and_the_page_says_so() -> None:
    found = compared("--methods=lesft,splitlora", "--seeds=5")
    assert {test.verdict for test in found.tests} == {"not tested"}
    assert all(cell.accuracy and cell.accuracy.low is None for cell in found.cells)
    page = Path("out/comparison.md").read_text()
    assert "**There is one seed only: no intervals, no tests, and no method can be called" in page
    assert " better |" not in page


def test_ablations_have_their_own_picture() -> None:
    compared("--methods=lesft,base-only,reference-only", "--seeds=0,1")
    assert Path("out/ablations.png").exists()
    assert not Path("out/methods.png").exists()


def test_a_preset_s_page_shows_the_paper_s_figures_beside_these() -> None:
    words = (f"--models={MODEL}", "--preset=fig7", "--seeds=0,1", "--output=out", "--questions=50")
    fill(plan_of(*words), Path("out"))
    compare(settings_of(*words, "--collect"))
    page = Path("out/comparison.md").read_text()
    assert "| base-only, Qwen2.5-3B, gsm8k | 60.16 |" in page
    assert "| few-shot, Qwen2.5-3B, gsm8k | 79.1 |" in page
    assert "splitfrozen, Qwen2.5-3B" not in page


def test_likelihood_alone_has_no_accuracy_anywhere() -> None:
    plan = plan_of(*COMMON, "--methods=lesft,sl", "--measure=likelihood", "--seeds=0,1")
    fill(plan, Path("out"))
    for file in Path("out").glob("runs/*/*.json"):
        values = json.loads(file.read_bytes())
        for question in values.get("after", values.get("predictions", ())):
            question["right"] = None
        file.write_text(json.dumps(values))
    compare(
        settings_of(
            *COMMON, "--methods=lesft,sl", "--measure=likelihood", "--seeds=0,1", "--collect"
        )
    )
    found = Comparison.model_validate_json(Path("out/comparison.json").read_bytes())
    assert found.measures == ["nll"]
    assert "### Accuracy" not in Path("out/comparison.md").read_text()


def test_what_depends_on_time_is_under_measured_only() -> None:
    plan = plan_of(*COMMON, "--methods=lesft", "--seeds=0")
    fill(plan, Path("out"))
    run = next(run for run in plan.runs if run.method == "lesft")
    figures = read_run(run, Path("out")).figures
    assert figures.measured.other_bytes["down"] == 7
    assert figures.measured.seconds["training"] == 200.0
    assert figures.class_shares[0] == (0.6, 0.1, 0.3)
    assert figures.rounds == len(figures.loss_by_round) == 30


def test_runs_at_once_are_bounded_by_cores_and_one_without_known_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    folder = Path(MODEL)
    folder.mkdir(parents=True)
    words = ("--methods=lesft", "--seeds=0", "--server-threads=4", "--clients=2")
    plan = plan_of(*words)
    assert runs_at_once(plan.runs, "cpu") == 1
    (folder / "model.safetensors").write_bytes(b"\0" * 1000)
    assert runs_at_once(plan.runs, "cpu") == 4
    assert runs_at_once(plan.runs, "cuda") == 1
    assert runs_at_once(plan_of(*words, "--server-threads=0").runs, "cpu") == 1
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Free", (), {"available": 4 << 30}))
    assert runs_at_once(plan.runs, "cpu") == 2


def test_the_number_of_layers_is_read_from_the_model_s_config() -> None:
    folder = Path("model")
    assert num_layers("model") is None
    folder.mkdir()
    (folder / "config.json").write_text('{"text_config": {"num_hidden_layers": 12}}')
    assert num_layers("model") == 12


def test_the_time_left_is_in_proportion_to_samples_and_questions() -> None:
    runs = plan_of(*COMMON, "--methods=lesft", "--seeds=0").runs
    small, large = runs[2], runs[3]
    assert (work(small), work(large)) == (4 * 10 * 3 + 50, 4 * 40 * 3 + 50)
    left = TimeLeft(at_once=1)
    assert left.seconds([large]) is None
    left.note(small, 17.0)
    assert left.seconds([large]) == pytest.approx(53.0)
