"""Which coordinator a command talks to: options before the environment, the environment before the profile."""

from pathlib import Path

import pytest

from server.control import target
from server.control.target import Target
from shared.errors import ConfigError

PROFILES = """
default = "north"
[servers.north]
address = "north.example.org:9444"
ca = "north.pem"
token_file = "tokens/north"
[servers.south]
address = "south.example.org:9444"
"""


@pytest.fixture
def kit(moonflower_home, monkeypatch):
    for name in ("SERVER", "CA", "TOKEN", "SERVERS"):
        monkeypatch.delenv(f"MOONFLOWER_{name}", raising=False)
    (moonflower_home / "tokens").mkdir(parents=True)
    (moonflower_home / "servers.toml").write_text(PROFILES, encoding="utf-8")
    (moonflower_home / "north.pem").write_bytes(b"authority")
    (moonflower_home / "other.pem").write_bytes(b"other")
    (moonflower_home / "tokens" / "north").write_text(" secret\n", encoding="utf-8")
    return moonflower_home


def find(server=None, ca=None, token_file=None, insecure=False):
    return target.find(server, ca, token_file, insecure=insecure)


def test_the_profile_is_taken_with_paths_relative_to_it(kit, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    expected = Target("north.example.org:9444", b"authority", "secret", str(kit / "north.pem"))
    assert find() == find("north") == expected
    monkeypatch.setenv("MOONFLOWER_SERVERS", str(kit / "servers.toml"))
    monkeypatch.setenv("MOONFLOWER_HOME", str(tmp_path / "elsewhere"))
    assert find() == expected
    assert (expected.host, expected.port) == ("north.example.org", 9444)


def test_the_environment_comes_before_the_profile_and_options_before_both(kit, monkeypatch):
    monkeypatch.setenv("MOONFLOWER_SERVER", "other.example.org:1")
    monkeypatch.setenv("MOONFLOWER_CA", str(kit / "other.pem"))
    monkeypatch.setenv("MOONFLOWER_TOKEN", "theirs")
    assert find() == Target("other.example.org:1", b"other", "theirs", str(kit / "other.pem"))
    chosen = find("third.example.org:2", kit / "north.pem", kit / "tokens" / "north")
    assert chosen == Target("third.example.org:2", b"authority", "secret", str(kit / "north.pem"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"server": "west"}, r"server='west' is not in .*servers.toml; it has north, south."),
        ({"server": "south"}, r"south.example.org:9444: its authority is not known; give --ca"),
        ({"server": "h:1", "ca": "north.pem"}, r"h:1: no token; give --token-file, or set MOONFLOWER_TOKEN"),
        ({"server": "h:x", "ca": "north.pem"}, r"server='h:x' must be HOST:PORT"),
        ({"server": "h:70000"}, r"server='h:70000' must be HOST:PORT"),
        ({"ca": "none.pem"}, r"the authority's certificate cannot be read: .*none.pem: No such file"),
        ({"token_file": "servers.toml"}, r"the token must be one word of ASCII"),
        ({"server": "h:1", "insecure": True}, r"--insecure is plaintext and only for this machine; h:1 is another"),
    ],
)
def test_what_is_missing_or_wrong_is_named(kit, given, said):
    given = {name: kit / value if name in {"ca", "token_file"} else value for name, value in given.items()}
    with pytest.raises(ConfigError, match=said):
        find(**given)


def test_no_server_at_all_says_where_one_is_named(kit, monkeypatch, tmp_path):
    monkeypatch.setenv("MOONFLOWER_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no server is named; give --server HOST:PORT, or set MOONFLOWER_SERVER"):
        find()
    (tmp_path / "servers.toml").write_text("servers = 3", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"servers.toml: servers=3"):
        find()


def test_a_token_is_in_no_representation(kit):
    assert "secret" not in repr(find())
    assert Path(find().source) == kit / "north.pem"
