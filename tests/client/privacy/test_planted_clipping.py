"""Planted bugs of clipping and of the probe, and the audits that find them: see test_planted_bugs.py."""

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path
from typing import Any

import kept
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client import made_up, training
from client.privacy import probe
from client.privacy.book import Entry
from client.privacy.engine import Booked, ClippedSum, Clipping, Gradients, Objective, train_only
from client.privacy.randomness import Keystream
from shared.accounting import Release, epsilon
from shared.errors import SensitivityError
from shared.examples import Examples

Desks = Callable[..., Any]
Planted = Callable[..., AbstractContextManager[None]]
Rows = Callable[..., Any]
NOT_PRIVATE = {"privacy": {"allow_non_private": True}}
PLAIN = {"privacy": {"epsilon": math.inf}}  # what is summed can be seen


def system(_: str) -> Keystream:
    return Keystream.from_system()


# -- clipping per token ----------------------------------------------------------------------------------------------


def reach_of_a_record(new_desk: Desks, site: str, **model: Any) -> float:
    """Norm that a site's only record gives the sum, over the clipping norm: from a noiseless update of all weights."""
    norm = 0.01
    phase = {"rounds": 1, "sampling_rate": 1.0, "local_steps": 1, "clipping_norm": norm}
    how = {"hardware": {"gradients": "one-pass"}}
    config = {"model": {"trainable": "full"} | model, "training": phase} | how | PLAIN
    desk = new_desk(name=site, config=config, site=NOT_PRIVATE, randomness=system)
    rows = desk.rows()
    kept = desk.validation_rows()
    longest = max((row for row in rows if row not in kept), key=lambda row: len(row["text"]))
    desk.write([*kept, longest])
    assert len(desk.resident.parts(desk.site, desk.config).train) == 1
    arrays = desk.start()
    arrays["head.weight"] = 20 * arrays["head.weight"]  # so that most of the gradient is the encoder's
    try:
        update = desk.train(1, arrays).update
        return float(np.linalg.norm(np.concatenate([part.ravel() for part in update.values()]))) * 80 / norm
    except SensitivityError:
        assert desk.spent() == 0
        raise


def clip_by_token(self: Booked, objective: Objective, clipping: Clipping, sums: dict[str, Tensor]) -> Tensor:
    """Clip what each token gives, as if tokens were records: what Opacus does where a layer sees flattened tokens."""
    entries = self._book(objective)
    with torch.no_grad():
        for name, entry in entries.items():
            total = sums.setdefault(name, torch.zeros(entry.shape, dtype=self._parameters[name].dtype))
            flat_sum = total.view(entry.shape[0], -1)
            for use in entry.outers:
                factors = clipping.factors(use.left.norm(dim=2) * use.right.norm(dim=2)).unsqueeze(2)
                flat_sum.addmm_((use.left * factors).flatten(0, 1).t(), use.right.flatten(0, 1))
            for use in entry.rows:
                factors = clipping.factors(use.values.norm(dim=2)).unsqueeze(2)
                flat_sum.index_add_(0, use.ids.flatten(), (use.values * factors).flatten(0, 1))
            if entry.whole is not None:
                each = entry.whole.reshape(entry.records, -1)
                total.view(-1).add_(clipping.factors(each.norm(dim=1)) @ each)
    return torch.zeros(objective.records)


def test_clipping_per_token_is_caught(new_desk: Desks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token's gradient is clipped to the norm, and a record may count for as many norms as it has tokens.

    Claim: noise of sigma times the clipping norm. It is sigma over the reach of a record: at a reach of 10, ten passes
    at sigma 1 that say epsilon 17.9 have one above 500.
    Statistic: the reach, the norm of a record's part in the sum over the clipping norm; at most 1.
    Certain, both ways. It is found twice: the probe refuses before anything is spent, and without the probe the
    update shows it.
    """
    assert 0.99 < reach_of_a_record(new_desk, "right") <= 1
    monkeypatch.setattr(Booked, "add", clip_by_token)
    with pytest.raises(SensitivityError, match="nothing is released"):
        reach_of_a_record(new_desk, "probed")
    monkeypatch.setattr(probe, "check", lambda *_, **__: None)
    reach = reach_of_a_record(new_desk, "by-token")
    claimed, spent = epsilon([Release(1.0, 1.0, 10)], 1e-5), epsilon([Release(1.0, 1 / reach, 10)], 1e-5)
    assert (reach > 10, claimed < 18, spent > 500) == (True, True, True)


# -- an unclipped tied weight ----------------------------------------------------------------------------------------


def tied_model() -> tuple[nn.Module, list[Objective], Objective]:
    """Make a small GPT-2 whose embedding is its output head too, losses of six made-up records alone, and together."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
        model = GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).train()
        ids = torch.randint(64, (6, 8))
    assert model.lm_head.weight is model.transformer.wte.weight

    def losses(ids: Tensor) -> Tensor:
        logits = model(ids, use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.transpose(1, 2).double(), ids[:, 1:], reduction="none").mean(1)

    return model, [Objective((ids[n : n + 1],), losses) for n in range(6)], Objective((ids,), losses)


def reach_and_refusal(clip: float = 0.1) -> tuple[float, str]:
    """Largest norm of a record's part in the clipped sum, over the clipping norm; and what the probe says."""
    model, alone, together = tied_model()
    parameters = train_only(model, [name for name, _ in model.named_parameters()])
    with Gradients(model, parameters, "one-pass") as gradients:
        reach = 0.0
        for objective in alone:
            total = ClippedSum(gradients, Clipping(clip))
            total.add(objective)
            reach = max(reach, float(torch.stack([part.norm() for part in total.sums().values()]).norm()) / clip)
        try:
            probe.check(model, gradients, [(range(6), together)], alone)
        except SensitivityError as error:
            return reach, str(error)
        return reach, ""


