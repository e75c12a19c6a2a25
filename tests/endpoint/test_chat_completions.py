"""POST /v1/chat/completions, asked by OpenAI's own client."""

import asyncio
from collections.abc import Iterator

import httpx
import openai
import pytest
from transformers import PreTrainedTokenizerBase

from lesft.errors import Busy, InternalError, InvalidInput, Unreachable
from lesft_client.endpoint.asking import Defaults
from lesft_client.language_model import LanguageModel
from tests.client.fake_language_model import FakeLanguageModel
from tests.endpoint.harness import Served, SlowModel, served, wait_until

HELLO = [{"role": "user", "content": "Hello"}]


def _answer(prompt: str) -> str:
    return "It is 42. Or 43?"


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerBase) -> FakeLanguageModel:
    return FakeLanguageModel(tokenizer, _answer)


@pytest.fixture
def endpoint(model: FakeLanguageModel) -> Iterator[Served]:
    with served(model) as running:
        yield running


def _client(endpoint: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="any", max_retries=0)


@pytest.fixture
def client(endpoint: Served) -> Iterator[openai.OpenAI]:
    with _client(endpoint) as opened:
        yield opened


def test_an_answer_has_the_text_the_reason_of_its_end_and_the_counts(
    client: openai.OpenAI, model: FakeLanguageModel
) -> None:
    answer = client.chat.completions.create(model="lesft/fake", messages=HELLO)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "It is 42. Or 43?")
    assert choice.finish_reason == "stop"
    assert (answer.object, answer.model) == ("chat.completion", "lesft/fake")
    assert answer.system_fingerprint == model.fingerprint
    num_prompt = len(model.requests[0].prompt_ids)
    num_written = len(model.tokenizer.encode("It is 42. Or 43?")) + 1  # and the end token
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == num_prompt
    assert answer.usage.completion_tokens == num_written
    assert answer.usage.total_tokens == num_prompt + num_written


def test_the_chat_template_gets_all_turns_in_their_roles(
    client: openai.OpenAI, model: FakeLanguageModel
) -> None:
    client.chat.completions.create(
        model="fake",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}],
            },
            {"role": "assistant", "content": "3"},
            {"role": "user", "content": "4", "name": "ann"},
        ],
    )
    prompt = model.tokenizer.decode(model.requests[0].prompt_ids)
    assert prompt == "<system>Be brief.</s><user>12</s><assistant>3</s><user>4</s><assistant>"


