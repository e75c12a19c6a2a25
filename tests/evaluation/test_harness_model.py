"""The adapter for lm-evaluation-harness: with the harness itself where it is installed."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from lesft.errors import InvalidInput
from lesft.sampling import GREEDY, Sampling
from lesft_client.language_model import Score
from tests.client.fake_language_model import FakeLanguageModel
from tests.evaluation import datasets

Open = Callable[[FakeLanguageModel], Any]


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`lesft_client.evaluation.harness_model`, over a stand-in where there is no harness."""
    if importlib.util.find_spec("lm_eval") is None:

        class LM:
            def __init__(self) -> None:
                self.cache_hook = SimpleNamespace(add_partial=lambda *arguments: None)

        stand_in = ModuleType("lm_eval.api.model")
        stand_in.LM = LM  # type: ignore[attr-defined]
        for name in ("lm_eval", "lm_eval.api"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, "lm_eval.api.model", stand_in)
    monkeypatch.delitem(sys.modules, "lesft_client.evaluation.harness_model", raising=False)
    yield importlib.import_module("lesft_client.evaluation.harness_model")
    sys.modules.pop("lesft_client.evaluation.harness_model", None)


def request(*arguments: Any) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


def texts_of(model: FakeLanguageModel) -> list[str]:
    return [model.tokenizer.decode(list(each.prompt_ids)) for each in model.requests]


def test_texts_come_back_in_order_up_to_the_stop_strings(
    harness: ModuleType, plain_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = FakeLanguageModel(plain_tokenizer, lambda prompt: f" {prompt[-1]}.\n\nQuestion: more")
    contexts = [f"Question: {letter}" for letter in "abcdef"]
    options = {"until": ["Question:", "</s>"], "do_sample": False, "temperature": 0.0}
    with harness.HarnessModel(datasets.opened(model), batch=2) as lm:
        texts = lm.generate_until([request(context, options) for context in contexts])
    assert texts == [f" {letter}.\n\n" for letter in "abcdef"]
    assert sorted(texts_of(model)) == contexts
    assert model.most_at_once == 2
    assert {each.sampling for each in model.requests} == {GREEDY}
    assert {each.max_tokens for each in model.requests} == {256}


def test_a_tasks_sampling_and_limits_are_the_requests(
    harness: ModuleType, plain_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = FakeLanguageModel(plain_tokenizer, lambda prompt: "text", max_length=20)
    options = {"until": ".", "do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 3}
    with harness.HarnessModel(datasets.opened(model)) as lm:
        lm.generate_until([request("0123456789abcdefghij", {**options, "max_new_tokens": 8})])
        with pytest.raises(InvalidInput, match="max_gen_toks must be less than the model's 20"):
            lm.generate_until([request("x", {"max_gen_toks": 20})])
    [asked] = model.requests
    assert asked.sampling == Sampling(temperature=0.5, top_p=0.9, top_k=3)
    assert (asked.max_tokens, asked.stop) == (8, (".",))
    assert texts_of(model) == ["89abcdefghij"]


def test_continuations_are_scored_after_their_contexts(
    harness: ModuleType, plain_tokenizer: PreTrainedTokenizerBase
) -> None:
    asked: list[tuple[str, str]] = []

    def score(prompt: str, continuation: str) -> Score:
        asked.append((prompt, continuation))
        return Score(-float(len(continuation)), continuation == " B")

    model = FakeLanguageModel(plain_tokenizer, lambda prompt: "", score)
    pairs = [("Answer:", " A"), ("Answer:", " B"), ("Answer: ", "long"), ("", "alone")]
    with harness.HarnessModel(datasets.opened(model), batch=1) as lm:
        scores = lm.loglikelihood([request(*pair) for pair in pairs])
    assert scores == [(-2.0, False), (-2.0, True), (-5.0, False), (-5.0, False)]
    assert asked == [
        ("Answer:", " A"),
        ("Answer:", " B"),
        ("Answer:", " long"),
        ("<s>", "alone"),
    ]


def test_a_whole_text_is_scored_in_windows(
    harness: ModuleType, plain_tokenizer: PreTrainedTokenizerBase
) -> None:
    asked: list[tuple[str, str]] = []

    def score(prompt: str, continuation: str) -> Score:
        asked.append((prompt, continuation))
        return Score(-float(len(continuation)), False)

    model = FakeLanguageModel(plain_tokenizer, lambda prompt: "", score, max_length=5)
    with harness.HarnessModel(datasets.opened(model), batch=1) as lm:
        assert lm.loglikelihood_rolling([request("0123456789"), request("ab")]) == [-10.0, -2.0]
    assert asked == [("<s>", "0123"), ("3", "4567"), ("567", "89"), ("<s>", "ab")]


def test_every_token_of_a_text_is_in_one_window_that_fits(harness: ModuleType) -> None:
    for count in range(12):
        for length in range(2, 8):
            pairs = list(harness.windows(range(count), -1, length))
            assert [token for _, window in pairs for token in window] == list(range(count))
            assert all(len(context) + len(window) <= length for context, window in pairs)
            assert all(context for context, _ in pairs)


def test_a_chat_is_put_into_the_models_template_once(
    harness: ModuleType, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = f"{{{{ bos_token }}}}{tokenizer.chat_template}"
    model = FakeLanguageModel(tokenizer, lambda prompt: "yes")
    with harness.HarnessModel(datasets.opened(model)) as lm:
        text = lm.apply_chat_template([{"role": "user", "content": "hello"}])
        lm.generate_until([request(text, {})])
        assert lm.chat_template(True) == tokenizer.chat_template
        assert lm.chat_template() == ""
        assert lm.tokenizer_name == "lesft__fake"
        with pytest.raises(InvalidInput, match="without --apply_chat_template"):
            lm.apply_chat_template([], add_generation_prompt=False)
    assert texts_of(model) == [text] == ["<s><user>hello</s><assistant>"]


def test_an_error_of_the_model_reaches_the_harness(
    harness: ModuleType, plain_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = FakeLanguageModel(plain_tokenizer, lambda prompt: "text", error=InvalidInput("no"))
    with (
        harness.HarnessModel(datasets.opened(model), batch=1) as lm,
        pytest.raises(InvalidInput, match="no"),
    ):
        lm.generate_until([request("a", {}), request("b", {}), request("c", {})])
    assert len(model.requests) == 1
