"""What the command does when the teacher fails, for a while or for good."""

import time
from email.utils import formatdate
from pathlib import Path

import pytest

from lesft.errors import InvalidInput, Unreachable
from tests.distillation.fake_teacher import BROKEN_CONNECTION, Reply, says, serving
from tests.distillation.harness import made, make_folder, meta, number_in, right, run, settings_for

FULL = Reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.4"})


@pytest.mark.parametrize(
    "failure",
    [
        Reply(500, {"error": "out of memory"}),
        Reply(503, "<html>starting</html>"),
        Reply(408, {}),
        Reply(429, {}),
        BROKEN_CONNECTION,
        Reply(200, "<html>log in</html>"),
        Reply(200, {"error": {"message": "overloaded"}}),
        Reply(200, [1]),
    ],
)
def test_a_failure_that_passes_costs_no_try(tmp_path: Path, failure: Reply) -> None:
    with serving(lambda prompt, before: failure if before < 2 else right(prompt)) as teacher:
        settings = settings_for(make_folder(tmp_path / "data", 3), teacher.url, tries=1)
        run(settings)
        assert len(teacher.bodies) == 9
    assert meta(settings)["questions"]["kept_by_try"] == {"1": 3}
    assert len(made(settings)) == 3


def test_the_same_seed_is_sent_again_after_a_failure(tmp_path: Path) -> None:
    with serving(lambda prompt, before: right(prompt) if before else Reply(500, {})) as teacher:
        run(settings_for(make_folder(tmp_path / "data", 1), teacher.url))
    assert teacher.bodies[0] == teacher.bodies[1]


def test_a_silent_teacher_is_asked_again(tmp_path: Path) -> None:
    def script(prompt: str, before: int) -> Reply:
        if not before:
            time.sleep(0.6)
        return right(prompt)

    with serving(script) as teacher:
        settings = settings_for(make_folder(tmp_path / "data", 1), teacher.url, timeout_seconds=0.3)
        run(settings)
        assert len(teacher.bodies) == 2
    assert len(made(settings)) == 1


def test_retry_after_holds_back_every_request(tmp_path: Path) -> None:
    times: list[float] = []

    def script(prompt: str, before: int) -> Reply:
        times.append(time.monotonic())
        return FULL if len(times) == 1 else right(prompt)

    with serving(script) as teacher:
        run(settings_for(make_folder(tmp_path / "data", 4), teacher.url, concurrency=1))
    assert times[1] - times[0] >= 0.4
    assert len(times) == 5


def test_retry_after_may_be_a_date(tmp_path: Path) -> None:
    times: list[float] = []

    def script(prompt: str, before: int) -> Reply:
        times.append(time.monotonic())
        date = formatdate(time.time() + 1.999, usegmt=True)
        return right(prompt) if before else Reply(503, {}, {"Retry-After": date})

    with serving(script) as teacher:
        run(settings_for(make_folder(tmp_path / "data", 1), teacher.url))
    assert 0.9 <= times[1] - times[0] < 2.5


def test_the_rate_limit_counts_every_request(tmp_path: Path) -> None:
    times: list[float] = []

    def script(prompt: str, before: int) -> Reply:
        times.append(time.monotonic())
        return right(prompt) if before else says("Hm.")

    with serving(script) as teacher:
        # One a fifth of a second, after the first five at once.
        run(settings_for(make_folder(tmp_path / "data", 4), teacher.url, requests_per_minute=300))
    assert len(times) == 8
    assert 0.5 < times[-1] - times[0] < 1.5


def test_patience_ends_when_nothing_but_failures_comes(tmp_path: Path) -> None:
    with serving(lambda prompt, before: Reply(500, {"error": "broken"})) as teacher:
        settings = settings_for(
            make_folder(tmp_path / "data", 3), teacher.url, patience_seconds=0.3
        )
        with pytest.raises(Unreachable) as caught:
            run(settings)
    said = str(caught.value)
    assert said.startswith(f"the teacher {teacher.url} answers with status 500 (broken) (nothing ")
    assert "--patience-seconds tries longer" in said
    assert said.endswith("no question is done yet")
    assert not settings.progress_file.exists()


