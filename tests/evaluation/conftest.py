"""Tokenizers shared by all tests in this folder."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.processes.harness import save_model_with_tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer without a chat template."""
    return save_model_with_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture
def plain_tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    """Without a chat template."""
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def tokenizer(plain_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """With a chat template that shows who said what."""
    plain_tokenizer.chat_template = CHAT_TEMPLATE
    return plain_tokenizer
