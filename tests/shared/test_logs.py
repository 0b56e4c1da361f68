import json
import logging
import re

import pytest

from shared import logs


@pytest.fixture(autouse=True)
def restore():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def fail(log: logging.Logger) -> None:
    try:
        raise ValueError("no\nway")
    except ValueError:
        log.exception("it failed", extra={"run": "r-1"})


def test_json_is_an_object_a_line_with_what_the_event_adds(capsys):
    logs.setup("json")
    fail(logging.getLogger("moonflower.x"))
    (line,) = capsys.readouterr().err.splitlines()
    values = json.loads(line)
    assert values.pop("error").endswith("ValueError: no\nway")
    assert values.pop("ts")
    assert values == {"level": "error", "logger": "moonflower.x", "message": "it failed", "run": "r-1"}


def test_text_is_one_line_an_event_with_its_time_a_traceback_too(capsys, monkeypatch):
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    logs.setup()
    fail(logging.getLogger("moonflower.x"))
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ERROR   moonflower\.x: it failed \| Traceback", line)


def test_the_journal_gets_the_level_and_no_time(capsys, monkeypatch):
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    logs.setup()
    logging.getLogger("moonflower.x").warning("two\nlines")
    assert capsys.readouterr().err == "<4>moonflower.x: two | lines\n"


def test_each_request_of_a_client_is_no_event(capsys):
    logs.setup()
    logging.getLogger("httpx").info("POST ...")
    assert capsys.readouterr().err == ""