@pytest.fixture
def albert(tiny_model: Path, tmp_path: Path) -> str:
    """Give the folder of a small ALBERT: two layers, and one layer's weights."""
    from transformers import AlbertConfig, AlbertModel, AutoTokenizer

    words = AutoTokenizer.from_pretrained(tiny_model)
    words.save_pretrained(tmp_path / "albert")
    shape = {"embedding_size": 32, "hidden_size": 64, "intermediate_size": 256, "max_position_embeddings": 64}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AlbertModel(AlbertConfig(vocab_size=len(words), **shape, **layers)).save_pretrained(tmp_path / "albert")
    return str(tmp_path / "albert")


def test_an_unclipped_tied_weight_is_caught(
    new_desk: Desks, albert: str, monkeypatch: pytest.MonkeyPatch, planted: Planted
) -> None:
    """A weight that is used twice counts in the norm by one use, or without what the uses have in common.

    Claim: noise of sigma times the clipping norm; it is sigma over the reach of a record.
    Statistic: the reach: of a site's only record on an ALBERT, whose layers share their weights, and of single records on a
    GPT-2 whose embedding is its output head; and the probe's comparison with plain autograd.
    Certain, both ways, where a record has gradient by both uses.
    """
    assert 0.99 < reach_of_a_record(new_desk, "right", name=albert) <= 1
    last_use = "Entry(self.shape, self.records, self.device, self.outers[-1:], self.rows[-1:]).factors()"
    with planted(Entry.squared_norms, "self.factors()", last_use):
        with pytest.raises(SensitivityError, match="nothing is released"):
            reach_of_a_record(new_desk, "probed", name=albert)
        with monkeypatch.context() as patch:
            patch.setattr(probe, "check", lambda *_, **__: None)
            assert reach_of_a_record(new_desk, "last-use", name=albert) > 1.01
    assert reach_and_refusal() == (pytest.approx(1.0, abs=2e-3), "")
    one_use = "outer, rows = self.factors()\n    rows = rows if outer is None else None"
    with planted(Entry.squared_norms, "outer, rows = self.factors()", one_use):
        reach, refusal = reach_and_refusal()
        assert reach > 1.05
        assert "nothing is released" in refusal
    with planted(Entry.squared_norms, "total + 2 * cross.sum((1, 2))", "total + 0 * cross.sum((1, 2))"):
        reach, refusal = reach_and_refusal()
        assert reach > 1.001
        assert "nothing is released" in refusal


# -- a probe on private records --------------------------------------------------------------------------------------


def what_the_probe_saw(desk: Any) -> list[str]:
    """Answer three rounds with known random numbers; return every tensor that the probe was given."""
    seen: list[Tensor] = []
    streams = count()

    def note(right: Callable[..., Any]) -> Callable[..., Any]:
        def spy(*given: Any, **named: Any) -> Any:
            for one in (each for part in given for each in (part if isinstance(part, list) else [part])):
                held = one[1] if isinstance(one, tuple) else one
                seen.extend(held.inputs if isinstance(held, Objective) else [held] if isinstance(held, Tensor) else [])
            return right(*given, **named)

        return spy

    def known(cls: type[Keystream]) -> Keystream:
        return cls(hashlib.sha256(f"stream {next(streams)}".encode()).digest())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Keystream, "from_system", classmethod(known))
        for name, function in inspect.getmembers(probe, inspect.isfunction):
            if not name.startswith("_") and function.__module__ == probe.__name__:
                patch.setattr(probe, name, note(function))
        for ask in (desk.train, desk.evaluate):
            ask(1), ask(2), ask(3)
    assert len(seen) > 20
    return [repr(value.tolist()) for value in seen]


def probes_alike(new_desk: Desks, new_rows: Rows, name: str) -> bool:
    """Whether two sites of other records, given the same random numbers, show the probe the same."""
    phase = {"rounds": 1, "sampling_rate": 0.5}
    others = [row | {"text": f"so {row['text']} so"} for row in new_rows(100)[:60]]
    seen = [
        what_the_probe_saw(new_desk(name=f"{name}-{number}", rows=rows, config={"warm_start": phase}))
        for number, rows in enumerate((None, others))
    ]
    return seen[0] == seen[1]


def test_a_probe_on_private_records_is_caught(
    new_desk: Desks, new_rows: Rows, monkeypatch: pytest.MonkeyPatch, planted: Planted
) -> None:
    """The probe takes the site's own records: whether it refuses then depends on them, uncharged and without noise.

    Claim: nothing is spent by a probe. A bit of a record's own is delta 1 at any epsilon.
    Statistic: every tensor that the probe is given, at two sites of other records under the same random numbers.
    Certain, both ways: the same bytes, or not.
    """
    assert probes_alike(new_desk, new_rows, "right")
    right = training.EncoderPass.made_up

    def of_the_site(self: training.EncoderPass, *asked: Any, **how: Any) -> Any:
        def own(_: Any, lengths: Sequence[int] = made_up.LENGTHS) -> Examples:
            records, own = kept.tokens(self._examples), kept.labels(self._examples)
            return kept.of_tokens([ids[:n] for ids, n in zip(records, lengths, strict=False)], own[: len(lengths)])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(made_up, "examples", own)
            return right(self, *asked, **how)

    with monkeypatch.context() as patch:
        patch.setattr(training.EncoderPass, "made_up", of_the_site)
        assert not probes_alike(new_desk, new_rows, "tokens")
    scaled = "features[:4] *= torch.tensor("
    with planted(training.HeadPass.made_up, scaled, f"features = self._features[:4].clone(); {scaled}"):
        assert not probes_alike(new_desk, new_rows, "features")
