"""Seven slots of sentences about restaurants, as tags of words, at four sites of 1,100 sentences. From e2e-nlg."""

import re
from pathlib import Path
from typing import Any

from restaurants import Spans, parts, write


def layout(data: Path, out: Path) -> None:
    """Write out/SITE.jsonl and out/test.jsonl: words, and their tags in IOB2."""
    for name, held in parts(data).items():
        write(out, name, [_row(text, spans) for text, spans in held])


def _row(text: str, spans: Spans) -> dict[str, Any]:
    words, tags = [], []
    for word in re.finditer(r"\w+|[^\w\s]", text):
        words.append(word.group())
        slot = next((slot for slot, (begin, end) in spans.items() if begin <= word.start() < end), None)
        tags.append("O" if slot is None else f"{'B' if word.start() == spans[slot][0] else 'I'}-{slot}")
    return {"words": words, "tags": tags}
