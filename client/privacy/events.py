"""What an account is made of: the questions that a site answers, and what each answer spent or may spend."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from shared.accounting import Release

Part = Literal["train", "validation"]
PARTS: tuple[Part, Part] = ("train", "validation")


@dataclass(frozen=True)
class Question:
    """A request that a site answers once.

    Attributes
    ----------
    name, digest
        Its id within the run, and the SHA-256 of all that decides the answer.
    kind, part
        "train" or "evaluate", and the part of the dataset that the answer is drawn from.
    """

    run: str
    name: str
    digest: str
    round: int
    kind: str
    part: Part


@dataclass(frozen=True)
class Spend:
    """One charged reply: what it answered and what it released, its place in the chain, and when."""

    number: int
    question: Question
    release: Release
    at: datetime
    previous: str
    row: str


@dataclass(frozen=True)
class Reservation:
    """A round that is being computed: what it may release, since when, and whether who computes it still lives."""

    question: Question
    release: Release
    at: datetime
    alive: bool


def question_of(row: dict[str, Any]) -> Question:
    """Read a row's question."""
    return Question(row["run"], row["request"], row["digest"], row["round"], row["kind"], row["part"])


def release_of(row: dict[str, Any]) -> Release:
    """Read a row's release."""
    return Release(row["sampling_rate"], row["noise_multiplier"], row["steps"], row["mechanism"])
