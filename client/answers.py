"""What a site does with a request: check, recall or compute, charge, and only then answer.

The order is the promise. A request that was answered before gets the kept bytes; one that goes beyond the
policy or the budget is refused before any record is touched; what a new answer may cost is reserved before it is
computed; and it is in the ledger, with its cost and its bytes, before it is returned.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from pydantic import ValidationError

from client import evaluation, training
from client.privacy import policy
from client.privacy.ledger import PARTS, Ledger, Part, Question
from client.privacy.randomness import Keystream
from client.resident import Resident
from client.residual import Compressed
from client.site import Site, reread
from shared import imbalance, messages, models, plan
from shared.accounting import Release, epsilon
from shared.arrays import Arrays
from shared.errors import ConfigError, DataError, EngineError, RefusedError
from shared.messages import (
    EvaluateReply,
    EvaluateRequest,
    JoinReply,
    JoinRequest,
    Kind,
    TrainReply,
    TrainRequest,
)
from shared.models import LoadedModel
from shared.plan import SitePlan
from shared.run_config import RunConfig, explain

Randomness = Callable[[str], Keystream]  # request id -> the source of its sampling and noise

LARGEST_VALUE = 1e4  # of a trained array: pretrained weights are far below, and rounding grows with them
RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # what a run may be called: it goes into logs and ledger

Request = JoinRequest | TrainRequest | EvaluateRequest
Reply = JoinReply | TrainReply | EvaluateReply


def answer(resident: Resident, site: Site, kind: Kind, request: Request, randomness: Randomness) -> Reply:
    """Answer one request; one at a time, whatever the number of threads, for they share the model.

    Raises
    ------
    RefusedError
        Where policy, budget, an earlier answer or the probe forbids it.
    MoonflowerError
        Where the site's own data, model or ledger is at fault.
    """
    if not RUN.fullmatch(request.run):
        raise RefusedError("the run's name is not one of letters, digits, '.', '_' and '-', at most 100 of them.")
    config, digest = _configuration(request.config)
    check_declared(site, config)
    planned = plan.make(config, site.dataset.card())
    policy.check(site.privacy, config, planned, site.dataset.id)
    with resident.turn, resident.ledger(site) as ledger:
        if site.threads is not None:
            torch.set_num_threads(site.threads)
        if (known := ledger.state(request.run, "plan")) is not None:
            _same(known, _plan_digest(digest, planned), request.run)
        if isinstance(request, JoinRequest):
            return _join(resident, site, config, planned, request, ledger)
        return _release(resident, site, config, digest, planned, kind, request, ledger, randomness)


def _join(
    resident: Resident, site: Site, config: RunConfig, planned: SitePlan, request: JoinRequest, ledger: Ledger
) -> JoinReply:
    """Check all that the run will need; a site that joins can finish, unless its budget goes elsewhere."""
    model = resident.model(config, site.device)
    if request.base_digest != model.base_digest:
        raise RefusedError(
            f"model.name={config.model.name!r} is not the coordinator's: its weights differ at this site; install the same "
            "model on both sides, and pin model.digest."
        )
    if request.shapes != models.shapes(model.arrays()):
        raise RefusedError("the coordinator's arrays are not this site's; install the same version on both sides.")
    for part in PARTS:
        _check_budget(site, planned, request.run, part, ledger)
    answered = sum(spend.question.run == request.run for spend in ledger.spends())
    ledger.check_releases(max(0, config.rounds + config.evaluations - answered))
    _check_split(resident, site, ledger)
    resident.parts(site, config)
    card = site.dataset.card()
    return JoinReply(
        site.name,
        card.dataset,
        card.unit,
        card.records,
        card.validation,
        ledger_id=ledger.account,
        ledger_number=ledger.number,
        ledger_head=ledger.head,
    )


@lru_cache(maxsize=8)
def _configuration(text: str) -> tuple[RunConfig, str]:
    """Read a request's configuration, with its digest: the same in every request of a run."""
    try:
        config = RunConfig.model_validate_json(text)
        return config, config.digest
    except ValidationError as error:
        raise ConfigError(explain(error, "the request's configuration")) from None


