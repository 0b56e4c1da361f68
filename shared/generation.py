"""What a model writes of public records, and how near it comes to what was asked for. Sites never write anything."""

import string
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from shared.examples import batches, collate
from shared.metrics import Score

if TYPE_CHECKING:
    from shared.examples import Examples
    from shared.run_config import Hardware
    from shared.tasks.base import Batch
    from shared.tasks.tokens import Answering

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@torch.no_grad()
def answers(network: Any, task: "Answering", examples: "Examples", hardware: "Hardware") -> list[list[int]]:
    """Return each record's answer: always the likeliest next token, at most `task.max_target_length`."""
    found: list[list[int]] = [[]] * examples.rows
    rows = [(row,) for row in range(examples.rows)]
    device = next(network.parameters()).device
    for group in batches(examples, rows, hardware.micro_batch):
        batch = collate(examples, [rows[place] for place in group], device)
        given = {name: batch[name] for name in task.inputs if name != "decoder_input_ids"}
        longest = task.settings.max_target_length
        for place, ids in zip(group, _greedy(network, given, task.prefix, task.end, longest), strict=True):
            found[place] = ids
    return found


def _greedy(network: Any, given: "Batch", prefix: Sequence[int], end: int, longest: int) -> Iterator[list[int]]:
    """Yield the tokens after `prefix`, up to `end`; what is read is encoded once."""
    first = next(iter(given.values()))
    read = network.get_encoder()(**given)
    ids = torch.tensor([list(prefix)] * len(first), device=first.device)
    going = torch.ones(len(first), dtype=torch.bool, device=first.device)
    while bool(going.any()) and ids.shape[1] < longest:
        logits = network(
            encoder_outputs=read, attention_mask=given.get("attention_mask"), decoder_input_ids=ids, use_cache=False
        ).logits
        following = torch.where(going, logits[:, -1].argmax(-1), end)
        ids = torch.cat([ids, following.unsqueeze(1)], dim=1)
        going &= following != end
    for row in ids[:, len(prefix) :].tolist():
        yield row[: row.index(end)] if end in row else row


def likeness(written: Sequence[str], wanted: Sequence[str]) -> list[Score]:
    """Return chrF of the corpus (Popović 2015), and the means over records of ROUGE-1's and ROUGE-L's F (Lin 2004)."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    chrf = sacrebleu.corpus_chrf(list(written), [list(wanted)]).score / 100
    names = {"rouge1": "rouge1", "rouge_l": "rougeL"}
    scorer = RougeScorer(list(names.values()))
    each = [scorer.score(target, said) for said, target in zip(written, wanted, strict=True)]
    means = [Score(name, sum(one[kind].fmeasure for one in each) / len(each)) for name, kind in names.items()]
    return [Score("chrf", chrf), *means]


def word_errors(written: Sequence[str], wanted: Sequence[str]) -> float:
    """Words put in, left out and changed, over the words of `wanted`; case, punctuation and spaces do not count."""
    import jiwer

    pairs = [(_words(target), _words(said)) for said, target in zip(written, wanted, strict=True)]
    kept = [(target, said) for target, said in pairs if target]  # of a transcript of punctuation alone there is no rate
    return float(jiwer.wer([target for target, _ in kept], [said for _, said in kept])) if kept else 0.0


def _words(text: str) -> str:
    return " ".join(text.lower().translate(NO_PUNCTUATION).split())
