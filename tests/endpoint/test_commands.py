"""generate, chat and serve, over a model whose answers are written down."""

import io
import os
import pty
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from transformers import PreTrainedTokenizerBase

from lesft.errors import Busy, InvalidInput, Unreachable
from lesft_client import chat_command
from lesft_client.chat_command import chat
from lesft_client.endpoint.serve import serve
from lesft_client.generate_command import generate
from lesft_client.language_model import LanguageModel
from lesft_client.settings import ChatSettings, GenerateSettings, ServeSettings
from tests.client.fake_language_model import FakeLanguageModel
from tests.endpoint.harness import SlowModel, have_commands_open, wait_until

Install = Callable[[LanguageModel], list[str]]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Have the commands open a model."""
    return lambda model: have_commands_open(monkeypatch, model)


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Give the commands a standard input that is no terminal."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts() -> Iterator[None]:
    """Also where whoever started the tests, as a shell does for `&`, has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _interrupt_once(is_time: Callable[[], bool], number: signal.Signals = signal.SIGINT) -> None:
    def wait_and_send() -> None:
        wait_until(is_time)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait_and_send).start()


# ---------------------------------------------------------------------- generate


def test_generate_writes_the_answer_in_the_words_of_the_chat_template(
    install: Install, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    model = FakeLanguageModel(tokenizer, lambda prompt: f"[{prompt}]")
    events = install(model)
    generate(
        GenerateSettings(
            model="x", prompt="Hi", system="Be brief.", temperature=0.5, seed=3, stop=("#",)
        )
    )
    assert capsys.readouterr().out == "[<system>Be brief.</s><user>Hi</s><assistant>]"
    assert model.requests[0].sampling.temperature == 0.5
    assert model.requests[0].sampling.seed == 3
    assert model.requests[0].stop == ("#",)
    assert model.requests[0].max_tokens == 256
    assert events == ["opened", "closed"]


@pytest.mark.parametrize(("raw", "prompt"), [(True, "Hi\n"), (False, "<user>Hi</s><assistant>")])
def test_generate_reads_its_prompt_from_a_pipe(
    install: Install,
    tokenizer: PreTrainedTokenizerBase,
    type_in: Callable[[str], None],
    raw: bool,
    prompt: str,
) -> None:
    model = FakeLanguageModel(tokenizer, lambda prompt: "x")
    install(model)
    type_in("Hi\n")
    generate(GenerateSettings(model="x", raw=raw))
    assert tokenizer.decode(model.requests[0].prompt_ids) == prompt


def test_generate_without_a_prompt_on_a_terminal_says_how_to_give_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)
    with pytest.raises(InvalidInput, match="set --prompt"):
        generate(GenerateSettings(model="x"))


