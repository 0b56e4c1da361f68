"""The schema's revisions: which one a database has, making a new one, and bringing an old one up.

Migrations alone make tables, so a fresh database and an upgraded one cannot differ. Alembic is loaded
only where there is something to migrate; the everyday check is one small query.
"""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import SQLAlchemyError

from server.history.engine import WRITES, connect, explain, file_of, masked, parse_url
from shared.errors import DatabaseError

if TYPE_CHECKING:
    from alembic.config import Config

MIGRATIONS = Path(__file__).parent / "migrations"
NEWEST = "0005"  # a test holds it to the newest file in migrations/versions
TABLE = "moonflower_revision"
LOCK = 0x6D6F6F6E  # of PostgreSQL's advisory locks, for whoever makes or upgrades the schema
ONE_AT_A_TIME = threading.Lock()  # Alembic keeps the migration that it runs in a module

State = Literal["empty", "foreign", "older", "newest", "newer"]


@dataclass(frozen=True)
class Status:
    """What schema a database has. `place` is its URL without the password."""

    place: str
    state: State
    revision: str | None
    newest: str


def alembic_config(connection: Connection) -> "Config":
    """Make Alembic's configuration; there is no alembic.ini to keep in step."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def status(url: str) -> Status:
    """Look at the database at `url`, without making or changing anything.

    Raises
    ------
    DatabaseError
        The database cannot be reached or read.
    """
    place = parse_url(url)
    file = file_of(place)
    if file is not None and not file.exists():
        return Status(masked(place), "empty", None, NEWEST)
    engine = connect(place)
    try:
        with engine.connect() as connection:
            return Status(masked(place), state(connection), revision(connection), NEWEST)
    except SQLAlchemyError as error:
        raise explain(error, place) from error
    finally:
        engine.dispose()


def upgrade(url: str) -> None:
    """Bring the database at `url` to the newest schema, making it if it is empty.

    Raises
    ------
    DatabaseError
        It cannot be reached, is newer than this Moonflower, or holds another program's tables.
    """
    engine = connect(parse_url(url))
    try:
        prepare(engine, upgrade=True, create=True)
    finally:
        engine.dispose()


def revision(connection: Connection) -> str | None:
    """Give the revision that the database says it has."""
    if not inspect(connection).has_table(TABLE):
        return None
    found: str | None = connection.scalar(text(f"SELECT version_num FROM {TABLE}"))  # noqa: S608
    return found


def state(connection: Connection) -> State:
    """Compare the database's schema with this version's."""
    found = revision(connection)
    if found is None:
        if not inspect(connection).get_table_names():
            return "empty"
        found = revision(connection)  # another process may have made the tables between the two looks
    if found == NEWEST:
        return "newest"
    if found is None:
        return "foreign"
    from alembic.script import ScriptDirectory

    known = {script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()}
    return "older" if found in known else "newer"


def prepare(engine: Engine, *, upgrade: bool, create: bool) -> None:
    """Make sure that the database has the newest schema, or say what to do.

    Raises
    ------
    DatabaseError
        The schema is older and `upgrade` is False, it is missing and `create` is False, it is newer, or
        not ours; or the driver failed.
    """
    file = file_of(engine.url)
    if file is not None and not file.exists() and not create:
        _refuse("empty", engine)
    wanted = {"empty"} if create else set()
    wanted |= {"older"} if upgrade else set()
    try:
        with engine.connect() as connection:
            found = state(connection)
        if found in wanted:
            _migrate(engine, wanted)
        else:
            _refuse(found, engine)
    except SQLAlchemyError as error:
        raise explain(error, engine.url) from error


def _refuse(found: State, engine: Engine) -> None:
    place = masked(engine.url)
    if found == "newest":
        return
    messages = {
        "empty": "holds no history yet; the first run makes it, or name another with --database",
        "foreign": "holds another program's tables; give Moonflower a database of its own",
        "older": f"has an older schema; back it up, then run `moonflower database upgrade --database {place}`",
        "newer": "has a newer schema than this version knows; install a newer Moonflower",
    }
    raise DatabaseError(f"The database {place} {messages[found]}.")


def _migrate(engine: Engine, wanted: set[str]) -> None:
    from alembic import command

    with engine.connect().execution_options(**WRITES) as connection:
        sqlite = connection.dialect.name == "sqlite"
        driver = connection.connection.driver_connection
        if sqlite and driver is not None:
            # A batch migration replaces a table by dropping it; the switch does nothing in a transaction.
            driver.execute("PRAGMA foreign_keys=OFF")
        with connection.begin():
            if not sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
            found = state(connection)  # again: another process may have been faster
            if found in wanted:
                with ONE_AT_A_TIME:
                    command.upgrade(alembic_config(connection), "head")
            else:
                _refuse(found, engine)
            if sqlite and (broken := connection.exec_driver_sql("PRAGMA foreign_key_check").first()):
                raise DatabaseError(f"The upgrade left table {broken[0]} with a broken key; nothing was kept.")
        if sqlite and driver is not None:
            driver.execute("PRAGMA foreign_keys=ON")
