"""`lesft-client evaluate` from settings to files, with a model whose answers are written down."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from lesft.errors import InvalidInput, Unreachable
from lesft.sampling import Sampling
from lesft.seeds import derive_seed
from lesft_client.evaluation.command import evaluate
from lesft_client.language_model import Score
from lesft_client.settings import EvaluateSettings
from tests.client.fake_language_model import FakeLanguageModel
from tests.evaluation import datasets

Answer = Callable[[str], str]


def doubled(prompt: str) -> str:
    """Right below ten; from there on without the mark."""
    number = int(re.findall(r"Double (\d+)", prompt)[-1])
    return f"It is {2 * number}.\n#### {2 * number}" if number < 10 else f"It is {2 * number}, no?"


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeLanguageModel], FakeLanguageModel]:
    """Makes a model the one that `open_model` opens."""

    def install(model: FakeLanguageModel) -> FakeLanguageModel:
        opening = SimpleNamespace(open_model=lambda settings: datasets.opened(model))
        monkeypatch.setitem(sys.modules, "lesft_client.open_model", opening)
        return model

    return install


def settings(folder: Path, **options: Any) -> EvaluateSettings:
    defaults = {
        "model": "any",
        "benchmark": "gsm8k",
        "data": datasets.gsm8k(folder / "gsm8k"),
        "output": folder / "out",
    }
    return EvaluateSettings(**{**defaults, **options})


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "evaluation.json").read_text())
    return found


def test_numbers_are_asked_read_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, use: Any, capsys: Any
) -> None:
    model = use(FakeLanguageModel(tokenizer, doubled))
    table = evaluate(settings(tmp_path, questions=12, max_tokens=100, batch=3))
    found = report(tmp_path)
    assert (found["right"], found["questions"], found["answer"]) == (12, 12, "lenient")
    assert found["accuracy_by_reading"] == {
        "lenient": 1.0,
        "strict": 0.75,
        "flexible": 1.0,
        "boxed": 0.0,
    }
    assert found["model_fingerprint"] == model.fingerprint
    assert found["settings"]["batch"] == 3
    assert found["tokens"] == sum(each["tokens"] for each in found["predictions"]) > 12
    assert [each["index"] for each in found["predictions"]] == list(range(12))
    assert {each["expected"] for each in found["predictions"]} == {str(2 * n) for n in range(1, 13)}
    assert "accuracy          100.0% (12/12)" in table
    assert model.most_at_once == 3
    assert all(request.max_tokens == 100 for request in model.requests)
    assert "Double" not in "".join(capsys.readouterr())


def test_the_chosen_reading_decides(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, use: Any
) -> None:
    use(FakeLanguageModel(tokenizer, doubled))
    evaluate(settings(tmp_path, answer="strict"))
    found = report(tmp_path)
    assert (found["right"], found["without_answer"]) == (9, 0.25)
    assert [each["extracted"] for each in found["predictions"]].count(None) == 3


def test_texts_that_reach_the_limit_are_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, use: Any
) -> None:
    use(FakeLanguageModel(tokenizer, lambda prompt: "a very long text without an end"))
    evaluate(settings(tmp_path, max_tokens=5))
    found = report(tmp_path)
    assert (found["cut_off"], found["accuracy"], found["tokens"]) == (1.0, 0.0, 60)


def test_letters_are_read_from_the_text_under_the_chat_prompt(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, use: Any
) -> None:
    use(FakeLanguageModel(tokenizer, lambda prompt: "The answer is (B)."))
    data = datasets.commonsense_qa(tmp_path / "csqa", count=10)
    evaluate(settings(tmp_path, benchmark="commonsense_qa", data=data, shots=1))
    found = report(tmp_path)
    assert (found["answer"], found["accuracy"]) == ("letter", 0.2)
    assert found["accuracy_by_reading"] == {"letter": 0.2}


def test_under_the_harness_prompt_the_likeliest_letter_is_the_answer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, use: Any
) -> None:
    def score(prompt: str, letter: str) -> Score:
        return Score({" A": -3.0, " C": -0.5}.get(letter, -1.0), False)

    model = use(FakeLanguageModel(tokenizer, lambda prompt: "", score))
    data = datasets.commonsense_qa(tmp_path / "csqa", count=10)
    table = evaluate(
        settings(tmp_path, benchmark="commonsense_qa", data=data, prompt="harness", shots=2)
    )
    found = report(tmp_path)
    assert (found["answer"], found["accuracy"]) == ("likelihood", 0.2)
    assert found["predictions"][0]["log_probs"] == {
        "A": -3.0,
        "B": -1.0,
        "C": -0.5,
        "D": -1.0,
        "E": -1.0,
    }
    assert model.requests == []
    assert "written" not in table


def test_an_evaluation_that_broke_off_goes_on_where_it_was(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, use: Any, capsys: Any
) -> None:
    def dies_at_the_last(prompt: str) -> str:
        if len(broken.requests) > 7:
            raise Unreachable("the server is gone")
        return doubled(prompt)

    broken = use(FakeLanguageModel(tokenizer, dies_at_the_last))
    with pytest.raises(Unreachable, match="the server is gone"):
        evaluate(settings(tmp_path, batch=1))
    assert not (tmp_path / "out" / "evaluation.json").exists()
    assert "7 of 12 questions are answered; the same command goes on" in capsys.readouterr().err

    whole = use(FakeLanguageModel(tokenizer, doubled))
    evaluate(settings(tmp_path, batch=1))
    assert "going on: 7 of 12 questions are answered" in capsys.readouterr().err
    assert len(whole.requests) == 5
    assert report(tmp_path)["accuracy"] == 1.0
    asked = [tuple(request.prompt_ids) for request in broken.requests[:7] + whole.requests]
    assert len(set(asked)) == 12


def test_ctrl_c_leaves_a_file_to_go_on_from(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, use: Any, monkeypatch: Any
) -> None:
    from lesft_client.model_thread import ModelThread

    def interrupted(self: ModelThread, coroutine: Any) -> None:
        run(self, coroutine)
        raise KeyboardInterrupt

    run = ModelThread.run
    use(FakeLanguageModel(tokenizer, doubled))
    monkeypatch.setattr(ModelThread, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(settings(tmp_path))
    monkeypatch.setattr(ModelThread, "run", run)
    again = use(FakeLanguageModel(tokenizer, doubled))
    evaluate(settings(tmp_path))
    assert again.requests == []
    assert report(tmp_path)["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"shots": 2}, "shots 0"),
        ({"max_tokens": 9}, "max_tokens 256"),
        ({"prompt": "harness"}, "prompt chat"),
        ({"answer": "strict"}, "answer lenient"),
        ({"sampling": Sampling(temperature=1.0)}, "sampling {'temperature': 0.0"),
        ({"questions": 3}, "questions sha256:"),
    ],
)
def test_another_evaluation_does_not_mix_with_the_first(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    use: Any,
    options: dict[str, Any],
    name: str,
) -> None:
    use(FakeLanguageModel(tokenizer, doubled))
    evaluate(settings(tmp_path))
    with pytest.raises(InvalidInput, match=re.escape(name) + ".*another --output, or --fresh"):
        evaluate(settings(tmp_path, **options))
    evaluate(settings(tmp_path, **options, fresh=True))
    assert report(tmp_path)["questions"] == options.get("questions", 12)


def test_another_model_does_not_mix_with_the_first(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, use: Any
) -> None:
    use(FakeLanguageModel(tokenizer, doubled))
    evaluate(settings(tmp_path))
    use(FakeLanguageModel(tokenizer, doubled)).fingerprint = "sha256:other"
    with pytest.raises(InvalidInput, match="this is model sha256:other"):
        evaluate(settings(tmp_path))


def test_each_question_draws_from_a_seed_of_its_own(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, use: Any
) -> None:
    model = use(FakeLanguageModel(tokenizer, doubled))
    evaluate(settings(tmp_path, sampling=Sampling(temperature=0.7, seed=5), batch=1))
    assert [request.sampling.seed for request in model.requests] == [
        derive_seed(5, "question", index) for index in range(12)
    ]
    assert {request.sampling.temperature for request in model.requests} == {0.7}


def test_a_reading_that_does_not_fit_the_questions_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, use: Any
) -> None:
    with pytest.raises(InvalidInput, match=r"--answer letter does not fit gsm8k, .* no lettered"):
        evaluate(settings(tmp_path, answer="letter"))
    data = datasets.commonsense_qa(tmp_path / "csqa")
    with pytest.raises(InvalidInput, match=r"boxed does not fit .* set it to letter, likelihood"):
        evaluate(settings(tmp_path, benchmark="commonsense_qa", data=data, answer="boxed"))


def test_prompts_that_do_not_fit_into_the_model_are_refused_with_the_way_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, use: Any
) -> None:
    model = use(FakeLanguageModel(tokenizer, doubled, max_length=150))
    with pytest.raises(InvalidInput, match="must fit into the model's 150") as error:
        evaluate(settings(tmp_path))
    found = re.search(r"set --max-tokens to (\d+) at most", str(error.value))
    assert found
    most = int(found[1])
    with pytest.raises(InvalidInput):
        evaluate(settings(tmp_path, max_tokens=most + 1))
    evaluate(settings(tmp_path, max_tokens=most))
    assert max(len(request.prompt_ids) for request in model.requests) + most == 150


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"benchmark": "mmlu"}, "must be one of gsm8k, .*, or end in .jsonl"),
        ({"benchmark": "wordproblems", "data": "x"}, "brings its own rows: leave out --data"),
        ({"batch": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **options)
