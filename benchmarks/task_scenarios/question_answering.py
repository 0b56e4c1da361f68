"""A question about one slot of each sentence about a restaurant, at four sites of 1,100 sentences. From e2e-nlg.

The value in the sentence is the answer. The question is one of seven, by slot: real contexts, questions and answers by rule.
"""

import random
from pathlib import Path

from restaurants import parts, write

QUESTIONS = {
    "name": "What is the place called?",
    "near": "What is it close to?",
    "area": "Which part of the city is it in?",
    "food": "What kind of food does it serve?",
    "eatType": "What type of place is it?",
    "priceRange": "How expensive is it?",
    "rating": "How do customers rate it?",
}


def layout(data: Path, out: Path) -> None:
    """Write out/SITE.jsonl and out/test.jsonl, in SQuAD's columns."""
    draw = random.Random(1)  # noqa: S311 - which slot a public question is about
    for name, held in parts(data).items():
        rows = []
        for text, spans in held:
            if spans:
                slot, (begin, end) = draw.choice(list(spans.items()))
                answers = {"text": [text[begin:end]], "answer_start": [begin]}
                rows.append({"question": QUESTIONS[slot], "context": text, "answers": answers})
        write(out, name, rows)
