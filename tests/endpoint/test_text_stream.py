"""Tokens become text one by one: nothing is lost, nothing taken back, and each token is cheap."""

from collections.abc import Sequence
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lesft_client.text_stream import TextStream

NO_END = frozenset[int]()
LETTERS = "ab .é日😀👩‍🚀\ufffd"
LINES = ["a bab  ab. b", "ab é é日 日a", "a  a. b.b"]


def _byte_level() -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*LINES, "x😀 y😀"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", extra_special_tokens=[]
    )


def _metaspace() -> PreTrainedTokenizerBase:
    """Like llama 2's: ▁ for a space, bytes for what is no token, a space stripped in front."""
    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += ["<unk>", "<s>", "</s>", "▁", "a", "b", ".", "▁a", "▁b", "ab", "▁ab", "▁▁", "é"]
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b"), ("▁", "▁")]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


BYTE_LEVEL = _byte_level()
METASPACE = _metaspace()
# Another kind of decoder for the same tokens: it strips all spaces of the first token.
METASPACE_DECODER = _metaspace()
METASPACE_DECODER.backend_tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
ANY = {"byte_level": BYTE_LEVEL, "metaspace": METASPACE, "metaspace_decoder": METASPACE_DECODER}


def _texts(stream: TextStream, ids: Sequence[int]) -> list[str]:
    """What each token gives; the rest comes last."""
    texts = []
    for token_id in ids:
        text, ended = stream.add(token_id)
        texts.append(text)
        if ended:
            return texts
    return [*texts, stream.finish()]


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _cut(text: str, stop: Sequence[str]) -> str:
    """The text up to the stop string that is complete first; of several, the longest."""
    found = [(text.index(s) + len(s), text.index(s)) for s in stop if s in text]
    return text[: min(found)[1]] if found else text


stop_strings = st.lists(st.text(LETTERS, min_size=1, max_size=3), max_size=3)


@given(ids=st.lists(st.integers(0, 279)), stop=stop_strings)
@settings(max_examples=400, deadline=None)
def test_any_byte_level_tokens_give_what_they_decode_to_up_to_the_stop(
    ids: list[int], stop: list[str]
) -> None:
    stream = TextStream(BYTE_LEVEL, stop, NO_END)
    assert "".join(_texts(stream, ids)) == _cut(_decoded(BYTE_LEVEL, ids), stop)


# The tokens of the bytes 0x80 to 0xFF, as the byte-level alphabet writes them, and a letter.
BEYOND_ASCII = [*range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x122, 0x144)]
BYTES = [BYTE_LEVEL.convert_tokens_to_ids(chr(code)) for code in [*BEYOND_ASCII, ord("a")]]


@given(ids=st.lists(st.sampled_from(BYTES), min_size=60, max_size=150))
@settings(max_examples=200, deadline=None)
def test_long_runs_of_bytes_that_are_no_text_give_what_they_decode_to(ids: list[int]) -> None:
    assert "".join(_texts(TextStream(BYTE_LEVEL, [], NO_END), ids)) == _decoded(BYTE_LEVEL, ids)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@given(text=st.text(LETTERS, max_size=60), stop=stop_strings)
