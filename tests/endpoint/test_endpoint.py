"""Models, plain completions, the key, metrics, and curl."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from transformers import PreTrainedTokenizerBase

from lesft.errors import InvalidInput
from lesft_client.endpoint.api_key import read_api_key
from tests.client.fake_language_model import FakeLanguageModel
from tests.endpoint.harness import Served, SlowModel, served, wait_until

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerBase) -> FakeLanguageModel:
    return FakeLanguageModel(tokenizer, lambda prompt: f" and {prompt} again")


@pytest.fixture
def endpoint(model: FakeLanguageModel) -> Iterator[Served]:
    with served(model) as running:
        yield running


# ---------------------------------------------------------------------- models and completions


def test_the_model_is_listed_and_found_under_both_names(client: openai.OpenAI) -> None:
    [listed] = client.models.list().data
    assert (listed.id, listed.object, listed.owned_by) == ("lesft/fake", "model", "lesft")
    assert client.models.retrieve("lesft/fake") == listed
    assert client.models.retrieve("fake") == listed


def test_a_completion_goes_on_with_the_bare_prompt(
    client: openai.OpenAI, model: FakeLanguageModel
) -> None:
    answer = client.completions.create(model="fake", prompt="Abc", max_tokens=99)
    assert [(choice.text, choice.finish_reason) for choice in answer.choices] == [
        (" and Abc again", "stop")
    ]
    assert model.requests[0].prompt_ids == model.tokenizer.encode("Abc")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(model.requests[0].prompt_ids)


def test_a_completion_has_16_tokens_when_it_names_no_limit(
    client: openai.OpenAI, model: FakeLanguageModel
) -> None:
    client.completions.create(model="fake", prompt="Abc")
    assert model.requests[0].max_tokens == 16


def test_several_prompts_have_their_choices_in_order(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt=["A", "B"], n=2, max_tokens=99)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [" and A again"] * 2 + [" and B again"] * 2


def test_prompts_may_be_token_ids(client: openai.OpenAI, model: FakeLanguageModel) -> None:
    ids = model.tokenizer.encode("Abc")
    one = client.completions.create(model="fake", prompt=ids, max_tokens=99)
    two = client.completions.create(model="fake", prompt=[ids, ids[:1]], max_tokens=99)
    assert [choice.text for choice in one.choices] == [" and Abc again"]
    assert [choice.text for choice in two.choices] == [" and Abc again", " and A again"]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_in_front(client: openai.OpenAI, stream: bool) -> None:
    answer = client.completions.create(
        model="fake", prompt="Abc", echo=True, stream=stream, max_tokens=99
    )
    chunks = answer if stream else [answer]
    assert "".join(c.choices[0].text for c in chunks) == "Abc and Abc again"


def test_a_completion_streams_its_text_and_its_counts(
    client: openai.OpenAI, model: FakeLanguageModel
) -> None:
    chunks = list(
        client.completions.create(
            model="fake",
            prompt="Abc",
            max_tokens=99,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == " and Abc again"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == len(model.requests[0].prompt_ids)


# ---------------------------------------------------------------------- key


def test_without_the_key_nothing_is_answered_but_health_and_metrics(
    model: FakeLanguageModel,
) -> None:
    with served(model, api_key="s3cret") as endpoint:
        url = f"{endpoint.url}/v1"
        for wrong in ("s3cre", "s3cret2"):
            with pytest.raises(openai.AuthenticationError, match="Bearer KEY") as raised:
                openai.OpenAI(base_url=url, api_key="x").models.list(
                    extra_headers={"Authorization": f"Bearer {wrong}"}
                )
            assert raised.value.code == "invalid_api_key"
        for header in ({}, {"Authorization": "Bearer \u00e9".encode()}):
            assert httpx.get(f"{url}/models", headers=header).status_code == 401
        assert httpx.get(f"{endpoint.url}/openapi.json").status_code == 401
        body = {"model": "fake", "messages": HELLO}
        assert httpx.post(f"{url}/chat/completions", json=body).status_code == 401
        assert model.requests == []
        assert httpx.get(f"{endpoint.url}/healthz").status_code == 200
        assert httpx.get(f"{endpoint.url}/readyz").status_code == 200
        assert httpx.get(f"{endpoint.url}/metrics").status_code == 200
        right = openai.OpenAI(base_url=url, api_key="s3cret")
        assert right.models.list().data[0].id == "lesft/fake"


def test_the_key_comes_from_the_file_or_else_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LESFT_CLIENT_API_KEY", raising=False)
    assert read_api_key(None) is None
    monkeypatch.setenv("LESFT_CLIENT_API_KEY", "from-environment")
    assert read_api_key(None) == "from-environment"
    file = tmp_path / "key"
    file.write_text("from-file\n")
    assert read_api_key(file) == "from-file"


def test_an_empty_key_or_a_missing_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LESFT_CLIENT_API_KEY", "")
    with pytest.raises(InvalidInput, match="LESFT_CLIENT_API_KEY is empty"):
        read_api_key(None)
    (tmp_path / "key").write_text(" \n")
    with pytest.raises(InvalidInput, match=r"--api-key-file .*key is empty"):
        read_api_key(tmp_path / "key")
    with pytest.raises(InvalidInput, match=r"none cannot be read: .*No such file"):
        read_api_key(tmp_path / "none")


# ---------------------------------------------------------------------- metrics


def _metric(endpoint: Served, name: str) -> float:
    text = httpx.get(f"{endpoint.url}/metrics").text
    [line] = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(line.rpartition(" ")[2])


def test_requests_tokens_and_seconds_are_counted(
    endpoint: Served, client: openai.OpenAI, model: FakeLanguageModel
) -> None:
    answer = client.chat.completions.create(model="fake", messages=HELLO, n=2)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=HELLO)
    assert answer.usage is not None
    path = 'path="/v1/chat/completions"'
    requests = "lesft_endpoint_requests_total"
    wait_until(lambda: _metric(endpoint, f'{requests}{{{path},status="404"}}') == 1)
    assert _metric(endpoint, f'{requests}{{{path},status="200"}}') == 1
    assert _metric(endpoint, f"lesft_endpoint_seconds_count{{{path}}}") == 2
    tokens = "lesft_endpoint_tokens_total"
    assert _metric(endpoint, f'{tokens}{{kind="completion"}}') == answer.usage.completion_tokens
    assert _metric(endpoint, f'{tokens}{{kind="prompt"}}') == 2 * answer.usage.prompt_tokens
    assert _metric(endpoint, "lesft_endpoint_in_flight") == 0


def test_a_stream_is_in_flight_until_its_end(tokenizer: PreTrainedTokenizerBase) -> None:
    with served(SlowModel(tokenizer, lambda prompt: "a b c " * 500)) as endpoint:
        body = {"model": "fake", "messages": HELLO, "stream": True}
        with httpx.stream("POST", f"{endpoint.url}/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            assert _metric(endpoint, "lesft_endpoint_in_flight") == 1
        wait_until(lambda: _metric(endpoint, "lesft_endpoint_in_flight") == 0)


# ---------------------------------------------------------------------- curl


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_reads_a_stream_of_events(endpoint: Served) -> None:
    body = json.dumps({"model": "fake", "prompt": "Abc", "stream": True, "max_tokens": 99})
    out = subprocess.run(
        ["curl", "-sSN", f"{endpoint.url}/v1/completions", "--json", body],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    ).stdout
    events = out.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == " and Abc again"
