import json
import re
import threading
import time
from pathlib import Path

import pytest

from lesft.errors import DataError, InvalidInput
from lesft.settings import load_settings
from lesft_client.data import Sample
from lesft_client.data.prompts import base_prompt, reference_prompt
from lesft_client.data_command import samples_of
from lesft_client.distillation.settings import DistillSettings
from tests.distillation.fake_teacher import Reply, says, serving
from tests.distillation.harness import (
    made,
    make_folder,
    meta,
    number_in,
    right,
    run,
    settings_for,
)


def test_right_answers_become_samples_that_train_reads(tmp_path: Path) -> None:
    with serving(lambda prompt, before: right(prompt)) as teacher:
        settings = settings_for(make_folder(tmp_path / "data", 3), teacher.url)
        run(settings)
    assert sorted(made(settings), key=lambda sample: sample.answer) == [
        Sample(
            prompt=base_prompt(f"How much is twice {n}?", "number"),
            target=f"It is 2 * {n}.\n#### {2 * n}",
            reference=reference_prompt(
                f"How much is twice {n}?", f"Add {n} and {n}.\n#### {2 * n}"
            ),
            answer=str(2 * n),
        )
        for n in (1, 2, 3)
    ]


def test_the_lines_are_in_the_order_of_the_questions(tmp_path: Path) -> None:
    five_at_once = threading.Barrier(5, timeout=10)

    def script(prompt: str, before: int) -> Reply:
        five_at_once.wait()
        time.sleep(number_in(prompt) % 5 * 0.01)
        return right(prompt)

    with serving(script) as teacher:
        settings = settings_for(make_folder(tmp_path / "data", 30), teacher.url, concurrency=5)
        run(settings)
        assert teacher.most_at_once == 5
    done = [json.loads(line) for line in settings.progress_file.read_text().splitlines()[1:]]
    assert [outcome["index"] for outcome in done] != list(range(30))
    lines = [json.loads(line) for line in settings.output.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [
        sample.prompt for sample in samples_of(settings, "train")
    ]


def test_the_teacher_is_asked_the_base_prompt_first_without_chance(tmp_path: Path) -> None:
    def second_time(prompt: str, before: int) -> Reply:
        return right(prompt) if before else says("No idea.\n#### 1")

    with serving(second_time) as teacher:
        settings = settings_for(
            make_folder(tmp_path / "data", 1), teacher.url, max_tokens=77, retry_temperature=0.9
        )
        run(settings)
    first, second = teacher.bodies
    assert teacher.paths == ["/v1/chat/completions"] * 2
    assert first["messages"] == [
        {"role": "user", "content": base_prompt("How much is twice 1?", "number")}
    ]
    assert (first["model"], first["max_tokens"], first["temperature"]) == ("small", 77, 0.0)
    assert second["temperature"] == 0.9
    assert 0 <= first["seed"] != second["seed"] < 2**31


def test_a_question_is_given_up_after_its_tries(tmp_path: Path) -> None:
    def script(prompt: str, before: int) -> Reply:
        n = number_in(prompt)
        if n == 1:
            return says("Surely\n#### 7")
        return right(prompt) if before == n - 2 else says("Hm.")

    with serving(script) as teacher:
        settings = settings_for(
            make_folder(tmp_path / "data", 4), teacher.url, tries=3, licence="Llama 3"
        )
        printed = run(settings)
        assert sorted(map(number_in, teacher.prompts())) == [1, 1, 1, 2, 3, 3, 4, 4, 4]
    found = meta(settings)
    assert found["questions"] == {
        "asked": 4,
        "kept": 3,
        "given_up": 1,
        "kept_by_try": {"1": 1, "2": 1, "3": 1},
    }
    assert found["answers_not_kept"] == {"wrong": 3, "unclear": 3}
    assert found["tokens"] == {"prompt": 90, "completion": 27}
    assert found["data"] == {"name": "gsm8k", "licence": "MIT"}
    assert found["teacher"] == {"address": teacher.url, "model": "small", "licence": "Llama 3"}
    assert {sample.answer for sample in made(settings)} == {"4", "6", "8"}
    assert "kept 3 of 4 questions, gave 1 up" in printed
    assert re.search(r"right at try +1: 1   2: 1   3: 1\n", printed)
    assert f"lesft-client train --data {settings.output} " in printed


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        (says("It is 2.\n#### 2", finish_reason="length"), "cut off"),
        (Reply(body={"choices": []}), "empty"),
        (says(None), "empty"),
        (Reply(body={"choices": ["text"]}), "empty"),
    ],
)
def test_answers_that_are_cut_off_or_empty_are_not_kept(
    tmp_path: Path, reply: Reply, fault: str
) -> None:
    with serving(lambda prompt, before: right(prompt) if before else reply) as teacher:
        settings = settings_for(make_folder(tmp_path / "data", 1), teacher.url)
        run(settings)
    assert meta(settings)["answers_not_kept"] == {fault: 1}
    assert made(settings)[0].target == "It is 2 * 1.\n#### 2"


