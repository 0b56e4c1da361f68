"""Which of a task's scores are shown first, and how they are called."""

from collections.abc import Iterable

TITLES = {  # the most telling first
    "accuracy": "accuracy",
    "entity_f1": "entity F1",
    "exact_match": "exact match",
    "wer": "word error rate",
    "chrf": "chrF",
    "rouge_l": "ROUGE-L",
    "f1": "F1",
    "f1_micro": "micro F1",
    "auc": "AUC",
    "pr_auc": "PR-AUC",
    "mcc": "MCC",
    "token_accuracy": "token accuracy",
    "perplexity": "perplexity",
}
LAST = ("loss",)
NO_SCORES = ("records", "generated_records")
THRESHOLD, HELD = "threshold/", "held/"  # before a label: where its threshold lies, and how many records have it


def telling(names: Iterable[str]) -> list[str]:
    """Sort scores' names: those known here in their order, others by name, the loss at the end; no counts among them."""
    order = list(TITLES)
    left = {name for name in names if name not in NO_SCORES and not name.startswith((THRESHOLD, HELD))}
    known = [name for name in order if name in left]
    return [*known, *sorted(left - {*known, *LAST}), *[name for name in LAST if name in left]]


def title(name: str) -> str:
    """What a score is called."""
    return TITLES.get(name, name.replace("_", " "))
