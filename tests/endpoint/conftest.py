"""A tokenizer with a chat template, shared by all tests in this folder."""

from collections.abc import Iterator

import openai
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.endpoint.harness import Served
from tests.processes.harness import save_model_with_tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def plain_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Byte-level, without a chat template."""
    folder = save_model_with_tokenizer(tmp_path_factory.mktemp("model"))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Byte-level, with a chat template that shows who said what."""
    folder = save_model_with_tokenizer(tmp_path_factory.mktemp("chat-model"))
    chatty = AutoTokenizer.from_pretrained(folder)
    chatty.chat_template = CHAT_TEMPLATE
    return chatty


@pytest.fixture
def client(endpoint: Served) -> Iterator[openai.OpenAI]:
    """The openai package on the module's own `endpoint`."""
    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="any", max_retries=0) as opened:
        yield opened
