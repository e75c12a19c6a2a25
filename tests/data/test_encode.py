import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lesft.errors import DataError
from lesft_client.data import Sample, encode_prompt, encode_samples, end_token_id

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SAMPLE = Sample("Add 2 and 2.", "2 + 2 = 4\n#### 4", "It is 4. Add 2 and 2.", "4")


def byte_tokenizer(
    chat_template: str | None = None, closes: bool = False, eos: str | None = "</s>"
) -> PreTrainedTokenizerBase:
    """One token a byte, `<s>` in front of every text and, if told so, `</s>` behind it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>"]
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if closes else "<s> $A",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in special[:2]],
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, chat_template=chat_template
    )


def texts(tokenizer: PreTrainedTokenizerBase, max_length: int = 1000) -> list[str]:
    [encoded], _ = encode_samples([SAMPLE], tokenizer, max_length)
    return [
        str(tokenizer.decode(ids))
        for ids in (encoded.base_ids, encoded.reference_ids, encoded.target_ids)
    ]


def test_with_a_chat_template_the_target_is_an_assistants_turn() -> None:
    assert texts(byte_tokenizer(CHAT)) == [
        "<s><|user|>Add 2 and 2.<|end|>\n<|assistant|>",
        "<s><|user|>It is 4. Add 2 and 2.<|end|>\n<|assistant|>",
        "2 + 2 = 4\n#### 4<|end|>",
    ]


def test_without_a_chat_template_a_blank_line_parts_prompt_and_target() -> None:
    assert texts(byte_tokenizer()) == [
        "<s>Add 2 and 2.\n\n",
        "<s>It is 4. Add 2 and 2.\n\n",
        "2 + 2 = 4\n#### 4</s>",
    ]


def test_a_tokenizer_that_closes_texts_does_not_close_the_prompt() -> None:
    assert texts(byte_tokenizer(closes=True))[0] == "<s>Add 2 and 2.\n\n"


def test_the_prompt_with_a_chat_template_is_what_transformers_itself_encodes() -> None:
    tokenizer = byte_tokenizer(CHAT)
    theirs = tokenizer.apply_chat_template(
        [{"role": "user", "content": SAMPLE.prompt}], add_generation_prompt=True, return_dict=False
    )
    assert encode_prompt(SAMPLE.prompt, tokenizer) == theirs


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHAT, "<|end|>"),
        ("{% for m in messages %}{{ m.content }} </s>{% endfor %}", "</s>"),
        ("{% for m in messages %}{{ m.content }}<|end|>\n{% endfor %}{{ eos_token }}", "<|end|>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "</s>"),
    ],
)
def test_the_end_token_is_the_one_that_ends_the_templates_turn(template: str, end: str) -> None:
    tokenizer = byte_tokenizer(template)
    assert tokenizer.decode([end_token_id(tokenizer)]) == end


def test_a_tokenizer_without_any_end_is_refused() -> None:
    with pytest.raises(DataError, match=r"no end-of-sequence token.*set eos_token"):
        encode_samples([SAMPLE], byte_tokenizer(eos=None), 100)


def test_a_template_that_writes_the_date_gives_the_same_ids_every_day() -> None:
    tokenizer = byte_tokenizer("Today is {{ strftime_now('%d %B %Y') }}." + CHAT)
    assert texts(tokenizer)[0] == (
        "Today is 26 Jul 2024.<s><|user|>Add 2 and 2.<|end|>\n<|assistant|>"
    )


def test_samples_are_kept_whole_up_to_the_limit_and_skipped_above_it() -> None:
    # <s>, two line feeds and the end token come to the bytes of the longer path and the target.
    fits = Sample("p" * 10, "t" * 20, "r" * 30, "4")
    too_long = [Sample("p" * 31, "t" * 20, "r", "4"), Sample("p", "t" * 20, "r" * 31, "4")]
    encoded, num_skipped = encode_samples([too_long[0], fits, too_long[1]], byte_tokenizer(), 54)
    assert num_skipped == 2
    assert [sample.num_tokens for sample in encoded] == [54]
    assert len(encoded[0].base_ids) == 13
    assert len(encoded[0].reference_ids) == 33
    assert len(encoded[0].target_ids) == 21


def test_when_nothing_fits_the_lengths_and_the_setting_are_named() -> None:
    samples = [Sample("p" * 10, "t" * 20, "r", "4"), Sample("p" * 11, "t" * 20, "r", "4")]
    with pytest.raises(
        DataError,
        match="none of the 2 samples fits into --max-length 8 tokens: the shortest has 34, "
        "the longest 35; set --max-length 35",
    ):
        encode_samples(samples, byte_tokenizer(), 8)