@settings(max_examples=200, deadline=None)
def test_any_text_comes_out_as_it_went_in_up_to_the_stop(
    kind: str, text: str, stop: list[str]
) -> None:
    tokenizer = ANY[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(tokenizer, stop, NO_END)
    assert "".join(_texts(stream, ids)) == _cut(_decoded(tokenizer, ids), stop)


@pytest.mark.parametrize("kind", ["metaspace", "metaspace_decoder"])
@given(ids=st.lists(st.integers(257, 268)), stop=stop_strings)
@settings(max_examples=300, deadline=None)
def test_spaces_of_sentencepiece_tokens_are_as_in_the_whole_text(
    kind: str, ids: list[int], stop: list[str]
) -> None:
    tokenizer = ANY[kind]
    stream = TextStream(tokenizer, stop, NO_END)
    assert "".join(_texts(stream, ids)) == _cut(_decoded(tokenizer, ids), stop)


def test_an_emoji_of_several_tokens_is_shown_when_it_is_whole() -> None:
    ids = BYTE_LEVEL.encode("a👩a", add_special_tokens=False)
    shown = _texts(TextStream(BYTE_LEVEL, [], NO_END), ids)
    assert len(ids) > 3
    assert shown == ["a", *[""] * (len(ids) - 3), "👩", "a", ""]


def test_bytes_of_a_sentencepiece_tokenizer_are_shown_when_they_are_a_character() -> None:
    ids = METASPACE.encode("a日😀😀", add_special_tokens=False)
    shown = _texts(TextStream(METASPACE, [], NO_END), ids)
    assert shown == ["a", "", "", "日", "", "", "", "😀", "", "", "", "😀", ""]


def test_words_keep_the_space_in_front_of_them_but_for_the_first() -> None:
    ids = METASPACE.convert_tokens_to_ids(["▁ab", "▁a", "b", "▁", "▁b"])
    shown = _texts(TextStream(METASPACE, [], NO_END), ids)
    assert shown == ["ab", " a", "b", " ", " b", ""]


def test_a_half_character_at_the_end_is_shown_as_the_decoder_shows_it() -> None:
    ids = BYTE_LEVEL.encode("a👩", add_special_tokens=False)[:-1]
    shown = _texts(TextStream(BYTE_LEVEL, [], NO_END), ids)
    assert shown == ["a", *[""] * (len(ids) - 1), "\ufffd"]


def test_what_may_begin_a_stop_string_waits_and_comes_when_it_does_not() -> None:
    ids = BYTE_LEVEL.convert_tokens_to_ids(list("xyzxyw"))
    stream = TextStream(BYTE_LEVEL, ["xyw!", "zz"], NO_END)
    assert _texts(stream, ids) == ["", "", "xy", "z", "", "", "xyw"]


def test_a_stop_string_is_cut_off_also_where_it_begins_inside_a_token() -> None:
    ids = BYTE_LEVEL.convert_tokens_to_ids(["ab", "ab", "x"])
    stream = TextStream(BYTE_LEVEL, ["ba"], NO_END)
    assert [stream.add(ids[0]), stream.add(ids[1])] == [("a", False), ("", True)]


def test_of_two_stop_strings_the_one_that_is_complete_first_ends_the_text() -> None:
    whole = TextStream(BYTE_LEVEL, ["abx", "b"], NO_END)
    assert whole.add(BYTE_LEVEL.convert_tokens_to_ids("ab")) == ("a", True)
    in_parts = TextStream(BYTE_LEVEL, ["abx", "b"], NO_END)
    assert [in_parts.add(BYTE_LEVEL.convert_tokens_to_ids(c)) for c in "ab"] == [
        ("", False),
        ("a", True),
    ]


def test_an_end_token_ends_the_text_and_brings_what_was_waiting() -> None:
    ids = BYTE_LEVEL.convert_tokens_to_ids(["a", "b", "</s>"])
    stream = TextStream(BYTE_LEVEL, ["abc"], frozenset({ids[2]}))
    assert [stream.add(token_id) for token_id in ids] == [("", False), ("", False), ("ab", True)]


def test_special_tokens_and_ids_beyond_the_vocabulary_give_no_text() -> None:
    tokenizer = _byte_level()
    tokenizer.backend_tokenizer.add_tokens([AddedToken("<|turn|>", special=True)])
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    a = tokenizer.convert_tokens_to_ids("a")
    assert _texts(TextStream(tokenizer, [], NO_END), [a, turn, 9999, 0, a]) == [
        "a", "", "", "", "a", ""
    ]  # fmt: skip


def test_a_token_costs_no_more_when_the_text_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = BYTE_LEVEL.decode

    def counting(ids: list[int], **options: bool) -> str:
        decoded.append(len(ids))
        return str(decode(ids, **options))

    monkeypatch.setattr(BYTE_LEVEL, "decode", counting)
    for tokens in ("ab", "\u0122"):  # letters; the byte 0x80, which is no text ever
        stream = TextStream(BYTE_LEVEL, ["abc"], NO_END)
        per_token = []
        for _ in range(500):
            stream.add(BYTE_LEVEL.convert_tokens_to_ids(tokens))
            per_token.append(sum(decoded))
            decoded.clear()
        assert list(accumulate(per_token))[-1] <= 500 * 40
        assert max(per_token[250:]) <= max(per_token[:250])