def check_declared(site: Site, config: RunConfig) -> None:
    """Refuse a run of another coordinator or task, or without this site's labels: by what is declared, never by its file.

    Raises
    ------
    RefusedError
        Where the node is connected to a coordinator of another name, which makes the name more than a claim; or where
        the run does not know a label.
    """
    if site.coordinator and config.federation.coordinator != site.coordinator.name:
        raise RefusedError(
            f"federation.coordinator={config.federation.coordinator!r} is not {site.coordinator.name!r}, the coordinator that "
            "this site is connected to (site.toml, [coordinator] name)."
        )
    if config.task.name != site.dataset.task:
        raise RefusedError(
            f"task.name={config.task.name!r} is not {site.dataset.task!r}, which this site's dataset {site.dataset.id!r} is for "
            "(site.toml, [dataset] task)."
        )
    if config.task.labels and not site.dataset.labels:
        raise RefusedError(
            f"task.name={config.task.name!r} has labels, and this site declares none for dataset {site.dataset.id!r} "
            "(site.toml, [dataset] labels)."
        )
    lacking = [label for label in site.dataset.labels if label not in config.task.labels]
    if lacking:
        raise RefusedError(
            f"task.labels={list(config.task.labels)} lacks {lacking[0]!r}, which this site declares for dataset "
            f"{site.dataset.id!r} (site.toml, [dataset] labels)."
        )


def _plan_digest(configuration: str, planned: SitePlan) -> bytes:
    return hashlib.sha256(f"{configuration}\0{planned!r}".encode()).digest()


def _same(known: bytes, now: bytes, run: str) -> None:
    """Refuse another plan under a run's name: rate, noise and steps are fixed before its first step."""
    if known != now:
        raise RefusedError(
            f"run {run!r} began with another configuration, or this site's declaration has changed since; "
            "a changed configuration is a new run."
        )


def _check_split(resident: Resident, site: Site, ledger: Ledger) -> None:
    """Refuse a split that is not the dataset's first: a record in both parts would pay for one only.

    Raises
    ------
    DataError
        Where the key, the share, or the column of the ids or of the units has changed.
    """
    key = hashlib.sha256(b"moonflower split\0" + resident.split_key(site)).hexdigest()
    unit = "" if site.dataset.unit_column is None else f" unit {site.dataset.unit_column}"
    split = f"{key} {site.dataset.validation!r} {site.dataset.layout().column('id')}{unit}".encode()
    if ledger.pin("", "split", split) != split:
        raise DataError(
            f"dataset {site.dataset.id!r} was split by another split key, validation share, id or unit column, for its "
            "whole life: restore them (site.toml, split_key and [dataset] validation, columns.id, unit_column)."
        )


def _check_budget(site: Site, planned: SitePlan, run: str, part: Part, ledger: Ledger) -> None:
    """Refuse a run whose releases still to come do not fit what is left of the dataset's budget."""
    spent: Counter[Release] = Counter()  # steps, by what one step is
    for release in ledger.run_releases(run, part):
        spent[replace(release, steps=1)] += release.steps
    left = []
    for release in planned.releases(part):
        step = replace(release, steps=1)
        used = min(spent[step], release.steps)
        spent[step] -= used
        if used < release.steps:
            left.append(replace(release, steps=release.steps - used))
    ledger.check_plan(left, part, allow_unbounded=site.privacy.allow_non_private)


