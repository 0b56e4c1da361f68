"""A part of the sensitivity matrix (benchmarks/sensitivity_matrix.py), the traps, and engines that it must find wrong.

The whole matrix is in docs/sensitivity-matrix.md; here what that page says of some architectures is what comes out.
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import sensitivity_cell as cells
import sensitivity_matrix as matrix
import torch
from architecture_tasks import LENGTHS, Architecture, Batch
from architecture_traps import TRAPS
from architectures import ARCHITECTURES
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from client.privacy.engine import ClippedSum, Clipping, Gradients, Objective
from shared.run_config import Gradients as Mode

PAGE = Path(__file__).parents[3] / "docs" / "sensitivity-matrix.md"
ROWS = {row.name: row for row in (*ARCHITECTURES, *TRAPS)}
SOME = ["ALBERT", "DeBERTa-v2", "GPT-2", "OPT", "Llama", "Mixtral", "T5", "Swin", "ConvNeXt", "Wav2Vec2"]
SOUND = [row.name for row in TRAPS if not row.coupled]
COUPLED = [row.name for row in TRAPS if row.coupled]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    verbosity = transformers_logging.get_verbosity()
    with warnings.catch_warnings():
        matrix.quiet()
        yield
    transformers_logging.set_verbosity(verbosity)


def on_the_page(name: str, part: str, mode: str) -> str:
    """The outcome that the page gives a cell."""
    line = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| {name} |"))
    mark = line.split("|")[2 + cells.PARTS.index(part)].split()[matrix.MODES.index(mode)]
    return next(outcome for outcome, known in matrix.MARKS.items() if known == mark)


@pytest.mark.parametrize("part", cells.PARTS)
@pytest.mark.parametrize("name", [*SOME, *SOUND])
def test_a_cell_comes_out_as_the_page_says_and_is_never_wrong(name: str, part: str) -> None:
    cell = cells.try_cell(ROWS[name], part, "auto")
    assert cell.outcome in ("right", "refused", "none"), cell
    assert cell.outcome == on_the_page(name, part, "auto"), cell


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("name", ["OPT", "DeBERTa-v2", "weight used twice", "sorted by length", "channels last"])
def test_what_opacus_gets_silently_wrong_is_refused(name: str, mode: Mode) -> None:
    part = "lora" if name in ("OPT", "DeBERTa-v2") else "full"
    assert cells.try_cell(ROWS[name], part, mode).outcome == "refused"


@pytest.mark.parametrize("part", cells.PARTS)
@pytest.mark.parametrize("name", COUPLED)
def test_what_couples_records_is_refused_before_any_training(name: str, part: str) -> None:
    cell = cells.try_cell(ROWS[name], part, "auto")
    assert cell.outcome == "refused", cell
    assert cell.where in ("attach", "probe"), cell


def test_the_page_has_every_architecture_nothing_wrong_and_nine_tenths_right_under_auto() -> None:
    outcomes = [on_the_page(row.name, part, "auto") for row in ARCHITECTURES for part in cells.PARTS]
    tried = [outcome for outcome in outcomes if outcome != "none"]
    assert len(ARCHITECTURES) >= 36
    assert set(tried) <= {"right", "refused"}
    assert tried.count("right") >= 0.9 * len(tried)


# -- planted: engines that are wrong, and what finds them -------------------------------------------------------


def judge(
    row: Architecture, part: str, summed: cells.Summed, module: nn.Module, names: Sequence[str]
) -> tuple[float, float]:
    records = row.examples(LENGTHS, torch.Generator().manual_seed(1))
    return cells.judge(summed, records, cells.loop(module, names, records))


def test_an_engine_that_clips_per_token_is_found_wrong() -> None:
    row = ROWS["GPT-2"]
    module = row.build()
    parameters = cells.choose(module, "full")

    def per_token(clipping: Clipping, batches: Sequence[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
        total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        records = 0
        for ids, mask in batches:
            logits = module.backbone(input_ids=ids, attention_mask=mask).logits
            losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
            lengths = mask[:, 1:].sum(1, keepdim=True)
            for loss in (losses / lengths)[mask[:, 1:] == 1]:
                each = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
                factor = clipping.factors(torch.stack([part.norm() for part in each]).norm())
                for name, part in zip(parameters, each, strict=True):
                    total[name] += factor * part
            records += len(ids)
        return torch.full((records,), clipping.norm), total  # and it says that it clips

    gap, share = judge(row, "full", per_token, module, list(parameters))
    assert gap > 0.1
    assert share > 2


def test_an_engine_that_leaves_a_tied_weight_out_of_the_norm_is_found_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    row = ROWS["Llama"]
    module = row.build()
    parameters = cells.choose(module, "full")
    with Gradients(module, parameters, "one-pass") as gradients:

        def unclipped(clipping: Clipping, batches: Sequence[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
            total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
            contributed = []
            for batch in batches:
                each = gradients.per_record(Objective(batch, module))
                tied = "backbone.model.embed_tokens.weight"
                norms = torch.stack([part.flatten(1).norm(dim=1) for name, part in each.items() if name != tied]).norm(
                    dim=0
                )
                factors = clipping.factors(norms)
                contributed.append(norms * factors)
                for name, part in each.items():
                    total[name] += torch.tensordot(factors, part, dims=1)
            return torch.cat(contributed), total

        gap, share = judge(row, "full", unclipped, module, list(parameters))
    assert gap > 1e-2
    assert share > 1.01


def test_an_engine_that_clips_to_one_and_a_half_times_the_norm_is_found_wrong() -> None:
    row = ROWS["BERT"]
    module = row.build()
    parameters = cells.choose(module, "lora")
    with Gradients(module, parameters, "one-pass") as gradients:

        def loose(clipping: Clipping, batches: Sequence[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
            total = ClippedSum(gradients, Clipping(1.5 * clipping.norm, clipping.mode))
            contributed = torch.cat([total.add(Objective(batch, module)) for batch in batches])
            return contributed / 1.5, total.sums()

        gap, share = judge(row, "lora", loose, module, list(parameters))
    assert gap > 0.1
    assert share > 1.4


@pytest.mark.parametrize(
    ("name", "part", "mode"),
    [
        ("weight used twice", "full", "hooks"),
        ("sorted by length", "full", "hooks"),
        ("sorted by length", "lora", "one-pass"),
        ("two texts", "lora", "one-pass"),
        ("windows, places first", "bias", "one-pass"),
        ("batch norm", "head", "one-pass"),
        ("mean over the batch", "lora", "one-pass"),
        ("padding counted", "head", "one-pass"),
    ],
)
def test_what_the_probe_alone_refuses_is_wrong_without_it(name: str, part: str, mode: Mode) -> None:
    assert cells.try_cell(ROWS[name], part, mode, probed=False).outcome == "wrong"
    cell = cells.try_cell(ROWS[name], part, mode)
    assert (cell.outcome, cell.where) == ("refused", "probe"), cell
