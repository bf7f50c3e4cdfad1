import json
import random
import subprocess
import sys
import time

import pytest

from tests.waiting import eventually


def line(number, url="/v1/completions", **body):
    asked = {"prompt": f"line {number}"} if url.endswith("/completions") and "chat" not in url else {}
    return {"custom_id": f"id-{number}", "method": "POST", "url": url, "body": {**asked, **body}}


@pytest.fixture
def files(tmp_path):
    """Write the lines of a batch; return the three files."""

    def write(lines):
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
        return tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "out.errors.jsonl"

    return write


def read(file):
    return {each["custom_id"]: each for each in map(json.loads, file.read_text().splitlines())}


def test_answers_and_errors_have_files_of_their_own(run, chat, files):
    talk = [{"role": "user", "content": "hi"}]
    lines = [
        line(1, max_tokens=2),
        line(2, "/v1/chat/completions", messages=talk),
        line(3, n=100),
        line(4, "/v1/files"),
    ]
    source, out, errors = files(lines)
    ran = run("batch", "-i", source, "-o", out, "chat", "--json")
    assert ran.status == 4
    assert ran.data == {"total": 4, "earlier": 0, "answered": 2, "failed": 2}
    answers = read(out)
    assert answers["id-1"]["response"]["body"]["choices"][0]["text"] == "line 1 "
    assert answers["id-2"]["response"]["body"]["choices"][0]["message"]["content"] == "user: hi "
    assert answers["id-2"]["error"] is None
    failed = read(errors)
    assert failed["id-3"]["error"]["param"] == "n"
    assert (failed["id-4"]["response"]["status_code"], failed["id-4"]["error"]["param"]) == (400, "url")
    again = run("batch", "-i", source, "-o", out, "chat", "--json")
    assert (again.status, again.data) == (0, {"total": 4, "earlier": 4, "answered": 0, "failed": 0})


def test_a_request_that_was_changed_is_asked_again(run, chat, files):
    source, out, _ = files([line(1), line(2)])
    run("batch", "-i", source, "-o", out, "chat")
    files([line(1), line(2, max_tokens=1)])
    assert run("batch", "-i", source, "-o", out, "chat", "--json").data["answered"] == 1
    assert read(out)["id-2"]["response"]["body"]["choices"][0]["text"] == "line "


def test_a_torn_last_line_is_cut_and_done_again(run, chat, files):
    source, out, _ = files([line(1), line(2)])
    run("batch", "-i", source, "-o", out, "chat", "--concurrency", 1)
    whole = out.read_text()
    out.write_text(whole[:-20])
    assert run("batch", "-i", source, "-o", out, "chat", "--json").data["answered"] == 1
    assert len(read(out)) == 2


def test_every_line_is_answered_exactly_once_however_often_it_is_killed(chat, files):
    count = 2000
    source, out, _ = files([line(number, max_tokens=3) for number in range(count)])
    command = [sys.executable, "-m", "mii_hpc", "batch", "-i", source, "-o", out, "chat", "--concurrency", "32"]
    draw = random.Random(7)
    for _ in range(5):
        enough = out.stat().st_size + draw.randint(10_000, 60_000) if out.exists() else 1
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as running:
            eventually(
                lambda r=running, size=enough: r.poll() is not None or (out.exists() and out.stat().st_size >= size)
            )
            time.sleep(draw.random() * 0.02)  # anywhere within a line, too
            running.kill()
    assert subprocess.run(command, stderr=subprocess.DEVNULL, timeout=120).returncode == 0
    answered = [json.loads(text)["custom_id"] for text in out.read_text().splitlines()]
    assert sorted(answered) == sorted(f"id-{number}" for number in range(count))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "line 1: the line: Invalid JSON"),
        ('{"custom_id": "a", "body": {}}', "line 1: url: Field required"),
        (json.dumps(line(1)) + "\n" + json.dumps(line(1)), "line 2: custom_id='id-1' is there before"),
    ],
)
def test_a_line_that_is_no_request_is_said_before_anything_is_asked(run, chat, files, text, said):
    source, out, _ = files([])
    source.write_text(text)
    ran = run("batch", "-i", source, "-o", out, "chat")
    assert ran.status == 2
    assert said in ran.errors
    assert not out.exists()


@pytest.mark.parametrize("notes", ["my notes\n", "my notes", '{"a": 1}\n'])
def test_somebody_elses_file_is_left_as_it_is(run, chat, files, notes):
    source, out, _ = files([line(1)])
    out.write_text(notes)
    ran = run("batch", "-i", source, "-o", out, "chat")
    assert (ran.status, out.read_text()) == (2, notes)
    assert "line 1 was not written by a batch" in ran.errors


@pytest.mark.parametrize("which", [(), ("chat", "--model", "x")])
def test_it_needs_a_deployment_or_something_to_serve(run, files, which):
    source, out, _ = files([line(1)])
    ran = run("batch", "-i", source, "-o", out, *which)
    assert (ran.status, "give a running deployment's name, or what to serve" in ran.errors) == (2, True)


def test_a_deployment_that_ends_stops_the_batch_which_goes_on_later(run, chat, files):
    source, out, errors = files([line(number) for number in range(20)])
    chat.do(chat.deployment.stop())
    assert run("batch", "-i", source, "-o", out, "chat").status == 3
    assert not out.exists()
    assert not errors.exists()
