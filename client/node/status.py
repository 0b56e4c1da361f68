"""What a node says of itself, in one file of its state folder: written whole or not at all, for the site's people."""

import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import ConfigError, NotFoundError

FILE = "status.json"
KEPT = 10  # last answers


@dataclass
class Answered:
    """One request, and how it was answered."""

    at: str
    run: str
    round: int
    kind: str
    outcome: str  # "ok", "refused", "exhausted" or "failed"
    reason: str
    seconds: float


@dataclass
class Status:
    """A node's own words. Times are ISO 8601, UTC; None is "not now"."""

    site: str
    dataset: str
    coordinator: str
    address: str
    pid: int
    started_at: str
    connected_since: str | None = None
    trouble: str = ""
    task: dict[str, Any] | None = None  # run, round, kind and since of the request that is being answered
    answered: int = 0
    last_answers: list[Answered] = field(default_factory=list)  # the newest last
    last_error: str = ""
    worker: dict[str, Any] = field(default_factory=dict)  # pid, ready, starts
    supernode: dict[str, Any] = field(default_factory=dict)  # pid, starts


def write(state: Path, status: Status) -> None:
    """Write the status into a node's state folder."""
    with tempfile.NamedTemporaryFile("w", dir=state, prefix=".status-", delete=False, encoding="utf-8") as fresh:
        json.dump(asdict(status), fresh, indent=1)
    Path(fresh.name).replace(state / FILE)


def read(state: Path) -> Status:
    """Read a node's status.

    Raises
    ------
    NotFoundError
        Where no node has run with this state folder.
    ConfigError
        Where the file is not a status of this version.
    """
    try:
        values = json.loads((state / FILE).read_text(encoding="utf-8"))
        values["last_answers"] = [Answered(**answered) for answered in values["last_answers"]]
        return Status(**values)
    except FileNotFoundError:
        raise NotFoundError(f"{state} holds no status: no node has run with it; moonflower client start.") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{state / FILE} cannot be read ({error}); a node that is started writes it anew.") from None


def lines(status: Status, running: bool) -> list[str]:
    """Say the status in words."""
    said = [f"site {status.site}, dataset {status.dataset}"]
    if not running:
        said.append("node: not running; what follows is its last word")
    else:
        said.append(f"node: running since {minute(status.started_at)}, process {status.pid}")
    if status.connected_since and running:
        said.append(
            f"coordinator: {status.coordinator} at {status.address}, connected since {minute(status.connected_since)}"
        )
    else:
        said.append(f"coordinator: {status.coordinator} at {status.address}, not connected. {status.trouble}".rstrip())
    if status.task and running:
        task = status.task
        said.append(f"now: {task['kind']} of run {task['run']}, round {task['round']}, since {minute(task['since'])}")
    else:
        said.append("now: nothing")
    said.append(f"requests answered since it was started: {status.answered}")
    for answered in reversed(status.last_answers):
        where = f"run {answered.run}, round {answered.round}, {answered.kind}"
        reason = f": {answered.reason}" if answered.reason else ""
        said.append(f"  {minute(answered.at)}  {where}: {answered.outcome} after {answered.seconds:.1f} s{reason}")
    if status.last_error:
        said.append(f"last error: {status.last_error}")
    return said


def minute(at: str) -> str:
    """Shorten a time for a person."""
    return f"{at[:10]} {at[11:19]}Z"
