"""A model's scores on a run's public test set, in float32, as the run has them: to see what another format costs."""

from dataclasses import dataclass

from server.export.source import Source
from shared import records
from shared.examples import Examples
from shared.metrics import Score
from shared.models import LoadedModel
from shared.scoring import exact


@dataclass(frozen=True)
class Measured:
    """Bytes of the weights before and after, and the scores, where there is a public test set."""

    sizes: tuple[int, int]
    before: list[Score]
    after: list[Score]


def public(source: Source, model: LoadedModel) -> list[Score]:
    """Score the public test set; nothing where the run has none."""
    if source.test_set is None:
        return []
    task = model.task
    found = [
        task.encode(each.values, model.processor) for each in records.read(source.test_set, task, identified=False)
    ]
    examples = Examples.single(task, model.processor, found)
    hardware = source.config.hardware.model_copy(update={"precision": "float32"})
    counts, loss = exact(model, examples, hardware)
    return [*task.scores(counts, 0.0), Score("loss", loss)]
