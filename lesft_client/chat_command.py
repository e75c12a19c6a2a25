"""`lesft-client chat`: a conversation on the terminal."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from lesft.errors import LesftError
from lesft_client.conversation import Turn, fit_turns
from lesft_client.language_model import GenerationRequest
from lesft_client.model_thread import ModelThread
from lesft_client.settings import ChatSettings

if TYPE_CHECKING:
    from lesft_client.language_model import LanguageModel

HELP = """\
/reset   begin a new conversation
/exit    end, as Ctrl-D does, and Ctrl-C at the prompt
/help    this list
Ctrl-C   stop the answer that is being written
"""


class StoppedByUser(KeyboardInterrupt):
    """Ctrl-C, unlike another signal that ends the program."""


def chat(settings: ChatSettings) -> None:
    """Talk until the user ends it.

    An answer that fails is said so, and the conversation goes on. Raises what opening the model
    raises.
    """
    from lesft_client.open_model import open_model

    with ModelThread(open_model(settings)) as model_thread:
        talk(Chat(model_thread, settings))


def talk(chat: "Chat") -> None:
    """Answer line after line of standard input, with a prompt on a terminal."""
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # input() then edits lines and knows the earlier ones
        chat.say(f"{chat.model.name}: /help lists the commands, Ctrl-D ends\n")
    with _ctrl_c_by_name():
        while True:
            try:
                line = input("> " if on_terminal else "").strip()
            except (EOFError, StoppedByUser):
                chat.say("\n" if on_terminal else "")
                return
            if line == "/exit":
                return
            chat.hear(line)


@contextlib.contextmanager
def _ctrl_c_by_name() -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise StoppedByUser

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Chat:
    """A conversation: what was said, and how the next line changes that."""

    def __init__(self, model_thread: ModelThread, settings: ChatSettings) -> None:
        self.model: LanguageModel = model_thread.model
        self._model_thread = model_thread
        self._settings = settings
        self._turns = self._beginning()

    def _beginning(self) -> list[Turn]:
        system = self._settings.system
        return [{"role": "system", "content": system}] if system else []

    def hear(self, line: str) -> None:
        """Do what a command says, or answer a message. Never raises a LesftError."""
        if line == "/help":
            self.say(HELP)
        elif line == "/reset":
            self._turns = self._beginning()
            self.say("a new conversation begins\n")
        elif line.startswith("/"):
            self.say(f"unknown command {line.split()[0]}; /help lists the commands\n")
        elif line:
            try:
                self._answer(line)
            except LesftError as error:
                self.say(f"lesft-client chat: {error}\n")

    def say(self, text: str) -> None:
        """Show it now."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def _answer(self, message: str) -> None:
        max_length = self.model.max_length
        room_for_answer = min(self._settings.max_tokens, max_length // 2)
        turns = [*self._turns, {"role": "user", "content": message}]
        kept, ids = fit_turns(turns, self.model.tokenizer, max_length - room_for_answer)
        if len(kept) < len(turns):
            self.say(f"(the oldest {len(turns) - len(kept)} messages no longer fit: dropped)\n")
        request = GenerationRequest(
            prompt_ids=ids,
            max_tokens=min(self._settings.max_tokens, max_length - len(ids)),
            sampling=self._settings.sampling,
            stop=self._settings.stop,
        )
        answer = _Answer(self, request)
        try:
            self._model_thread.run(answer.write())
        except StoppedByUser:
            self.say(" (stopped)")
        finally:
            self.say("\n")
        self._turns = [*kept, {"role": "assistant", "content": answer.text}]


class _Answer:
    """What has been written so far of one answer, also when it is stopped."""

    def __init__(self, chat: Chat, request: GenerationRequest) -> None:
        self._chat = chat
        self._request = request
        self.text = ""

    async def write(self) -> None:
        async with contextlib.aclosing(self._chat.model.generate(self._request)) as pieces:
            async for piece in pieces:
                self.text += piece.text
                self._chat.say(piece.text)