def test_generate_says_how_fast_it_was_where_that_is_asked_for(
    install: Install, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    install(FakeLanguageModel(tokenizer, lambda prompt: "xyz"))
    generate(GenerateSettings(model="x", prompt="Hi", raw=True, stats=True))
    captured = capsys.readouterr()
    assert captured.out == "xyz"
    assert re.search(r"2 tokens of prompt, 4 tokens of text in \S+ s: \S+ tokens/s", captured.err)


def test_generate_writes_no_more_than_fits(
    install: Install, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = FakeLanguageModel(tokenizer, lambda prompt: "xyz", max_length=5)
    install(model)
    generate(GenerateSettings(model="x", prompt="qq", raw=True))
    assert model.requests[0].max_tokens == 3
    with pytest.raises(InvalidInput, match="1 to 4 tokens for this model, got 6"):
        generate(GenerateSettings(model="x", prompt="qqqqqq", raw=True))


def test_ctrl_c_stops_generate_and_closes_the_model(
    install: Install, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = SlowModel(tokenizer, lambda prompt: "a b c " * 500)
    events = install(model)
    _interrupt_once(lambda: model.num_pieces > 2)
    with pytest.raises(KeyboardInterrupt):
        generate(GenerateSettings(model="x", prompt="Hi", max_tokens=2000))
    assert model.num_ended == 1
    assert events == ["opened", "closed"]


# ---------------------------------------------------------------------- chat


def test_chat_keeps_what_was_said_until_it_is_reset(
    install: Install,
    tokenizer: PreTrainedTokenizerBase,
    type_in: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = FakeLanguageModel(tokenizer, lambda prompt: f"{prompt.count('<user>')}.")
    events = install(model)
    type_in("one\n\ntwo\n/reset\nthree\n/what now\n/exit\nnever\n")
    chat(ChatSettings(model="x", system="S"))
    assert capsys.readouterr().out == (
        "1.\n2.\na new conversation begins\n1.\nunknown command /what; /help lists the commands\n"
    )
    prompts = [tokenizer.decode(request.prompt_ids) for request in model.requests]
    assert prompts == [
        "<system>S</s><user>one</s><assistant>",
        "<system>S</s><user>one</s><assistant>1.</s><user>two</s><assistant>",
        "<system>S</s><user>three</s><assistant>",
    ]
    assert events == ["opened", "closed"]


def test_chat_drops_the_oldest_turns_when_they_no_longer_fit(
    install: Install,
    tokenizer: PreTrainedTokenizerBase,
    type_in: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = FakeLanguageModel(tokenizer, lambda prompt: "Yes.", max_length=120)
    install(model)
    type_in("first question\nsecond question\nthird question\n" + "x" * 200 + "\nlast\n")
    chat(ChatSettings(model="x", system="S", max_tokens=20))
    lines = capsys.readouterr().out.splitlines()
    assert "(the oldest 2 messages no longer fit: dropped)" in lines
    assert any("say it in fewer words" in line for line in lines)
    prompt = tokenizer.decode(model.requests[-1].prompt_ids)
    assert prompt.startswith("<system>S</s><user>")
    assert prompt.endswith("<user>last</s><assistant>")
    assert "first" not in prompt
    assert all(len(request.prompt_ids) + request.max_tokens <= 120 for request in model.requests)


def test_chat_says_what_went_wrong_and_goes_on(
    install: Install,
    tokenizer: PreTrainedTokenizerBase,
    type_in: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = FakeLanguageModel(tokenizer, lambda prompt: "Yes.", error=Busy("no room now"))
    install(model)
    type_in("one\ntwo\n")
    chat(ChatSettings(model="x"))
    assert capsys.readouterr().out == "Y\nlesft-client chat: no room now\n" * 2
    assert "one" not in tokenizer.decode(model.requests[1].prompt_ids)


def test_ctrl_c_stops_one_answer_of_the_chat_and_keeps_what_was_written(
    install: Install,
    tokenizer: PreTrainedTokenizerBase,
    type_in: Callable[[str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers = iter(["a b c " * 500, "Yes."])
    model = SlowModel(tokenizer, lambda prompt: next(answers))
    install(model)
    type_in("one\ntwo\n")
    _interrupt_once(lambda: model.num_pieces > 2)
    chat(ChatSettings(model="x", max_tokens=2000))
    out = capsys.readouterr().out
    assert " (stopped)\nYes.\n" in out
    assert model.num_ended == 2
    assert tokenizer.decode(model.requests[1].prompt_ids).startswith(
        "<user>one</s><assistant>" + out.partition(" (stopped)")[0]
    )


def test_another_signal_ends_the_chat_in_mid_answer(
    install: Install, tokenizer: PreTrainedTokenizerBase, type_in: Callable[[str], None]
) -> None:
    def end(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    model = SlowModel(tokenizer, lambda prompt: "a b c " * 500)
    events = install(model)
    type_in("one\ntwo\n")
    before = signal.signal(signal.SIGTERM, end)  # as lesft.commands has it
    try:
        _interrupt_once(lambda: model.num_pieces > 2, signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            chat(ChatSettings(model="x", max_tokens=2000))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(model.requests) == 1
    assert (model.num_ended, events) == (1, ["opened", "closed"])


def test_chat_raises_what_opening_the_model_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    have_commands_open(monkeypatch, Unreachable("nobody there"))
    with pytest.raises(Unreachable, match="nobody there"):
        chat(ChatSettings(model="x"))


_CHAT_ON_A_TERMINAL = """
import sys
sys.path.insert(0, {root!r})
import pytest
from transformers import PreTrainedTokenizerFast
from lesft_client.chat_command import chat
from lesft_client.settings import ChatSettings
from tests.client.fake_language_model import FakeLanguageModel
from tests.endpoint.harness import have_commands_open
tokenizer = PreTrainedTokenizerFast.from_pretrained({folder!r})
have_commands_open(pytest.MonkeyPatch(), FakeLanguageModel(tokenizer, lambda prompt: "Yes."))
for number in range(2):
    chat(ChatSettings(model="x"))
    print("ended", number)
"""


def test_on_a_terminal_chat_prompts_and_ends_with_ctrl_d_and_ctrl_c(
    plain_tokenizer: PreTrainedTokenizerBase,
) -> None:
    root = str(Path(chat_command.__file__).parent.parent)
    program = _CHAT_ON_A_TERMINAL.format(root=root, folder=plain_tokenizer.name_or_path)
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "dumb"
        os.execv(sys.executable, [sys.executable, "-c", program])
    shown, num_read = b"", 0

    def read_until(text: bytes) -> None:
        nonlocal shown, num_read
        while text not in shown[num_read:]:
            shown += os.read(terminal, 1000)
        num_read = shown.index(text, num_read) + len(text)

    read_until(b"> ")
    assert b"lesft/fake: /help lists the commands, Ctrl-D ends" in shown
    os.write(terminal, b"hello\n")
    read_until(b"Yes.\r\n> ")
    os.write(terminal, b"\x04")
    read_until(b"ended 0")
    read_until(b"> ")
    # A moment later, as a user would: a signal before readline waits for keys goes unnoticed.
    time.sleep(0.3)
    os.write(terminal, b"\x03")
    read_until(b"ended 1")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)
    assert b"Traceback" not in shown


# ---------------------------------------------------------------------- serve


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LESFT_CLIENT_API_KEY", raising=False)


def test_serve_says_where_it_listens_and_a_signal_ends_it_and_its_answers(
    install: Install,
    tokenizer: PreTrainedTokenizerBase,
    capsys: pytest.CaptureFixture[str],
    no_key: None,
) -> None:
    model = SlowModel(tokenizer, lambda prompt: "a b c " * 500)
    events = install(model)
    shown: list[str] = []
    streamed: list[str] = []

    def use_it() -> None:
        wait_until(lambda: bool(shown.append(capsys.readouterr().out) or "".join(shown)))
        found = re.search(r"ready: (http://127.0.0.1:\d+/v1)  model lesft/fake ", "".join(shown))
        assert found is not None
        body = {"model": "fake", "prompt": "x", "stream": True, "max_tokens": 1000}
        with httpx.stream("POST", f"{found[1]}/completions", json=body) as response:
            for line in response.iter_lines():
                if not streamed:
                    os.kill(os.getpid(), signal.SIGTERM)
                streamed.append(line)

    user = threading.Thread(target=use_it)
    user.start()
    started = time.monotonic()
    serve(ServeSettings(model="x", listen="127.0.0.1:0"))
    user.join()
    assert "the endpoint is being stopped" in "".join(streamed[-2:])
    assert model.num_ended == 1
    assert events == ["opened", "closed"]
    assert time.monotonic() - started < 5


def test_serve_refuses_addresses_off_this_machine_before_it_loads_the_model(
    install: Install, tokenizer: PreTrainedTokenizerBase, no_key: None
) -> None:
    events = install(FakeLanguageModel(tokenizer, lambda prompt: ""))
    with pytest.raises(InvalidInput, match="--listener-insecure"):
        serve(ServeSettings(model="x", listen="0.0.0.0:0"))
    assert events == []
