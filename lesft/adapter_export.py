"""What a run leaves for others: an ordinary PEFT adapter of the whole model, with its card."""

from pathlib import Path

from lesft.adapter_halves import AdapterHalf, join
from lesft.adapters import save_adapter
from lesft.model_card import CARD_FILE, Figures, model_card
from lesft.spec import RunSpec

ADAPTER_EXPORT_FILES = ("adapter_config.json", "adapter_model.safetensors", CARD_FILE)


def export_adapter(
    folder: Path,
    front: AdapterHalf,
    back: AdapterHalf,
    spec: RunSpec,
    base_model: str = "",
    figures: Figures | None = None,
    split: bool = True,
) -> None:
    """Join the halves in `folder`; `base_model` is where peft finds the base, by default its name.

    Without `split`, clients with the whole model have trained it, as the card then says. Raises
    what `lesft.adapter_halves.join` does, with nothing written.
    """
    tensors = join(front, back)
    save_adapter(folder, tensors, spec.lora, base_model or spec.model_name)
    card = model_card("adapter", card_name(base_model, spec), spec, figures, split)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def card_name(base_model: str, spec: RunSpec) -> str:
    """How the card names the base: a folder of this machine says nothing elsewhere."""
    is_folder = not base_model or Path(base_model).expanduser().exists()
    return spec.model_name if is_folder else base_model
