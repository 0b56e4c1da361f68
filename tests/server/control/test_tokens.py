"""Tokens: who is let in, as what, and until when."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.control import tokens
from server.control.tokens import Token, TokenError, TokenFile, Tokens
from shared.certificates import write_key
from shared.errors import ConfigError

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


def file_of(path: Path, *known: Token) -> Path:
    write_key(path, TokenFile(tokens=known).content())
    return path


def test_a_secret_is_known_again_and_only_its_digest_is_kept(tmp_path: Path) -> None:
    token, secret = tokens.new("ada", "admin", 30, NOW)
    other, _ = tokens.new("ben", "viewer", 30, NOW)
    path = file_of(tmp_path / "tokens.json", other, token)
    assert Tokens.load(path).authenticate(secret, NOW) == token
    kept = path.read_text()
    assert secret not in kept
    assert secret.removeprefix(tokens.PREFIX) not in kept
    assert hashlib.sha256(secret.encode()).hexdigest() in kept


def test_secrets_are_32_random_bytes_and_differ() -> None:
    made = {tokens.new("ada", "admin", 1)[1] for _ in range(100)}
    assert len(made) == 100
    assert all(len(secret) == len(tokens.PREFIX) + 43 for secret in made)  # 32 bytes in base64


def test_a_viewer_may_look_and_nothing_else() -> None:
    viewer, admin = tokens.new("ben", "viewer", 1)[0], tokens.new("ada", "admin", 1)[0]
    assert viewer.allows("viewer")
    assert not viewer.allows("admin")
    assert admin.allows("viewer")
    assert admin.allows("admin")


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    path = tmp_path_factory.mktemp("tokens") / "tokens.json"
    return Tokens.load(file_of(path, tokens.new("ada", "admin", 30, NOW)[0]))


@given(text=st.text(st.characters(), max_size=80))
def test_no_other_text_is_let_in(known: Tokens, text: str) -> None:
    with pytest.raises(TokenError, match="unknown token"):
        known.authenticate(text, NOW)


def test_a_token_holds_to_its_last_second_and_no_longer(tmp_path: Path) -> None:
    token, secret = tokens.new("ada", "admin", 30, NOW)
    known = Tokens.load(file_of(tmp_path / "tokens.json", token))
    end = NOW + timedelta(days=30)
    assert known.authenticate(secret, end - timedelta(seconds=1)) == token
    for late in (end, end + timedelta(days=1)):
        with pytest.raises(TokenError, match=r"'ada' expired at 2026-12-22 12:00 UTC"):
            known.authenticate(secret, late)


def test_a_revocation_holds_from_the_next_call(tmp_path: Path) -> None:
    token, secret = tokens.new("ada", "admin", 30, NOW)
    path = file_of(tmp_path / "tokens.json", token)
    known = Tokens.load(path)
    assert known.authenticate(secret, NOW) == token
    file_of(path, token.model_copy(update={"revoked": True}))
    with pytest.raises(TokenError, match=r"'ada' has been revoked"):
        known.authenticate(secret, NOW)
    fresh, its_secret = tokens.new("ada", "viewer", 30, NOW)
    file_of(path, token.model_copy(update={"revoked": True}), fresh)
    assert known.authenticate(its_secret, NOW) == fresh


@pytest.mark.parametrize("content", [None, "", "{}x", '{"tokens": [{"name": "ada"}]}', '{"tokens": [], "more": 1}'])
def test_a_file_that_broke_lets_nobody_in(tmp_path: Path, content: str | None) -> None:
    token, secret = tokens.new("ada", "admin", 30, NOW)
    path = file_of(tmp_path / "tokens.json", token)
    known = Tokens.load(path)
    path.unlink()
    if content is not None:
        path.write_text(content)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"tokens\.json"):
            known.authenticate(secret, NOW)
    with pytest.raises(ConfigError, match=r"tokens\.json"):
        Tokens.load(path)
    file_of(path, token)
    assert known.authenticate(secret, NOW) == token


@pytest.mark.parametrize("name", ["", "Ada", "ada/../x", "ada\n"])
def test_a_name_is_a_name(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        tokens.new(name, "admin", 30, NOW)


def test_threads_share_the_tokens_while_the_file_changes(tmp_path: Path) -> None:
    token, secret = tokens.new("ada", "admin", 30, NOW)
    path = file_of(tmp_path / "tokens.json", token)
    known = Tokens.load(path)

    def ask(number: int) -> Token:
        if number % 10 == 0:
            file_of(path, token, tokens.new("ben", "viewer", 30, NOW)[0])
        return known.authenticate(secret, NOW)

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, range(200))) == {token}
