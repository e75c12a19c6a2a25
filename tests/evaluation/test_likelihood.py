"""How likely the data's own solutions are: the same tokens and sums as in training."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lesft.adapters import attach_lora
from lesft.back import Back
from lesft.errors import DataError, InvalidInput, Unreachable
from lesft.spec import RunSpec
from lesft.weights import Checkpoint, load_back
from lesft_client.data import encode_samples, load_samples
from lesft_client.evaluation.command import evaluate
from lesft_client.language_model import Score
from lesft_client.settings import EvaluateSettings
from tests.client.fake_language_model import FakeLanguageModel
from tests.evaluation import datasets
from tests.evaluation.test_command import doubled, report, settings, use
from tests.generation.harness import save_family
from tests.harness import make_front, running_server, server_settings

__all__ = ["use"]

Use = Callable[[FakeLanguageModel], FakeLanguageModel]


def by_length(prompt: str, solution: str) -> Score:
    """A quarter of a nat for each character, so that every question's differs."""
    return Score(-0.25 * len(solution), False)


# ---------------------------------------------------------------------- against plain torch


@dataclass
class Tiny:
    """A tiny model, own questions with it, and what plain torch makes of their solutions."""

    model: Path
    data: Path
    expected: list[float]
    tokens: list[int]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("likelihood")
    model = save_family(folder / "model", "llama")
    rows = [
        {"prompt": f"Double {n}?", "target": f"Take {n} twice.\n" * (1 + n % 4) + f"#### {2 * n}"}
        for n in range(30)
    ]
    data = datasets.write_rows(folder / "own.jsonl", rows)
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoded, _ = encode_samples(load_samples(str(data), "test", None, 0), tokenizer, 256)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    expected = []
    for sample in encoded:
        ids = torch.tensor([sample.base_ids + sample.target_ids])
        with torch.no_grad():
            logits = whole(ids).logits[0, len(sample.base_ids) - 1 : -1]
        targets = torch.tensor(sample.target_ids)
        expected.append(float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum")))
    return Tiny(model, data, expected, [len(sample.target_ids) for sample in encoded])


def local_report(tiny: Tiny, output: Path, **options: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"local": True, "measure": "likelihood", **options}
    evaluate(
        EvaluateSettings(
            model=str(tiny.model), benchmark=str(tiny.data), output=output, threads=1, **values
        )
    )
    found: dict[str, Any] = json.loads((output / "evaluation.json").read_text())
    return found


def test_the_score_is_plain_torchs_cross_entropy_over_solution_and_end_token(
    tiny: Tiny, tmp_path: Path
) -> None:
    found = local_report(tiny, tmp_path)
    nlls = [each["nll"] for each in found["predictions"]]
    assert nlls == pytest.approx(tiny.expected, abs=1e-4)
    assert [each["nll_tokens"] for each in found["predictions"]] == tiny.tokens
    assert found["nll_tokens"] == sum(tiny.tokens)
    assert found["nll_per_token"] == pytest.approx(sum(tiny.expected) / sum(tiny.tokens), abs=1e-6)


def test_the_score_is_that_of_the_training(tiny: Tiny, tmp_path: Path) -> None:
    found = local_report(tiny, tmp_path)
    checkpoint = Checkpoint(tiny.model)
    spec = RunSpec(model_name="tiny", cut_layer=1, front_fingerprint="", rounds=1)
    front = make_front(tiny.model, spec, "client")
    model = load_back(checkpoint, 1, torch.float32, torch.device("cpu"))
    attach_lora(model, spec.lora, spec.seed, 1)
    back = Back(model, spec)
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    samples, _ = encode_samples(load_samples(str(tiny.data), "test", None, 0), tokenizer, 256)
    training = [nll for sample in samples for nll in back.score(*front.held_out([sample]))]
    assert [each["nll"] for each in found["predictions"]] == pytest.approx(training, abs=1e-4)


def test_a_score_does_not_depend_on_the_batch(tiny: Tiny, tmp_path: Path) -> None:
    several, alone = (
        local_report(tiny, tmp_path / str(batch), batch=batch)["predictions"] for batch in (8, 1)
    )
    assert [each["nll"] for each in several] == [each["nll"] for each in alone]


def test_a_split_model_gives_the_same_scores(tiny: Tiny, tmp_path: Path) -> None:
    with running_server(server_settings(tiny.model, tmp_path / "server")) as server:
        found = local_report(
            tiny, tmp_path / "split", local=False, server=server.grpc, untuned=True
        )
    nlls = [each["nll"] for each in found["predictions"]]
    assert nlls == pytest.approx(tiny.expected, abs=1e-3)


# ---------------------------------------------------------------------- what is reported


def test_likelihood_writes_nothing_and_leaves_the_accuracy_open(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, use: Use
) -> None:
    model = use(FakeLanguageModel(tokenizer, doubled, by_length))
    table = evaluate(settings(tmp_path, measure="likelihood"))
    found = report(tmp_path)
    assert model.requests == []
    assert (found["measure"], found["questions"], found["tokens"]) == ("likelihood", 12, 0)
    assert [found[name] for name in ("right", "accuracy", "interval")] == [None] * 3
    assert found["accuracy_by_reading"] == {}
    prediction = found["predictions"][0]
    assert (prediction["right"], prediction["extracted"], prediction["text"]) == (None, None, "")
    total = sum(each["nll"] for each in found["predictions"])
    assert found["nll_per_token"] == pytest.approx(total / found["nll_tokens"])
    row = f"held-out -log P per target token {found['nll_per_token']:.4f} ({found['nll_tokens']} "
    assert row in table
    assert "accuracy" not in table
    assert "| held-out -log P per target token |" in (tmp_path / "out/evaluation.md").read_text()


def test_the_solution_ends_in_the_end_token_and_follows_the_trainings_prompt(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, use: Use
) -> None:
    asked: list[tuple[str, str]] = []

    def score(prompt: str, solution: str) -> Score:
        asked.append((prompt, solution))
        return Score(-1.0, False)

    use(FakeLanguageModel(tokenizer, doubled, score))
    evaluate(settings(tmp_path, measure="likelihood", shots=1, prompt="harness", batch=1))
    prompt, solution = asked[0]
    assert prompt.count("<user>Solve the following problem step by step") == 2
    assert "(train)?</s><assistant>" in prompt
    assert prompt.endswith("(test)?</s><assistant>")
    number = int(prompt.rpartition("Double ")[2].partition(" ")[0])
    assert solution == f"\n#### {2 * number}</s>"
    assert report(tmp_path)["prompt"] == "chat"


def test_both_has_answers_and_scores(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, use: Use
) -> None:
    use(FakeLanguageModel(tokenizer, doubled, by_length))
    table = evaluate(settings(tmp_path, measure="both"))
    found = report(tmp_path)
    assert (found["right"], found["accuracy"]) == (12, 1.0)
    evaluate(settings(tmp_path, measure="likelihood", output=tmp_path / "other"))
    other = json.loads((tmp_path / "other/evaluation.json").read_text())
    assert found["nll_per_token"] == other["nll_per_token"]
    assert "100.0% (12/12)" in table
    assert "held-out -log P per target token" in table


def test_accuracy_scores_no_solution(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, use: Use
) -> None:
    use(FakeLanguageModel(tokenizer, doubled, by_length))
    evaluate(settings(tmp_path))
    found = report(tmp_path)
    assert (found["measure"], found["nll_per_token"], found["nll_tokens"]) == ("accuracy", None, 0)
    assert found["predictions"][0]["nll"] is None


def test_a_long_solution_is_scored_in_pieces_that_a_split_model_takes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, use: Use
) -> None:
    pieces: list[tuple[int, int]] = []

    def score(prompt: str, solution: str) -> Score:
        pieces.append((len(prompt), len(solution)))
        return Score(-1.0, False)

    rows = [{"prompt": f"Say {n}.", "target": "xq" * 300, "answer": "x"} for n in (1, 2)]
    data = datasets.write_rows(tmp_path / "own.jsonl", rows)
    use(FakeLanguageModel(tokenizer, doubled, score))
    evaluate(settings(tmp_path, benchmark=str(data), data="", measure="likelihood"))
    found = report(tmp_path)
    assert found["predictions"][0]["nll"] == len(pieces) == 3
    assert [before - pieces[0][0] for before, _ in pieces] == [0, 256, 512]
    assert found["nll_tokens"] == 601