def test_nobody_there_is_unreachable(tmp_path: Path) -> None:
    with serving(lambda prompt, before: right(prompt)) as teacher:
        pass
    settings = settings_for(make_folder(tmp_path / "data", 1), teacher.url, patience_seconds=0.2)
    with pytest.raises(Unreachable, match="cannot be connected to"):
        run(settings)


def test_a_wait_beyond_patience_is_not_sat_through(tmp_path: Path) -> None:
    full = Reply(429, {"error": {"message": "quota used up"}}, {"Retry-After": "86400"})
    with serving(lambda prompt, before: full) as teacher:
        settings = settings_for(
            make_folder(tmp_path / "data", 20), teacher.url, patience_seconds=0.3
        )
        with pytest.raises(Unreachable, match="quota used up"):
            run(settings)
        assert len(teacher.bodies) <= 8


@pytest.mark.parametrize(
    ("reply", "key", "message"),
    [
        (
            Reply(401, {"error": {"message": "no key sk-12345"}}),
            "sk-12345",
            r"status 401 \(no key …\): the key that was given does not open it; set LESFT_CLIENT_T",
        ),
        (Reply(403, "<html>"), "", "status 403: it wants a key; set LESFT_CLIENT_TEACHER_KEY or"),
        (
            Reply(404, {"detail": "no such model"}),
            "",
            r"status 404 \(no such model\): --teacher-model 'large' is not there; it offers small",
        ),
        (Reply(400, {"error": {"message": "bad\nseed"}}), "", r"status 400 \(bad seed\): the requ"),
        (Reply(422, {"detail": [{"input": "twice 1"}]}), "", "status 422: the request will not"),
        (Reply(301, {}, {"Location": "/v2"}), "", "status 301: it has moved; give --teacher its"),
    ],
)
def test_what_no_repeating_would_change_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reply: Reply, key: str, message: str
) -> None:
    monkeypatch.setenv("LESFT_CLIENT_TEACHER_KEY", key)
    with serving(lambda prompt, before: reply) as teacher:
        folder = make_folder(tmp_path / "data", 1)
        with pytest.raises(InvalidInput, match=message) as caught:
            run(settings_for(folder, teacher.url, teacher_model="large"))
        assert len(teacher.bodies) == 1
    assert str(caught.value).startswith(f"the teacher {teacher.url} answers with status ")
    assert "sk-12345" not in str(caught.value)


def test_a_wrong_address_is_told_from_a_wrong_model(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data", 1)
    with serving(lambda prompt, before: Reply(404, {})) as teacher:
        with pytest.raises(InvalidInput, match="the model is on its list, so --teacher is not the"):
            run(settings_for(folder, teacher.url))
        teacher.models = Reply(404, "not found")
        with pytest.raises(InvalidInput, match="not the whole address"):
            run(settings_for(folder, teacher.url))


def test_the_question_is_not_quoted_back(tmp_path: Path) -> None:
    def script(prompt: str, before: int) -> Reply:
        return Reply(400, {"error": {"message": f"cannot take: {prompt}"}})

    with serving(script) as teacher, pytest.raises(InvalidInput) as caught:
        run(settings_for(make_folder(tmp_path / "data", 1), teacher.url))
    assert "cannot take: …" in str(caught.value)
    assert "twice" not in str(caught.value)


def test_a_question_that_is_too_long_is_given_up_alone(tmp_path: Path) -> None:
    too_long = {"error": {"message": "too much", "code": "context_length_exceeded"}}

    def script(prompt: str, before: int) -> Reply:
        return Reply(400, too_long) if number_in(prompt) == 2 else right(prompt)

    with serving(script) as teacher:
        settings = settings_for(make_folder(tmp_path / "data", 3), teacher.url)
        run(settings)
        assert len(teacher.bodies) == 3
    assert meta(settings)["answers_not_kept"] == {"refused": 1}
    assert {sample.answer for sample in made(settings)} == {"2", "6"}
