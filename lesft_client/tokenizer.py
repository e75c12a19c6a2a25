"""The tokenizer of a `--model`."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lesft.errors import ModelError


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id. Raises ModelError when there is none."""
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ModelError(
            f"--model {model}: no tokenizer can be loaded from there ({first_line}); give a folder "
            "with tokenizer.json, or a hub id"
        ) from None