def test_scores_go_on_where_they_were_but_not_as_another_measure(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, use: Use
) -> None:
    calls: list[str] = []

    def dies_at_the_eighth(prompt: str, solution: str) -> Score:
        calls.append(prompt)
        if len(calls) == 8:
            raise Unreachable("the server is gone")
        return by_length(prompt, solution)

    use(FakeLanguageModel(tokenizer, doubled, dies_at_the_eighth))
    with pytest.raises(Unreachable):
        evaluate(settings(tmp_path, measure="likelihood", batch=1))
    with pytest.raises(InvalidInput, match=r"measure likelihood .* this is measure both"):
        evaluate(settings(tmp_path, measure="both", batch=1))
    evaluate(settings(tmp_path, measure="likelihood", batch=1))
    assert len(calls) == 8 + 5
    assert len(set(calls)) == 12
    evaluate(settings(tmp_path, measure="likelihood", output=tmp_path / "whole"))
    whole = json.loads((tmp_path / "whole/evaluation.json").read_text())
    assert report(tmp_path)["nll_per_token"] == whole["nll_per_token"]


def test_questions_without_a_final_answer_can_be_scored_but_not_asked(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, use: Use
) -> None:
    rows = [{"prompt": f"Tale {n}", "target": "Once.", "reference": "r"} for n in range(20)]
    data = datasets.write_rows(tmp_path / "own.jsonl", rows)
    use(FakeLanguageModel(tokenizer, doubled, by_length))
    with pytest.raises(DataError, match=r"has no answer to compare with.*--measure likelihood"):
        evaluate(settings(tmp_path, benchmark=str(data), data="", measure="both"))
    evaluate(settings(tmp_path, benchmark=str(data), data="", measure="likelihood"))
    assert report(tmp_path)["questions"] == 2