def test_nothing_kept_is_an_error_that_says_why(tmp_path: Path) -> None:
    with serving(lambda prompt, before: says("So\n#### 0")) as teacher:
        settings = settings_for(make_folder(tmp_path / "data", 2), teacher.url, tries=2)
        with pytest.raises(DataError, match=r"none of the 2 questions .* \(wrong 4\)"):
            run(settings)
        with pytest.raises(DataError, match="none of the 2 questions"):
            run(settings)
        assert len(teacher.bodies) == 4
    assert not settings.output.exists()
    assert len(settings.progress_file.read_text().splitlines()) == 3


def test_neither_key_nor_texts_are_shown_or_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LESFT_CLIENT_TEACHER_KEY", "sk-very-secret")
    with serving(lambda prompt, before: right(prompt)) as teacher:
        address = teacher.url.replace("http://", "http://anna:hidden@") + "?token=hidden"
        settings = settings_for(make_folder(tmp_path / "data", 2), address)
        printed = run(settings)
    assert [headers["Authorization"] for headers in teacher.headers] == [
        "Bearer sk-very-secret"
    ] * 2
    assert teacher.paths == ["/v1/chat/completions?token=hidden"] * 2
    shown = printed + "".join(capfd.readouterr())
    written = settings.meta_file.read_text() + settings.progress_file.read_text()
    for secret in ("very-secret", "hidden", "anna"):
        assert secret not in shown + written
    assert "twice" not in shown
    assert "2 *" not in shown


def test_user_and_password_of_the_address_are_used(tmp_path: Path) -> None:
    with serving(lambda prompt, before: right(prompt)) as teacher:
        address = teacher.url.replace("http://", "http://anna:hidden@")
        run(settings_for(make_folder(tmp_path / "data", 1), address))
    assert teacher.headers[0]["Authorization"] == "Basic YW5uYTpoaWRkZW4="


def test_samples_without_an_answer_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "Write a poem.", "target": "Roses", "reference": "Of roses."}\n')
    with pytest.raises(DataError, match=r'^1 of 1 samples of --data .* have no "answer"'):
        run(settings_for(tmp_path, "http://127.0.0.1:9/v1", data=str(file)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.jsonl"]


def test_a_file_that_this_command_has_not_made_is_not_overwritten(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data", 1)
    settings = settings_for(folder, "http://127.0.0.1:9/v1")
    settings.output.write_text("precious")
    with pytest.raises(InvalidInput, match=r"out\.jsonl is there already, without the out\.progr"):
        run(settings)
    assert settings.output.read_text() == "precious"


def test_only_the_asked_for_share_is_asked(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data", 10)
    asked: list[int] = []
    for share in ("1/2", "2/2"):
        with serving(lambda prompt, before: right(prompt)) as teacher:
            output = tmp_path / f"{share[0]}.jsonl"
            run(settings_for(folder, teacher.url, samples=4, share=share, output=output))
            asked += map(number_in, teacher.prompts())
    assert len(asked) == len(set(asked)) == 8


def test_settings_come_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LESFT_CLIENT_TEACHER_KEY", "secret")
    monkeypatch.setenv("LESFT_CLIENT_TEACHER_MODEL", "big")
    line = "--data gsm8k --teacher http://h:1/v1 --output a.b.jsonl --tries 2"
    settings = load_settings(DistillSettings, "lesft-client distill", line.split())
    assert (settings.teacher_model, settings.tries, settings.split) == ("big", 2, "train")
    assert settings.progress_file == Path("a.b.progress.jsonl")
    assert settings.meta_file == Path("a.b.meta.json")
    assert "secret" not in repr(settings)


def test_an_output_that_is_no_jsonl_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    line = "--data gsm8k --teacher http://h:1/v1 --teacher-model m --output out.json"
    with pytest.raises(SystemExit):
        load_settings(DistillSettings, "lesft-client distill", line.split())
    assert "--output: must end in .jsonl" in capsys.readouterr().err
