"""`lesft-client export`: the halves of a finished run's adapter as one, or merged into the base."""

import json
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import ValidationError
from rich.filesize import decimal

from lesft.adapter_export import ADAPTER_EXPORT_FILES, card_name, export_adapter
from lesft.adapter_halves import SPEC_FILE, AdapterHalf, load_half
from lesft.errors import HandshakeMismatch, InvalidInput, ModelError
from lesft.files import check_output_folder, open_to_umask
from lesft.hub import model_folder
from lesft.model_card import CARD_FILE, Figures, figures_of, model_card
from lesft.spec import RunSpec
from lesft.weights import Checkpoint, front_fingerprint
from lesft_client.adapter_fetch import fetch_back
from lesft_client.connector import Connector
from lesft_client.settings import ExportSettings
from lesft_client.status import RESULT_FILE

_UNFINISHED_FOLDER = ".export.tmp"


def export(settings: ExportSettings) -> str:
    """Write --output and return what to print.

    Raises LesftError, with nothing written, when a half is missing or not of the same run, the
    server does not give its own, or the base is another model.
    """
    state, output = settings.state, settings.output
    check_output(output, () if settings.merged else ADAPTER_EXPORT_FILES)
    front = load_half(state)
    spec = _spec_of(state, front)
    _check_base(settings, spec)
    if settings.back is not None:
        back = load_half(settings.back)
    else:
        connector = Connector(settings.server, settings, "server")
        back = fetch_back(connector, settings.patience_seconds, front)
    figures = _figures_of(state)
    with _filled(output) as folder:
        if settings.merged:
            _write_merged(folder, front, back, spec, settings.model, figures)
        else:
            base = Path(settings.model).expanduser()
            base_model = str(base.resolve()) if base.is_dir() and settings.model else settings.model
            export_adapter(folder, front, back, spec, base_model, figures)
    return _summary(output, settings.merged, spec, front)


# ---------------------------------------------------------------------- what goes in


def _spec_of(state: Path, front: AdapterHalf) -> RunSpec:
    """The run that the client's half is of."""
    file = state / SPEC_FILE
    if not file.is_file():
        raise ModelError(
            f"{state} has no {SPEC_FILE}: give the whole --state of lesft-client train"
        )
    try:
        spec = RunSpec.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "JSON"
        raise ModelError(f"{file} is no run spec: {field}: {first['msg']}") from None
    if spec.fingerprint() != front.info.spec_fingerprint:
        raise HandshakeMismatch(
            f"spec_fingerprint: {SPEC_FILE} {spec.fingerprint()}, adapter "
            f"{front.info.spec_fingerprint}; {state} holds files of two runs"
        )
    return spec


def _figures_of(state: Path) -> Figures | None:
    """The client's figures; None where there are none, which only the card would miss."""
    try:
        return figures_of([json.loads((state / RESULT_FILE).read_text(encoding="utf-8"))])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_base(settings: ExportSettings, spec: RunSpec) -> None:
    """Raises unless --model, where its weights are at hand or needed, is the run's base."""
    folder = Path(settings.model).expanduser()
    at_hand = bool(settings.model) and folder.is_dir() and any(folder.glob("*.safetensors"))
    if not (settings.merged or at_hand):
        return
    try:
        checkpoint = Checkpoint(model_folder(settings.model))
    except ModelError as error:
        raise ModelError(f"--merged needs the base's weights: {error}") from None
    found = front_fingerprint(checkpoint, spec.cut_layer)
    if found != spec.front_fingerprint:
        raise HandshakeMismatch(
            f"front_fingerprint: run {spec.front_fingerprint}, --model {settings.model} {found}; "
            f"give the model that was fine-tuned, {spec.model_name}"
        )
    if settings.merged and "quantization_config" in json.loads(checkpoint.config_json):
        raise ModelError(
            f"--model {settings.model} is quantised: give a copy that is not, to merge into"
        )


# ---------------------------------------------------------------------- what comes out


def _write_merged(
    folder: Path,
    front: AdapterHalf,
    back: AdapterHalf,
    spec: RunSpec,
    model: str,
    figures: Figures | None,
) -> None:
    """The whole model in Hugging Face layout, in the dtype of its base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lesft_client.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    with TemporaryDirectory() as adapter:
        export_adapter(Path(adapter), front, back, spec)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype="auto", output_loading_info=True
        )
        base, loading = loaded
        if missing := sorted(loading["missing_keys"]):
            raise ModelError(
                f"--model {model} lacks the tensor {missing[0]!r}: --merged needs the whole model"
            )
        try:
            merged = PeftModel.from_pretrained(base, adapter).merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise ModelError(
                f"the adapter cannot be merged into --model {model}: {error}"
            ) from None
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card = model_card("model", card_name(model, spec), spec, figures)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def check_output(output: Path, ours: Collection[str]) -> None:
    """Raises InvalidInput unless the folder is new, empty, or an earlier export's of `ours`."""
    check_output_folder(output)
    names = {e.name for e in output.iterdir()} if output.exists() else set()
    names.discard(_UNFINISHED_FOLDER)
    foreign = sorted(names - set(ours))
    if not foreign and CARD_FILE in names and names != set(ours):
        foreign = [CARD_FILE]  # alone, it is somebody's own
    if foreign:
        raise InvalidInput(
            f"--output {output} holds {foreign[0]!r}, which no export of an adapter has written: "
            "give a folder of its own"
        )


@contextmanager
def _filled(output: Path) -> Iterator[Path]:
    """A folder to write into, whose files move to `output` once all are there."""
    unfinished = output / _UNFINISHED_FOLDER
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        # The card goes last: with it, the export is whole.
        for entry in sorted(unfinished.iterdir(), key=lambda entry: entry.name == CARD_FILE):
            if entry.is_file():
                open_to_umask(entry)
            entry.replace(output / entry.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _summary(output: Path, merged: bool, spec: RunSpec, front: AdapterHalf) -> str:
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    what = "model with the adapter merged in" if merged else "PEFT adapter"
    return (
        f"{output} holds the {what} of run {spec.run_id} after {front.info.rounds} rounds, "
        f"{decimal(size)}; its {CARD_FILE} says how to load it"
    )