def test_a_solution_that_does_not_fit_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, use: Use
) -> None:
    use(FakeLanguageModel(tokenizer, doubled, by_length, max_length=90))
    with pytest.raises(InvalidInput, match=r"with its solution, .* the model's 90: use fewer"):
        evaluate(settings(tmp_path, measure="likelihood"))


# ---------------------------------------------------------------------- shares


def test_shares_are_disjoint_together_whole_and_keep_the_places(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, use: Use
) -> None:
    use(FakeLanguageModel(tokenizer, doubled))
    evaluate(settings(tmp_path))
    whole = {each["index"]: each["expected"] for each in report(tmp_path)["predictions"]}
    for number in (1, 2, 3, 4, 5):
        table = evaluate(
            settings(tmp_path, share=f"{number}/5", output=tmp_path / "out", fresh=True)
        )
        found = report(tmp_path)
        shares = {each["index"]: each["expected"] for each in found["predictions"]}
        assert shares == {i: whole[i] for i in range(12) if i % 5 == number - 1}
        assert (found["share"], found["questions"]) == (f"{number}/5", len(shares))
        assert f"gsm8k, {len(shares)} questions (share {number}/5), 0 shots" in table


def test_another_share_does_not_mix_with_the_first(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, use: Use
) -> None:
    use(FakeLanguageModel(tokenizer, doubled))
    evaluate(settings(tmp_path, share="1/2"))
    with pytest.raises(InvalidInput, match=r"share 1/2 .*, this is share 2/2"):
        evaluate(settings(tmp_path, share="2/2"))


def test_a_share_without_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"--share 13/20 of 12 questions has none: ask more"):
        evaluate(settings(tmp_path, share="13/20"))
    with pytest.raises(ValueError, match="must be I/N with I from 1 to N"):
        settings(tmp_path, share="3/2")
