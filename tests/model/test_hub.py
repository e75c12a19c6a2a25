"""Where a --model's folder comes from."""

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from lesft.errors import ModelError
from lesft.hub import model_folder


def test_a_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert model_folder(str(tmp_path / "model")) == tmp_path / "model"
    assert model_folder("~/model") == tmp_path / "model"


def test_of_a_hub_model_only_config_and_safetensors_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def snapshot_download(model: str, allow_patterns: list[str]) -> str:
        asked.append((model, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert model_folder("someone/model") == tmp_path
    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    assert asked == [("someone/model", patterns)]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("404 Not Found\n\nRequest ID: 1"), "404 Not Found"),
        (ValueError("Repo id must be in the form 'namespace/name'"), "Repo id must be in the form"),
        (ConnectionError(), "ConnectionError()"),
        (Exception("peer closed connection"), "peer closed connection"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_refused_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def snapshot_download(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError) as caught:
        model_folder("someone/model")
    message = str(caught.value)
    assert message.startswith(
        f"--model someone/model is neither a folder nor a model that the hub gives ({reason}"
    )
    assert "\n" not in message


def test_a_path_that_is_no_folder_is_refused_without_asking_the_hub(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(ModelError) as caught:
        model_folder(str(missing))
    assert str(caught.value).startswith(
        f"--model {missing} is neither a folder nor a model that the hub gives (Repo id must be"
    )
