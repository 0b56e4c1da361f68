"""The words of a statement: what the promise is, what is public, what is assumed, and what is not covered.

Each line says one thing that holds for any run, or for this one where the recorded releases say so.
"""

from dataclasses import fields
from importlib.metadata import version

from server.privacy.records import Statement
from shared.messages import REPLIES

UNITS = {
    "record": "one record of a site's dataset",
    "person": "one person of a site's dataset, with all their records",
}
NEIGHBOURS = {"record": "add or remove one record", "person": "add or remove one person, with all their records"}

PUBLIC = {  # what a site's replies hold besides what is released; every field marked public is here
    "site": "the site's name",
    "dataset": "the dataset's declared id",
    "unit": "whom the promise is made to: a record or a person",
    "records": "the declared, rounded number of them",
    "validation": "the share of them kept for validation",
    "round": "the round that is answered",
    "sampling_rate": "the sampling rate",
    "noise_multiplier": "the noise multiplier",
    "steps": "how many noised sums an answer holds",
    "epsilon": "epsilon spent so far",
    "mechanism": "the mechanism",
    "noise_source": "where the noise came from",
    "gradients": "how each record's gradient was had",
    "ledger_id": "the ledger account's random name",
    "ledger_number": "the number of its events, over all runs",
    "ledger_head": "the digest of its last event",
    "outcome": "that a request was refused, failed or found the budget spent",
    "reason": "why, where that rests on public values; a fixed sentence otherwise",
}
RELEASED = {
    "update": "the noised sum of clipped gradients, as an update of the trained arrays",
    "histogram": "the noised counts of how the model does on validation records (of a classifier: true label, predicted label, confidence)",
}
SOURCES = {
    "aes-256-ctr": "AES-256 in counter mode, keyed by the operating system's entropy",
    "device": "the accelerator's own generator, which is not a cryptographic one",
    "none": "no noise",
    "": "not recorded (an answer that was lost, or a history from before releases named it)",
}
MECHANISMS = {
    "gaussian": "continuous Gaussian noise on a sum of clipped vectors",
    "discrete-gaussian": "discrete Gaussian noise on a sum of clipped vectors, rounded to a public grid",
    "none": "no noise",
}


def mechanisms(statement: Statement) -> list[str]:
    """Name the mechanisms that the run's releases were made by."""
    used = {sums.mechanism for account in statement.accounts for sums in account.releases}
    return [MECHANISMS.get(name, f"{name!r}, which is not known here") for name in sorted(used)]


def sources(statement: Statement) -> list[str]:
    """Name where the noise came from."""
    used = {sums.noise_source for account in statement.accounts for sums in account.releases}
    return [SOURCES.get(name, f"{name!r}, which is not known here") for name in sorted(used)]


def unit(statement: Statement) -> str:
    """Say whom the promise is made to."""
    return UNITS[statement.unit]


def neighbours(statement: Statement) -> str:
    """Say which two datasets are held against each other."""
    return NEIGHBOURS[statement.unit]


def sampling(statement: Statement) -> list[str]:
    """Say how records, or persons, were drawn, as it ran."""
    unit, most = statement.unit, statement.records_per_person
    lines = [
        f"Poisson sampling: every step draws each training {unit} on its own, at the public rate that stands with the release.",
        "A step that draws nobody is released all the same, as noise alone, and is accounted.",
        f"The divisor of an averaged gradient is the public expected batch (rate x declared training {unit}s), never the drawn one.",
        f"A histogram is over all validation {unit}s: rate 1.",
    ]
    if unit == "person":
        lines += [
            f"Of a person who is drawn, a step takes at most {most} records, chosen at random from that person's alone; the "
            "gradient of their mean loss is clipped once.",
            "In a histogram all of a person's records together weigh as one.",
        ]
    return lines


def accountant(statement: Statement) -> list[str]:
    """Say how epsilon was composed."""
    used = {sums.mechanism for account in statement.accounts for sums in account.releases}
    lines = []
    if used - {"discrete-gaussian"}:
        lines.append(
            f"A run, planned before its first step: privacy-loss distributions, dp-accounting {version('dp-accounting')}."
        )
    if "discrete-gaussian" in used:
        lines.append("A run with discrete noise: Rényi divergences at integer orders, the smallest epsilon over them.")
    lines.append(
        "A dataset's life, over all runs: a Rényi filter at an order fixed when its account was opened, held by the site."
    )
    lines.append("Epsilon is composed here from the recorded releases; what a site reported is only compared with it.")
    return lines


def public(kind: str) -> dict[str, list[str]]:
    """Give the fields that leave a site with each kind of mark, by reply."""
    return {
        reply.__name__: [item.name for item in fields(reply) if item.metadata.get("leaves") == kind]
        for reply in REPLIES
    }


def assumed(statement: Statement) -> list[str]:
    """Say what the claim rests on and does not prove."""
    unit = statement.unit
    held = (
        [
            "No person has records at two sites. Where one has, the sites' epsilons add up for that person.",
            "A person, with all records, is in training or in validation for the dataset's whole life, by a keyed hash of who it "
            "is: the parts do not add up.",
            "The column that a site names says whose a record is, rightly, and the same for all of a person's records. Who is in "
            "it under two names is two persons.",
        ]
        if unit == "person"
        else [
            "Sites share no record. Where two hold the same one, their epsilons add up for it.",
            "A record is a train or a validation record for the dataset's whole life, by a keyed hash of its id: the parts do not add up.",
        ]
    )
    lines = [
        *held,
        "The sites run this software as it is, and keep their ledgers and keys.",
        "AES-256 cannot be told from randomness, and the operating system's entropy cannot be guessed.",
        f"Clipping bounds each {unit}'s part in a sum: a probe on made-up records checks it before every release, to float32's rounding.",
    ]
    if any(sums.noise_source == "device" for account in statement.accounts for sums in account.releases):
        lines.append("The accelerator's own generator cannot be predicted: its state is smaller than a key's.")
    if not statement.verifications:
        lines.append("The history is what the sites sent: no site's ledger was compared with it (--verify).")
    return lines


def not_covered(statement: Statement) -> list[str]:
    """Say what the claim leaves out."""
    used = {sums.mechanism for account in statement.accounts for sums in account.releases}
    several = (
        "Whom else a person's records are about, and persons with records at several sites: there the sites' epsilons add up."
        if statement.unit == "person"
        else "A person with several records: for k records of one person epsilon is up to k times as large, and delta grows too."
    )
    lines = [
        "Tuning: other runs on the same datasets, and the choice among them. Each spends on its own; a site's ledger has their sum.",
        several,
        "How long a site takes, how much memory it uses, and whether its process dies.",
        "What a site declares, and that it takes part.",
        "The public test set, and the model's starting weights.",
    ]
    if "gaussian" in used:
        lines.append(
            "The lowest bits of continuous Gaussian noise in floating point (Mironov 2012); discrete noise has none of them."
        )
    return lines