def _release(
    resident: Resident,
    site: Site,
    config: RunConfig,
    configuration: str,
    planned: SitePlan,
    kind: Kind,
    request: TrainRequest | EvaluateRequest,
    ledger: Ledger,
    randomness: Randomness,
) -> Reply:
    """Recall the kept answer, or reserve, compute and charge one, and return what the ledger has kept.

    `configuration` is the digest of `config`.
    """
    name, digest = messages.request_id(request.run, request.round, kind), messages.request_digest(request)
    reply_kind: type[TrainReply] | type[EvaluateReply] = TrainReply if kind == "train" else EvaluateReply
    part: Part = "train" if kind == "train" else "validation"
    question = Question(request.run, name, digest, request.round, kind, part)
    kept = ledger.recall(question)
    if kept is None:
        release = _planned_release(config, planned, request)
        unbounded = site.privacy.allow_non_private
        with ledger.reserve(question, release, allow_unbounded=unbounded):
            _check_shapes(resident.model(config, site.device), request.arrays)
            if isinstance(request, TrainRequest) and (fault := imbalance.fault(request.weights, config)) is not None:
                raise RefusedError(fault)
            _same(
                ledger.pin(request.run, "plan", decided := _plan_digest(configuration, planned)), decided, request.run
            )
            _check_split(resident, site, ledger)
            spent = epsilon([*ledger.run_releases(request.run, part), release], config.privacy.delta)
            private = release.noise_multiplier > 0
            said: dict[str, Any] = {
                "mechanism": release.mechanism if private else "none",
                "noise_source": "aes-256-ctr" if private else "none",
                "ledger_id": ledger.account,
            }
            reply: Callable[..., Reply]
            source = randomness(name)
            packed: Compressed | None = None
            if isinstance(request, TrainRequest):
                done = _trained_once(resident, site, config, planned, request, ledger, source)
                packed = Compressed(done.update, config, request, ledger, source)  # after the noise
                said |= {"mechanism": done.mechanism, "noise_source": done.noise_source}
                reply = partial(
                    TrainReply,
                    site.name,
                    request.round,
                    packed.update,
                    release.sampling_rate,
                    release.noise_multiplier,
                    release.steps,
                    spent,
                    gradients=done.gradients,
                    **said,
                )
            else:
                histogram = evaluation.evaluate(resident, site, config, planned, request, source)
                reply = partial(
                    EvaluateReply, site.name, request.round, histogram, release.noise_multiplier, spent, **said
                )
            unbounded = _still_allowed(site, config, planned, ledger)

            def written(number: int, head: str) -> bytes:
                if packed is not None:
                    packed.check()
                return messages.to_bytes(reply(ledger_number=number, ledger_head=head))

            state = None if packed is None else packed.state
            kept = ledger.charge(question, release, written, state, allow_unbounded=unbounded)
    return messages.from_bytes(kept, reply_kind)


def _trained_once(
    resident: Resident,
    site: Site,
    config: RunConfig,
    planned: SitePlan,
    request: TrainRequest,
    ledger: Ledger,
    randomness: Keystream,
) -> training.Trained:
    """Train, unless the engine failed on this request before: drawn anew, each failure would tell a little for nothing."""
    closed = f"closed {request.round}"
    if ledger.state(request.run, closed) is not None:
        raise EngineError(f"round {request.round} of run {request.run!r} failed on drawn records before.")
    try:
        return training.train(resident, site, config, planned, request, randomness)
    except EngineError:
        ledger.mark(request.run, closed)
        raise


def _still_allowed(site: Site, config: RunConfig, planned: SitePlan, ledger: Ledger) -> bool:
    """Check an answer that is computed against site.toml as it is now, and give the ledger its limits.

    Returns
    -------
    bool
        Whether the site allows a release without noise.

    Raises
    ------
    RefusedError
        Where the site's owner has meanwhile forbidden the answer.
    """
    now = reread(site)
    policy.check(now.privacy, config, planned, site.dataset.id)
    if now.privacy.delta != ledger.delta or now.privacy.allow_device_noise < site.privacy.allow_device_noise:
        raise RefusedError("this site's [privacy] delta or allow_device_noise has changed while the answer was made.")
    ledger.max_epsilon, ledger.max_releases = now.privacy.max_epsilon, now.privacy.max_releases
    return now.privacy.allow_non_private


def _planned_release(config: RunConfig, planned: SitePlan, request: TrainRequest | EvaluateRequest) -> Release:
    """Return what this round costs by the plan; a round outside the plan is refused."""
    if not 1 <= request.round <= config.rounds:
        raise RefusedError(f"round {request.round} is outside the run's {config.rounds} rounds.")
    if isinstance(request, TrainRequest):
        return planned.phases[config.place(request.round)[0]].round_release()
    if not config.evaluated(request.round):
        raise RefusedError(
            f"round {request.round} is not one that the run's configuration evaluates (evaluation.every)."
        )
    return planned.evaluation_release()


def _check_shapes(model: LoadedModel, received: Arrays) -> None:
    if {name: array.shape for name, array in received.items()} != model.shapes():
        raise RefusedError("the request's arrays are not the ones that this model exchanges.")
    most = LARGEST_VALUE
    if not all(
        -most <= array.min(initial=0.0) and array.max(initial=0.0) <= most for array in received.values()
    ):  # nor NaN
        raise RefusedError(
            f"the request's arrays are not finite, or beyond {LARGEST_VALUE:g}: under such arrays gradients are mostly rounding."
        )
