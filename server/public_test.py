"""The public test records as a file: JSON lines of `text` and `label`. Nothing here needs torch."""

import json
from pathlib import Path

from shared.errors import DataError
from shared.run_config import Task


def read(path: Path, task: Task) -> tuple[list[str], list[int]]:
    """Read the public test records' texts and their labels' numbers.

    Raises
    ------
    DataError
        Naming the row at fault.
    """
    numbers = {label: number for number, label in enumerate(task.labels)}
    texts: list[str] = []
    labels: list[int] = []
    try:
        with path.open(encoding="utf-8") as lines:  # and not splitlines(): a text may hold U+2028
            for row, line in enumerate(lines, 1):
                text, label = _row(line, f"{path}, row {row}")
                if label not in numbers:
                    raise DataError(f"{path}, row {row}: label {label!r} is not one of the declared {list(numbers)}.")
                texts.append(text)
                labels.append(numbers[label])
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    if not labels:
        raise DataError(f"{path} holds no records.")
    return texts, labels


def _row(line: str, where: str) -> tuple[str, str]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str) or "label" not in record:
        raise DataError(f"{where}: not a JSON object with a text and a label.")
    return record["text"], str(record["label"])