def test_a_stream_brings_the_role_then_the_text_then_the_reason(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="lesft/fake", messages=HELLO, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == "It is 42. Or 43?"
    assert len([text for text in texts if text]) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "stop"]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_a_stream_ends_with_the_counts_where_they_are_asked_for(
    client: openai.OpenAI, model: FakeLanguageModel
) -> None:
    chunks = list(
        client.chat.completions.create(
            model="lesft/fake",
            messages=HELLO,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.prompt_tokens == len(model.requests[0].prompt_ids)
    assert usage.completion_tokens == len(model.tokenizer.encode("It is 42. Or 43?")) + 1
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_the_asynchronous_client_streams_two_answers_at_once(
    endpoint: Served, model: FakeLanguageModel
) -> None:
    async def ask(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(model="fake", messages=HELLO, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_both() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{endpoint.url}/v1", api_key="any") as client:
            return await asyncio.gather(ask(client), ask(client))

    assert asyncio.run(ask_both()) == ["It is 42. Or 43?"] * 2
    assert len(model.requests) == 2


def test_what_is_asked_for_reaches_the_model(
    client: openai.OpenAI, model: FakeLanguageModel
) -> None:
    client.chat.completions.create(
        model="fake",
        messages=HELLO,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        stop=["Or", "!"],
        max_completion_tokens=50,
        user="ann",
        metadata={"a": "b"},
        store=False,
        extra_body={"top_k": 5, "repetition_penalty": 1.25, "no_such_field": 1},
    )
    [request] = model.requests
    assert request.sampling.model_dump() == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "repetition_penalty": 1.25,
        "seed": 7,
    }
    assert (request.stop, request.max_tokens) == (("Or", "!"), 50)


def test_what_is_left_out_is_as_with_openai(
    client: openai.OpenAI, model: FakeLanguageModel
) -> None:
    for _ in range(2):
        client.chat.completions.create(model="fake", messages=HELLO)
    first, second = model.requests
    assert first.sampling.temperature == 1.0
    assert first.sampling.seed != second.sampling.seed
    assert first.max_tokens == 4096 - len(first.prompt_ids)
    assert first.stop == ()


def test_the_owner_of_the_endpoint_sets_defaults(model: FakeLanguageModel) -> None:
    with served(model, defaults=Defaults(temperature=0.25, max_tokens=9)) as endpoint:
        _client(endpoint).chat.completions.create(model="fake", messages=HELLO)
        _client(endpoint).chat.completions.create(model="fake", messages=HELLO, temperature=0)
    assert [request.sampling.temperature for request in model.requests] == [0.25, 0.0]
    assert [request.max_tokens for request in model.requests] == [9, 9]


def test_a_stop_string_ends_the_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=HELLO, stop="Or")
    assert answer.choices[0].message.content == "It is 42. "
    assert answer.choices[0].finish_reason == "stop"


def test_the_token_limit_ends_the_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=HELLO, max_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices_are_written_at_once_with_draws_of_their_own(
    client: openai.OpenAI, model: FakeLanguageModel, stream: bool
) -> None:
    answer = client.chat.completions.create(
        model="fake", messages=HELLO, n=3, seed=5, stream=stream
    )
    texts = {0: "", 1: "", 2: ""}
    if stream:
        for chunk in answer:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    else:
        texts = {choice.index: choice.message.content for choice in answer.choices}
        assert answer.usage.prompt_tokens == len(model.requests[0].prompt_ids)
    assert texts == dict.fromkeys(range(3), "It is 42. Or 43?")
    assert model.most_at_once == 3
    assert [request.sampling.seed for request in model.requests] == [5, 6, 7]


def test_a_client_that_hangs_up_in_mid_stream_ends_the_writing(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = SlowModel(tokenizer, lambda prompt: "a b c " * 500)
    with served(model) as endpoint:
        body = {"model": "fake", "messages": HELLO, "stream": True, "n": 2}
        url = f"{endpoint.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body) as response:
            lines = response.iter_lines()
            assert "assistant" in next(lines)
            assert model.num_ended == 0
        wait_until(lambda: model.num_ended == 2)
        assert 0 < model.num_pieces < 500


def test_a_client_that_hangs_up_while_it_waits_ends_the_writing(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = SlowModel(tokenizer, lambda prompt: "a b c " * 500)
    with served(model) as endpoint:
        body = {"model": "fake", "messages": HELLO, "n": 2}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{endpoint.url}/v1/chat/completions", json=body, timeout=0.3)
        wait_until(lambda: model.num_ended == 2)
        assert 0 < model.num_pieces < 500


def test_stopping_the_endpoint_ends_answers_with_an_error(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = SlowModel(tokenizer, lambda prompt: "a b c " * 500)
    with served(model) as endpoint:
        stream = _client(endpoint).chat.completions.create(
            model="fake", messages=HELLO, stream=True
        )
        next(iter(stream))
        endpoint.endpoint.stop()
        with pytest.raises(openai.APIError, match="the endpoint is being stopped"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="the endpoint is being stopped"):
            _client(endpoint).chat.completions.create(model="fake", messages=HELLO)
    assert model.num_ended == 1


@pytest.mark.parametrize(
    ("error", "kind", "status", "code"),
    [
        (Busy("no room now"), openai.InternalServerError, 503, "overloaded"),
        (Unreachable("no room now"), openai.InternalServerError, 503, None),
        (InvalidInput("no room now"), openai.BadRequestError, 400, "invalid_value"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_before_the_first_token_have_a_status(
    tokenizer: PreTrainedTokenizerBase,
    error: Exception,
    kind: type[openai.APIStatusError],
    status: int,
    code: str | None,
    stream: bool,
) -> None:
    class Failing(FakeLanguageModel):
        async def generate(self, request):  # type: ignore[no-untyped-def]
            raise error
            yield

    with served(Failing(tokenizer, _answer)) as endpoint, pytest.raises(kind) as raised:
        _client(endpoint).chat.completions.create(model="fake", messages=HELLO, stream=stream)
    assert (raised.value.status_code, raised.value.code) == (status, code)
    assert raised.value.body["message"] == "no room now"
    assert (raised.value.response.headers.get("retry-after") == "1") == (status == 503)


def test_an_error_in_mid_stream_is_the_last_event(tokenizer: PreTrainedTokenizerBase) -> None:
    model: LanguageModel = FakeLanguageModel(tokenizer, _answer, error=Unreachable("it is gone"))
    with served(model) as endpoint:
        stream = _client(endpoint).chat.completions.create(
            model="fake", messages=HELLO, stream=True
        )
        texts = []
        with pytest.raises(openai.APIError, match="it is gone") as raised:
            texts.extend(chunk.choices[0].delta.content for chunk in stream)
        assert "".join(texts) == "I"
        assert raised.value.type == "server_error"
        raw = httpx.post(
            f"{endpoint.url}/v1/chat/completions",
            json={"model": "fake", "messages": HELLO, "stream": True},
        )
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert raw.text.endswith("}}\n\n")
    assert "[DONE]" not in raw.text


@pytest.mark.parametrize("error", [RuntimeError("a secret"), InternalError("a secret")])
@pytest.mark.parametrize("stream", [False, True])
def test_internal_errors_keep_their_words_to_themselves(
    tokenizer: PreTrainedTokenizerBase, error: Exception, stream: bool
) -> None:
    model = FakeLanguageModel(tokenizer, _answer, error=error)
    with served(model) as endpoint:
        answer = httpx.post(
            f"{endpoint.url}/v1/chat/completions",
            json={"model": "fake", "messages": HELLO, "stream": stream},
        )
    assert answer.status_code == (200 if stream else 500)
    assert "internal error; the endpoint's log has the details" in answer.text
    assert "secret" not in answer.text
