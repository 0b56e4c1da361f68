"""The frozen values that the history hands out and takes in; no caller ever sees a database row.

Times are aware UTC, durations seconds, sizes bytes. Everything here is fit to be seen by whoever may
read the coordinator's database: what a site sent was released on purpose (see `shared.messages`).
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

RunStatus = Literal["pending", "running", "completed", "failed", "stopped"]
AttemptOutcome = Literal["completed", "failed", "stopped", "lost"]  # lost: died without a word
# exhausted: out of privacy budget; pending: at work when a buffered round ended
Outcome = Literal["ok", "refused", "failed", "timeout", "exhausted", "pending"]
Kind = Literal["join", "train", "evaluate"]
Part = Literal["train", "validation"]
EventLevel = Literal["info", "warning", "error"]
Origin = Literal["simulate", "daemon"]  # daemon: submitted to a coordinator's queue
ProgressKind = Literal["join", "train", "evaluate", "round", "run"]


@dataclass(frozen=True)
class Trial:
    """A run's place in a sweep: no other run has it."""

    sweep: str
    cell: int  # of the sweep's grid, from 1
    seed: int


@dataclass(frozen=True)
class Sweep:
    """A study: one scenario under many settings and seeds, a run each."""

    id: str
    name: str
    plan: dict[str, Any]  # what is varied and how, as JSON
    created_at: datetime
    version: str  # of Moonflower


@dataclass(frozen=True)
class Run:
    """One federated fine-tune, from its first round to its last, over as many attempts as it takes."""

    id: str
    name: str
    status: RunStatus
    config: dict[str, Any]  # the whole configuration, as JSON
    config_digest: str
    rounds_planned: int
    rounds_done: int
    private: bool  # False: run at epsilon inf; every report says so
    created_at: datetime
    finished_at: datetime | None
    version: str  # of Moonflower
    origin: Origin = "simulate"
    submitted_by: str | None = None  # the name of the token that it came with
    stop_requested_at: datetime | None = None
    trial: Trial | None = None  # where it is one of a sweep's


@dataclass(frozen=True)
class Attempt:
    """One process's try at a run. A process that died is a lost attempt, not a lost run."""

    run: str
    number: int  # from 1
    engine: str  # "in-process", "flower"
    started_at: datetime
    ended_at: datetime | None
    outcome: AttemptOutcome | None  # None while it runs
    error: str | None


@dataclass(frozen=True)
class Participation:
    """What one site did in one round, or why it did not."""

    site: str
    kind: Kind
    outcome: Outcome
    seconds: float
    bytes_down: int  # to the site
    bytes_up: int  # from the site
    error: str | None = None
    asked: int | None = None  # the round whose question this is about; None: its own


@dataclass(frozen=True)
class Metric:
    """One score after a round: of the public test set, or of what sites released.

    `low` and `high` bound the score at 95 % where noise was added to it; None where none was. `site` is
    None for the public test set and for the sum over sites.
    """

    scope: Literal["test", "validation"]
    site: str | None
    name: str  # "accuracy", "f1", "loss", "auc" ...
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Spend:
    """A site's privacy after a round, as the site reports it (its own ledger is the authority).

    `epsilon` is the run's so far, composed over all releases of this part; inf without privacy.
    """

    site: str
    dataset: str
    part: Part
    epsilon: float
    delta: float
    noise_multiplier: float
    sampling_rate: float
    steps: int  # noised sums released in this round
    budget: float  # the epsilon planned for the whole run
    mechanism: str = "gaussian"  # one of shared.messages.MECHANISMS
    noise_source: str = ""  # one of shared.messages.NOISE_SOURCES; empty here and below: not recorded
    gradients: str = ""  # one of shared.messages.GRADIENTS, of training
    ledger_id: str = ""  # of the dataset's account at the site
    ledger_number: int = 0  # of this release in that account, from 1; 0: not recorded
    ledger_head: str = ""  # digest of the account's event before it
    asked: int | None = None  # the round whose question the release answers; None: its own


@dataclass(frozen=True)
class Ledger:
    """The newest that the coordinator has seen of a dataset's account at a site, over all runs."""

    id: str
    site: str
    dataset: str
    number: int  # of its events: a later answer with a smaller one comes from an older copy
    simulated: bool  # born with its run, and ends with it
    run: str  # that saw it last


@dataclass(frozen=True)
class Checkpoint:
    """The global trainable arrays after a round, as a file named by its own SHA-256."""

    digest: str
    bytes: int


@dataclass(frozen=True)
class Round:
    """A committed round: all of it is in the database, its checkpoint on disk, or it did not happen."""

    run: str
    number: int  # from 1
    attempt: int
    phase: str  # "warm_start", "training", "refit"
    started_at: datetime
    seconds: float
    checkpoint: Checkpoint
    participations: tuple[Participation, ...] = field(default=(), repr=False)
    metrics: tuple[Metric, ...] = field(default=(), repr=False)
    spends: tuple[Spend, ...] = field(default=(), repr=False)
    simulated_seconds: float | None = None  # that it would have taken, where the sites' time is simulated


@dataclass(frozen=True)
class Event:
    """Something a person may want to know about a run: an attempt, a refusal, a resume."""

    run: str
    at: datetime
    level: EventLevel
    text: str


@dataclass(frozen=True)
class SiteKey:
    """A key that a site's node proves itself with. A site has one that lives; a revoked one stays revoked."""

    public_key: str  # one line of OpenSSH, without its comment
    site: str
    enrolled_at: datetime
    revoked_at: datetime | None
    node_id: int | None  # what Flower calls the node, once it is known


@dataclass(frozen=True)
class Progress:
    """Something that a watcher of a run is told, as it happens; best effort, and no part of the record."""

    id: int  # grows within a run: what comes after it is asked for by it
    run: str
    at: datetime
    round: int  # 0 outside of the rounds
    kind: ProgressKind
    site: str | None  # None: of no single site
    # Of a site: asked, ok, refused, failed, timeout, exhausted, late; of a round: started, committed; of a run:
    # joined, started, stopping, and how an attempt ended.
    state: str
    text: str | None
