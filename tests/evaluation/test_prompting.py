"""How questions are put to the model, word for word."""

from transformers import PreTrainedTokenizerBase

from lesft_client.data import Sample, encode_prompt
from lesft_client.data.prompts import base_prompt, with_choices
from lesft_client.evaluation.benchmark import split_prompt
from lesft_client.evaluation.prompting import HARNESS_STOP, make_prompt, prompt_fingerprint

INSTRUCTION = "Solve the following problem step by step. End with a last line `#### <number>`."


def number(n: int) -> Sample:
    return Sample(base_prompt(f"Double {n}?", "number"), f"It is {2 * n}.\n#### {2 * n}", "", "2")


def choice(n: int) -> Sample:
    text = with_choices(f"Which is {n}?", {"A": "one", "B": "two"})
    return Sample(base_prompt(text, "letter of the right choice"), "So B.\n#### B", "", "B")


ONE, TWO = split_prompt(number(1)), split_prompt(number(2))
FIRST, SECOND = split_prompt(choice(1)), split_prompt(choice(2))


def test_without_examples_the_chat_prompt_is_that_of_the_training(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    prompt = make_prompt(ONE, [], "chat", False, tokenizer)
    assert prompt.ids == encode_prompt(ONE.sample.prompt, tokenizer)
    assert prompt.stop == ()
    assert prompt.continuations == {}


def test_examples_are_earlier_turns_of_the_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = make_prompt(ONE, [TWO], "chat", False, tokenizer)
    assert tokenizer.decode(prompt.ids) == (
        f"<user>{INSTRUCTION}\n\nDouble 2?</s><assistant>It is 4.\n#### 4</s>"
        f"<user>{INSTRUCTION}\n\nDouble 1?</s><assistant>"
    )


def test_without_a_template_the_next_instruction_ends_the_answer(
    plain_tokenizer: PreTrainedTokenizerBase,
) -> None:
    prompt = make_prompt(ONE, [TWO], "chat", False, plain_tokenizer)
    assert plain_tokenizer.decode(prompt.ids) == (
        f"{INSTRUCTION}\n\nDouble 2?\n\nIt is 4.\n#### 4\n\n{INSTRUCTION}\n\nDouble 1?\n\n"
    )
    assert prompt.stop == ("Solve the following problem step by step",)


def test_the_harness_has_plain_text_and_its_stop_strings(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    prompt = make_prompt(ONE, [TWO], "harness", False, tokenizer)
    assert tokenizer.decode(prompt.ids) == (
        "Question: Double 2?\nAnswer: It is 4.\n#### 4\n\nQuestion: Double 1?\nAnswer:"
    )
    assert prompt.stop == HARNESS_STOP == ("Question:", "</s>", "<|im_end|>")


def test_the_harness_lists_choices_and_compares_letters_after_a_space(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    prompt = make_prompt(FIRST, [SECOND], "harness", True, tokenizer)
    assert tokenizer.decode(prompt.ids) == (
        "Question: Which is 2?\nA. one\nB. two\nAnswer: B\n\n"
        "Question: Which is 1?\nA. one\nB. two\nAnswer:"
    )
    letters = {key: tokenizer.decode(ids) for key, ids in prompt.continuations.items()}
    assert letters == {"A": " A", "B": " B"}


def test_in_a_chat_the_answer_lines_are_compared(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = make_prompt(FIRST, [SECOND], "chat", True, tokenizer)
    letters = {key: tokenizer.decode(ids) for key, ids in prompt.continuations.items()}
    assert letters == {"A": "#### A", "B": "#### B"}
    assert "<assistant>#### B</s>" in tokenizer.decode(prompt.ids)
    assert prompt.longest_continuation == len(prompt.continuations["A"])


def test_the_digest_tells_prompts_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    digests = {
        make_prompt(question, shots, style, scored, tokenizer).digest
        for question in (FIRST, SECOND)
        for shots in ([], [ONE])
        for style in ("chat", "harness")
        for scored in (False, True)
    }
    assert len(digests) == 16


def test_the_fingerprint_is_of_wording_template_and_examples(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    first = prompt_fingerprint([ONE], "chat", False, tokenizer)
    assert first == prompt_fingerprint([ONE], "chat", False, tokenizer)
    others = [
        prompt_fingerprint([TWO], "chat", False, tokenizer),
        prompt_fingerprint([ONE], "harness", False, tokenizer),
        prompt_fingerprint([ONE], "chat", True, tokenizer),
    ]
    tokenizer.chat_template = f"Be brief.{tokenizer.chat_template}"
    others.append(prompt_fingerprint([ONE], "chat", False, tokenizer))
    assert len({first, *others}) == 5
