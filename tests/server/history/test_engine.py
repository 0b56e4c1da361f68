"""What a person reads when the database cannot be used: one line, a remedy, and no password."""

import pytest

from server.history.engine import connect, masked, parse_url
from server.history.store import History
from shared.errors import DatabaseError


def message_of(call, *arguments):
    with pytest.raises(DatabaseError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "cannot be read; use sqlite:///PATH or postgresql://"),
        ("history.db", "cannot be read; use sqlite:///PATH"),
        ("s3cret@host", "cannot be read; use sqlite:///PATH"),
        ("postgresql://u:s3cret@host:port/x", "cannot be read; use sqlite:///PATH"),
        ("mysql://u:s3cret@host/x", "'mysql' is not supported; use sqlite:///PATH"),
        ("postgresql+asyncpg://u:s3cret@host/x", "'postgresql+asyncpg' is not supported"),
        (
            "postgresql://u:s3cret@127.0.0.1:1/x",
            "postgresql://u:***@127.0.0.1:1/x: the server does not answer",
        ),
        ("postgresql://u@127.0.0.1:1/x?password=s3cret", "the server does not answer"),
        ("postgresql://u:s3cret@no-such-host.invalid/x", "host's name is not known"),
    ],
)
def test_a_url_that_leads_nowhere_gets_one_line_without_its_password(url, said):
    for call in (History.open, History.upgrade, History.current_revision):
        message = message_of(call, url)
        assert said in message
        assert "s3cret" not in message


def test_a_missing_folder_is_named(tmp_path):
    message = message_of(History.open, f"sqlite:///{tmp_path / 'nowhere' / 'history.db'}")
    assert f"The folder '{tmp_path / 'nowhere'}' of the database does not exist; make it first." == message


def test_a_folder_is_not_a_database(tmp_path):
    assert "cannot be opened; check the path" in message_of(History.open, f"sqlite:///{tmp_path}")


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("Dear diary, " * 500)
    for call in (History.open, History.upgrade, History.current_revision):
        assert "not a SQLite database; name another file" in message_of(call, f"sqlite:///{file}")
    assert file.read_text() == "Dear diary, " * 500


def test_a_damaged_database_says_so(tmp_path, new_run, new_round):
    file = tmp_path / "history.db"
    with History.open(f"sqlite:///{file}") as history:
        new_run(history)
        for number in range(1, 20):
            history.commit_round(new_round(number))
    content = bytearray(file.read_bytes())
    content[4096 * 2 :] = b"\x5a" * (len(content) - 4096 * 2)
    file.write_bytes(content)

    def read(url):
        with History.open(url) as history:
            history.participations("lungs-1")

    assert "the file is damaged; restore it from a backup" in message_of(read, f"sqlite:///{file}")


def test_an_unknown_postgresql_database_is_named(postgres):
    message = message_of(History.open, postgres.replace("/postgres?", "/nowhere?"))
    assert "the server knows no such database, user or table" in message


def test_plain_postgresql_urls_reach_psycopg():
    assert parse_url("postgresql://u@h/x").drivername == "postgresql+psycopg"
    assert parse_url("postgresql+psycopg://u@h/x").drivername == "postgresql+psycopg"


def test_a_masked_url_shows_no_password_in_either_place():
    shown = masked(parse_url("postgresql://u:s3cret@h/x?password=s3cret&sslmode=require"))
    assert shown == "postgresql://u:***@h/x?password=%2A%2A%2A&sslmode=require"


def test_a_postgresql_whose_machine_is_gone_is_noticed_within_a_minute(postgres_url):
    engine = connect(parse_url(postgres_url))
    with engine.connect() as connection:
        held = connection.connection.driver_connection.info.get_parameters()
    engine.dispose()
    assert int(held["tcp_user_timeout"]) <= 60_000
    assert int(held["keepalives_idle"]) + int(held["keepalives_interval"]) * int(held["keepalives_count"]) <= 60
