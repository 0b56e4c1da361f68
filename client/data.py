"""The site's dataset: read, check, split, tokenise.

Nothing of it leaves this module but examples for training and evaluation on this machine. A row that
breaks the declaration is an error with its number, before the site joins; the error stays at the site.
"""

import hashlib
import hmac
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from client.site import Dataset
from shared.errors import DataError, let_interrupts_through
from shared.run_config import Task
from shared.tasks.text_classification import NO_TOKENS, Examples, tokenise

log = logging.getLogger("moonflower.site")


@dataclass(frozen=True)
class Record:
    """One person's text, say: the unit of privacy."""

    id: str
    text: str
    label: int


@dataclass(frozen=True)
class Parts:
    """A site's records by part. A record is in one part for the dataset's whole life."""

    train: Examples
    validation: Examples


def read(dataset: Dataset, task: Task) -> list[Record]:
    """Read the records, each checked against what the site and the run declare.

    Raises
    ------
    DataError
        Naming the row: no JSON object, a missing column, an empty text, an undeclared label, an id twice.
    """
    labels = {label: number for number, label in enumerate(task.labels) if label in dataset.labels}
    records: list[Record] = []
    seen: set[str] = set()
    try:
        lines = dataset.path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # a text may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{dataset.path} cannot be read: {error}.") from None
    if lines == [""]:
        raise DataError(f"{dataset.path} holds no records.")
    for number, line in enumerate(lines, 1):
        record = _record(line, f"{dataset.path}, row {number}", dataset, labels)
        if record.id in seen:
            raise DataError(f"{dataset.path}, row {number}: id {record.id!r} stands twice; a record is one row.")
        seen.add(record.id)
        records.append(record)
    return records


def _record(line: str, where: str, dataset: Dataset, labels: dict[str, int]) -> Record:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(f"{where}: not a JSON object.") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: not a JSON object.")
    missing = {dataset.id_column, dataset.text_column, dataset.label_column} - row.keys()
    if missing:
        raise DataError(f"{where}: column {min(missing)!r} is missing; name the columns in site.toml, [dataset].")
    text, label = row[dataset.text_column], str(row[dataset.label_column])
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: {dataset.text_column!r} is empty.")
    if label not in labels:
        raise DataError(f"{where}: label {label!r} is not one of the declared {list(labels)}.")
    record_id = row[dataset.id_column]
    if isinstance(record_id, bool) or not isinstance(record_id, str | int):
        raise DataError(f"{where}: {dataset.id_column!r} is neither text nor a whole number.")
    try:
        f"{record_id}{text}".encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: half of a surrogate pair is no text.") from None
    return Record(str(record_id), text, labels[label])


def is_validation(record_id: str, key: bytes, share: float) -> bool:
    """Whether a record is kept for validation: a keyed hash of its own id and nothing else."""
    value = int.from_bytes(hmac.digest(key, record_id.encode(), "sha256")[:8], "big")
    return value < share * 2**64


def load(dataset: Dataset, task: Task, key: bytes, tokenizer: PreTrainedTokenizerBase) -> Parts:
    """Read, split and tokenise a site's records."""
    parts: dict[bool, list[Record]] = {False: [], True: []}
    for record in read(dataset, task):
        parts[is_validation(record.id, key, dataset.validation)].append(record)

    def examples(records: list[Record]) -> Examples:
        texts, labels = [record.text for record in records], [record.label for record in records]
        try:
            return tokenise(tokenizer, texts, labels, task.max_length)
        except Exception as error:  # one text that the tokenizer cannot take: nobody outside may notice
            let_interrupts_through(error)
            return _one_by_one(tokenizer, texts, labels, task.max_length)

    return Parts(examples(parts[False]), examples(parts[True]))


def _one_by_one(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], labels: Sequence[int], max_length: int
) -> Examples:
    """Tokenise each text alone; one that the run's tokenizer cannot take becomes a single token.

    A refusal would tell the coordinator, which chose the tokenizer, that some record has such a text.
    """
    found: list[tuple[int, ...]] = []
    for text, label in zip(texts, labels, strict=True):
        try:
            found += tokenise(tokenizer, [text], [label], max_length).tokens
        except Exception as error:
            let_interrupts_through(error)
            found.append(NO_TOKENS)
    log.warning("the tokenizer cannot take %d of %d texts", found.count(NO_TOKENS), len(texts))
    return Examples(tuple(found), tuple(labels))


def file_digest(path: Path) -> str:
    """SHA-256 of the records' file: what a warm process checks before it trusts what it has tokenised."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
