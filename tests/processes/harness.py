"""The commands as real processes on free ports of 127.0.0.1, and a tiny model with a tokenizer."""

import json
import os
import signal
import subprocess
import sysconfig
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests import tiny_models

PATIENCE_SECONDS = 60
"""How long a test waits for what is sure to come; loading torch takes seconds on a busy machine."""

_VOCAB_SIZE = 300
ANY_PORT = "127.0.0.1:0"
_COMMANDS = Path(sysconfig.get_path("scripts"))


# ---------------------------------------------------------------------- model and data


def save_model_with_tokenizer(folder: Path) -> Path:
    """A tiny random llama with a byte-level tokenizer of its own, made here and now."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sample["prompt"] for sample in make_samples(9)], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    tiny_models.save_tiny_model(folder, "llama", vocab_size=_VOCAB_SIZE)
    return folder


def make_samples(count: int) -> list[dict[str, str]]:
    """Short problems, each another one."""
    return [
        {
            "prompt": f"Add {n} and {n + 3}.",
            "reference": f"{2 * n + 3}: add {n} and {n + 3}.",
            "target": f"It is {2 * n + 3}.",
        }
        for n in range(count)
    ]


def write_samples(path: Path, samples: Sequence[dict[str, str]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


# ---------------------------------------------------------------------- processes


class Process:
    """A command as a process; what it prints is collected line by line as it comes."""

    def __init__(self, command: str, *arguments: str, cwd: Path) -> None:
        environment = {name: os.environ[name] for name in os.environ if name[:6] != "LESFT_"}
        self._process = subprocess.Popen(
            [_COMMANDS / command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd,
            env={**environment, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._closed = False
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def wait_for_line(self, text: str) -> str:
        """The first line with `text` in it; fails when the process ends without it."""

        def found() -> bool:
            return any(text in line for line in self.lines) or self._closed

        with self._changed:
            assert self._changed.wait_for(found, PATIENCE_SECONDS), f"no {text!r} in {self.output}"
            line = next((line for line in self.lines if text in line), None)
        assert line is not None, f"ended without {text!r}: {self.output}"
        return line

    def wait(self, seconds: float = PATIENCE_SECONDS) -> int:
        """The exit status, once all output is there."""
        status = self._process.wait(seconds)
        self._reader.join(seconds)
        return status

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this process alone."""
        self._process.send_signal(number)

    def end(self) -> None:
        """Make sure that it is gone."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    @property
    def output(self) -> str:
        """All it has printed."""
        return "\n".join(self.lines)


class Service(Process):
    """A process with a state folder; its real addresses are in the endpoints.json there."""

    def __init__(self, command: str, *arguments: str, state: Path, cwd: Path) -> None:
        super().__init__(command, *arguments, "--state", str(state), cwd=cwd)
        self.state = state

    def address(self, kind: str) -> str:
        """The address of "grpc" or "control"; only once it has said that it listens."""
        address = json.loads((self.state / "endpoints.json").read_text())[kind]
        assert isinstance(address, str)
        return address


class Launcher:
    """Starts services with the options that every test wants."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.model = model
        self.data = write_samples(folder / "data.jsonl", make_samples(20))
        self.started: list[Service] = []

    def services(self, clients: int, **options: Any) -> tuple[Service, Service]:
        """A server and an aggregator that listen; `options` are the server's."""
        server = self.start_server(clients=clients, **options)
        aggregator = self._start(
            "lesft-aggregator",
            {"listen": ANY_PORT, "control": ANY_PORT, "clients": clients},
        )
        aggregator.wait_for_line("ready")
        server.wait_for_line("ready")
        return server, aggregator

    def start_server(self, **options: Any) -> Service:
        """A server that is about to load its model."""
        defaults = {
            "model": self.model,
            "listen": ANY_PORT,
            "control": ANY_PORT,
            "clients": 1,
            "rounds": 3,
            "cut_layer": 1,
            "accumulation": 2,
            "max_length": 64,
            "threads": 1,
        }
        return self._start("lesft-server", {**defaults, **options})

    def start_client(self, name: str, server: str, aggregator: str, **options: Any) -> Service:
        """A client on its way; its state is in a folder of its name."""
        defaults = {
            "client_id": name,
            "server": server,
            "aggregator": aggregator,
            "model": self.model,
            "data": self.data,
            "control": ANY_PORT,
            "cache": self.folder / "cache",
            "threads": 1,
        }
        return self._start("lesft-client", {**defaults, **options}, "train", name=name)

    def _start(self, command: str, options: dict[str, Any], *words: str, name: str = "") -> Service:
        arguments = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
        state = self.folder / (name or f"{command}-{len(self.started)}")
        service = Service(command, *words, *arguments, state=state, cwd=self.folder)
        self.started.append(service)
        return service


@contextmanager
def launcher(folder: Path, model: Path) -> Iterator[Launcher]:
    """Whatever is started in the block is gone after it, and none of it may print a traceback."""
    running = Launcher(folder, model)
    try:
        yield running
        for service in running.started:
            assert "Traceback" not in service.output, service.output
    finally:
        for service in running.started:
            service.end()
