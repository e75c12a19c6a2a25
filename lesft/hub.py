"""A model's folder: as given, or fetched from the hub into the library's own cache."""

from pathlib import Path

from lesft.errors import ModelError


def model_folder(model: str) -> Path:
    """The local folder of a `--model` that is a folder or a hub id.

    Fetches config and safetensors files from the hub where needed. Raises ModelError when there is
    neither.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # its HTTP library's too, which is another in every other release
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelError(
            f"--model {model} is neither a folder nor a model that the hub gives ({first_line})"
        ) from None
