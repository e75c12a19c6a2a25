"""What is refused, and how: OpenAI's error bodies, and the classes its client makes of them."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from transformers import PreTrainedTokenizerBase

from tests.client.fake_language_model import FakeLanguageModel
from tests.endpoint.harness import Served, served

HELLO = [{"role": "user", "content": "Hello"}]
IMAGE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]
CHAT: dict[str, Any] = {"model": "fake", "messages": HELLO}
TEXT: dict[str, Any] = {"model": "fake", "prompt": "Hello"}


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> FakeLanguageModel:
    return FakeLanguageModel(tokenizer, lambda prompt: "It is 42.", max_length=100)


@pytest.fixture(scope="module")
def endpoint(model: FakeLanguageModel) -> Iterator[Served]:
    with served(model) as running:
        yield running


@pytest.mark.parametrize(
    ("changed", "param", "words"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "tools are not supported"),
        ({"functions": [{"name": "f"}]}, "functions", "tools are not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "only text"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format",
            "text",
        ),
        ({"logprobs": True}, "logprobs", "log-probabilities are not given"),
        ({"top_logprobs": 2}, "top_logprobs", "log-probabilities are not given"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "is not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "use repetition_penalty"),
        ({"presence_penalty": -1}, "presence_penalty", "use repetition_penalty"),
        ({"modalities": ["audio"]}, "modalities", "must be text only"),
        ({"n": 17}, "n", "less than or equal to 16"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"stop": list("abcde")}, "stop", "4 strings at most, got 5"),
        ({"stop": ""}, "stop", "1 to 1000 characters"),
        ({"stop": 5}, "stop", "a string or a list of strings"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'user'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "valid string"),
        ({"messages": [{"role": "user", "content": IMAGE}]}, "messages.0.content", "'image_url'"),
    ],
)
def test_a_chat_that_cannot_be_had_is_refused_by_the_name_of_its_field(
    endpoint: Served, changed: dict[str, Any], param: str, words: str
) -> None:
    answer = httpx.post(f"{endpoint.url}/v1/chat/completions", json={**CHAT, **changed})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("changed", "param", "words"),
    [
        ({"suffix": "end"}, "suffix", "at the end of a text only"),
        ({"logprobs": 0}, "logprobs", "log-probabilities are not given"),
        ({"best_of": 3}, "best_of", "use n"),
        ({"prompt": []}, "prompt", "must be a string, a list of strings"),
        ({"prompt": ["a", 5]}, "prompt", "must be a string, a list of strings"),
        ({"prompt": {"a": 5}}, "prompt", "must be a string, a list of strings"),
        ({"prompt": ""}, "prompt", "one token at least"),
        ({"prompt": [5, 100_000]}, "prompt", "token ids must lie between 0 and 275, got 100000"),
        ({"prompt": [-1]}, "prompt", "token ids must lie between 0 and 275, got -1"),
        ({"prompt": ["a"] * 33, "n": 2}, "prompt", "64 at most"),
    ],
)
def test_a_completion_that_cannot_be_had_is_refused_by_the_name_of_its_field(
    endpoint: Served, changed: dict[str, Any], param: str, words: str
) -> None:
    answer = httpx.post(f"{endpoint.url}/v1/completions", json={**TEXT, **changed})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert words in error["message"]


@pytest.mark.parametrize(
    "harmless",
    [
        {"tools": [], "tool_choice": "none", "logprobs": False, "n": None, "stop": None},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "top_k": -1},
        {"response_format": {"type": "text"}, "modalities": ["text"], "stream_options": None},
        {"user": "a", "metadata": {"b": "c"}, "store": True, "service_tier": "auto"},
    ],
)
def test_fields_that_change_nothing_are_no_offence(
    endpoint: Served, harmless: dict[str, Any]
) -> None:
    answer = httpx.post(f"{endpoint.url}/v1/chat/completions", json={**CHAT, **harmless})
    assert answer.json()["choices"][0]["message"]["content"] == "It is 42."


@pytest.mark.parametrize(
    ("content", "words", "code"),
    [
        ('{"model": ', "not JSON", "invalid_json"),
        ("[1, 2]", "must be a JSON object", "invalid_type"),
        ("", "must be a JSON object", "invalid_type"),
    ],
)
def test_bodies_that_are_no_json_object_are_refused(
    endpoint: Served, content: str, words: str, code: str
) -> None:
    answer = httpx.post(
        f"{endpoint.url}/v1/chat/completions",
        content=content,
        headers={"content-type": "application/json"},
    )
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, None, code)
    assert words in error["message"]


def test_a_missing_field_is_named(endpoint: Served) -> None:
    answer = httpx.post(f"{endpoint.url}/v1/chat/completions", json={"model": "fake"})
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("messages", "missing_required_parameter")


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_beyond_all_measure_is_refused_and_the_endpoint_lives(
    announced: bool, endpoint: Served
) -> None:
    body = json.dumps({"model": "fake", "prompt": "x" * (9 << 20)}).encode()
    content = body if announced else (body[i : i + 65536] for i in range(0, len(body), 65536))
    url = f"{endpoint.url}/v1/completions"
    headers = {"Content-Type": "application/json"}
    if announced:
        answer = httpx.post(url, content=content, headers=headers)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
    else:
        with contextlib.suppress(httpx.TransportError):
            assert httpx.post(url, content=content, headers=headers).status_code >= 400
    assert httpx.get(f"{endpoint.url}/healthz").status_code == 200


def test_a_text_that_cannot_be_few_enough_tokens_is_not_even_tokenised(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lesft_client.endpoint.asking.encode_bare", lambda *_: pytest.fail("was"))
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="fake", prompt="x" * (1 << 20))
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "prompt")
    assert "1048576 characters are more than these can have" in raised.value.message


def test_a_conversation_that_is_too_long_is_refused_with_both_numbers(
    client: openai.OpenAI, model: FakeLanguageModel
) -> None:
    long = [{"role": "user", "content": "x" * 300}]
    for messages, limit in ((long, None), (HELLO, 99)):
        with pytest.raises(openai.BadRequestError) as raised:
            client.chat.completions.create(model="fake", messages=messages, max_tokens=limit)
        assert raised.value.code == "context_length_exceeded"
        assert raised.value.param == "messages"
        assert "maximum context length is 100 tokens" in raised.value.message
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="fake", prompt="x" * 300)
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "prompt")


def test_roles_that_the_chat_template_does_not_take_are_refused(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{{ raise_exception('System role not supported') }}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with served(FakeLanguageModel(tokenizer, lambda prompt: "")) as endpoint:
        answer = httpx.post(f"{endpoint.url}/v1/chat/completions", json=CHAT)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "messages")
    assert "System role not supported" in error["message"]


def test_halves_of_characters_are_refused(endpoint: Served) -> None:
    message = '{"model": "fake", "messages": [{"role": "user", "content": "a\\ud800"}]}'
    prompt = '{"model": "fake", "prompt": "a\\ud800"}'
    for path, body, param in (
        ("chat/completions", message, "messages"),
        ("completions", prompt, "prompt"),
    ):
        json_type = {"content-type": "application/json"}
        answer = httpx.post(f"{endpoint.url}/v1/{path}", content=body, headers=json_type)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert "its character 2 is half of one: U+D800" in answer.json()["error"]["message"]


def test_the_description_of_the_api_has_the_same_error_bodies(endpoint: Served) -> None:
    paths = httpx.get(f"{endpoint.url}/openapi.json").json()["paths"]
    responses = paths["/v1/chat/completions"]["post"]["responses"]
    assert set(responses) == {"200", "4XX", "5XX"}


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    for ask in (
        lambda: client.chat.completions.create(model="gpt-4o", messages=HELLO),
        lambda: client.completions.create(model="gpt-4o", prompt="x"),
        lambda: client.models.retrieve("gpt-4o"),
    ):
        with pytest.raises(openai.NotFoundError, match="this endpoint has 'lesft/fake'") as raised:
            ask()
        assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


def test_unknown_paths_and_methods_have_the_same_bodies(endpoint: Served) -> None:
    for method, path, status in (("GET", "/v1/files", 404), ("GET", "/v1/completions", 405)):
        answer = httpx.request(method, endpoint.url + path)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert f"{method} {path}" in answer.json()["error"]["message"]
