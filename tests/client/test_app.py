"""Every message of a real run of the Flower apps, looked at one by one, and what an error tells."""

import logging
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

import client.app
import server.app
import server.job
from client import answers, site
from client.app import site_from_context
from client.privacy.ledger import Ledger, Question
from client.site import Site
from server.history.store import History
from shared import ledger_chain, messages, models, plan
from shared.accounting import Release
from shared.errors import ConfigError, DataError
from shared.messages import FLOWER_TYPES, REPLIES, EvaluateReply, JoinReply, Refusal, TrainReply, from_record, to_record
from shared.run_config import RunConfig
from simulations import prepare
from simulations.engine import Silent
from simulations.grid import InProcessGrid
from simulations.scenario import load

SECRET = "Ms Secret of 7 Hidden Street"  # noqa: S105 - a text that must not be sent


class Recorder:
    """A ClientApp whose every message is kept."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.replies: list[tuple[str, Message]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        reply: Message = self.app(message=message, context=context)
        self.replies.append((str(context.node_config["site"]), reply))
        return reply


def held(record: RecordDict) -> set[str]:
    """Name everything in a record; a field of arrays comes with the arrays' shapes, which are the model's."""
    values, arrays = record.config_records["values"], set(record) - {"values"}
    assert all(list(record.array_records[name]) == ["flat"] for name in arrays)
    return arrays | (set(values) - {"message"} - {f"{name}.shapes" for name in arrays})


def test_every_message_of_a_run_holds_its_declared_fields_of_public_values_and_releases(
    tiny_scenario: Path, moonflower_home: Path, tmp_path: Path
) -> None:
    database = f"sqlite:///{tmp_path / 'history.db'}"
    with History.open(database) as history:
        run = prepare.prepare(load(str(tiny_scenario), {}), history)
    recorder = Recorder(client.app.build(site_from_context))
    grid = InProcessGrid(recorder, prepare.nodes(run))  # type: ignore[arg-type]
    grid.in_process = False  # messages are written down, as for another machine
    settings: dict[str, Any] = {"run": str(prepare.run_folder(run)), "database": database}
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=settings)
    server.app.build(Silent())(grid, context)

    config = server.job.load(prepare.run_folder(run)).config
    seen = {kind.__name__: 0 for kind in REPLIES}
    for path, message in recorder.replies:
        assert not message.has_error()
        reply = from_record(message.content, *REPLIES)
        seen[type(reply).__name__] += 1
        assert held(message.content) == {item.name for item in fields(reply)}
        own = site.load(Path(path))
        # What is public follows from the configuration and the declaration: no record was looked at for it.
        expected, released = public_values(own, config, reply)
        assert {item.name: getattr(reply, item.name) for item in fields(reply) if item.name not in released} == expected
        # What is released is in the ledger, to the bit, where the newest of each kind is kept.
        with site.open_ledger(own) as ledger:
            spends = {(spend.question.kind, spend.question.round): spend for spend in ledger.spends()}
            if released:
                kind = "train" if isinstance(reply, TrainReply) else "evaluate"
                spend = spends[kind, reply.round]
                assert spend.release.noise_multiplier == reply.noise_multiplier > 0
                if reply.round == max(number for k, number in spends if k == kind):
                    assert ledger.recall(spend.question) == messages.to_bytes(reply)
    assert seen == {"JoinReply": 3, "TrainReply": 15, "EvaluateReply": 9, "Refusal": 0}


def public_values(own: Site, config: RunConfig, reply: Any) -> tuple[dict[str, Any], set[str]]:
    """Compute a reply's public values from public values; name the fields that are released."""
    card = own.dataset.card()
    planned = plan.make(config, card)
    with site.open_ledger(own) as ledger:
        account = ledger.account
    if isinstance(reply, JoinReply):
        return {
            "site": own.name,
            "dataset": card.dataset,
            "unit": card.unit,
            "records": card.records,
            "validation": card.validation,
            "ledger_id": account,
            "ledger_number": 0,
            "ledger_head": ledger_chain.NO_HEAD,
        }, set()
    with site.open_ledger(own) as ledger:
        part, kind = ("train", "train") if isinstance(reply, TrainReply) else ("validation", "evaluate")
        until = [s for s in ledger.spends() if s.question.kind == kind and s.question.round <= reply.round]
    common = {
        "site": own.name,
        "round": reply.round,
        "epsilon": pytest.approx(answers.epsilon([s.release for s in until], config.privacy.delta)),
        "mechanism": "gaussian",
        "noise_source": "aes-256-ctr",
        "ledger_id": account,
        "ledger_number": until[-1].number,
        "ledger_head": until[-1].previous,
    }
    if part == "validation":
        return common | {"noise_multiplier": planned.evaluation_noise}, {"histogram"}
    phase = planned.phases[config.place(reply.round)[0]]
    return common | {
        "sampling_rate": phase.sampling_rate,
        "noise_multiplier": phase.noise_multiplier,
        "steps": phase.steps_per_round,
        "gradients": next(word for word in messages.GRADIENTS if word == reply.gradients),
    }, {"update"}


# -- what an error tells ---------------------------------------------------------------------------------------


@pytest.fixture
def send(new_config: Callable[..., RunConfig]) -> Callable[..., Any]:
    """Send one message to a fresh app whose site is `own`, and return the reply's record."""

    def deliver(own: Site | Exception, kind: Any, content: RecordDict) -> RecordDict:
        def site_of(_: Context) -> Site:
            if isinstance(own, Exception):
                raise own
            return own

        grid = InProcessGrid(client.app.build(site_of), {1: {"site": "x"}})
        message = Message(content=content, dst_node_id=1, message_type=FLOWER_TYPES[kind], group_id="1")
        (reply,) = grid.send_and_receive([message])
        assert not reply.has_error()
        return reply.content

    return deliver


def requests(desk: Any) -> dict[str, RecordDict]:
    """Make one good request of each kind."""
    model = models.load(desk.config)
    text = desk.config.as_json()
    join = messages.JoinRequest("run", text, model.base_digest, models.shapes(model.arrays()))
    train = messages.TrainRequest("run", text, 1, model.arrays())
    evaluate = messages.EvaluateRequest("run", text, 1, model.arrays())
    return {"join": to_record(join), "train": to_record(train), "evaluate": to_record(evaluate)}


def assert_refusal(record: RecordDict, outcome: str) -> str:
    reply = from_record(record, Refusal)
    assert held(record) == {"site", "outcome", "reason"}
    assert reply.outcome == outcome
    assert SECRET not in repr(record)
    assert "\n" not in reply.reason
    return str(reply.reason)


def test_a_row_at_fault_is_told_to_the_sites_log_and_to_nobody_else(
    new_desk: Callable[..., Any], new_rows: Callable[..., Any], send: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*new_rows(20), {"id": SECRET, "text": SECRET, "label": SECRET}]
    desk = new_desk(rows=rows)
    reasons = {assert_refusal(send(desk.site, kind, record), "failed") for kind, record in requests(desk).items()}
    assert reasons == {"the site's data or machine is at fault; its own log says why."}
    assert f"row 21: 'label' holds the label {SECRET!r}" in caplog.text
    assert desk.spent() == 0


def test_an_unforeseen_error_is_told_to_the_sites_log_and_to_nobody_else(
    new_desk: Callable[..., Any], send: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    desk = new_desk()
    wanted = requests(desk)

    def raise_it(*_: Any, **__: Any) -> Any:
        raise RuntimeError(SECRET)

    monkeypatch.setattr("client.data.load", raise_it)
    reasons = {assert_refusal(send(desk.site, kind, record), "failed") for kind, record in wanted.items()}
    assert reasons == {"the site failed; its own log says why."}
    assert SECRET in caplog.text


@pytest.mark.parametrize("error", [ConfigError(SECRET), DataError(SECRET), ValueError(SECRET)])
def test_a_site_toml_at_fault_is_told_to_the_sites_log_and_to_nobody_else(
    new_desk: Callable[..., Any], send: Any, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    for kind, record in requests(new_desk()).items():
        assert_refusal(send(error, kind, record), "failed")
    assert SECRET in caplog.text


def test_a_refusal_that_rests_on_public_values_says_why(new_desk: Callable[..., Any], send: Any) -> None:
    desk = new_desk(site={"privacy": {"max_run_epsilon": 1.0}})
    for kind, record in requests(desk).items():
        assert "max_run_epsilon" in assert_refusal(send(desk.site, kind, record), "refused")


@pytest.mark.parametrize(
    ("setting", "limits"),
    [
        ("federation.coordinator='coordinator'", {"coordinators": [SECRET]}),
        ("model.name=", {"models": [f"/srv/{SECRET}/*"]}),
        ("task.name='text-classification'", {"tasks": [SECRET]}),
    ],
)
def test_a_name_that_is_not_allowed_is_refused_without_the_names_that_are(
    new_desk: Callable[..., Any], send: Any, setting: str, limits: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    desk = new_desk(site={"privacy": limits})
    for kind, record in requests(desk).items():
        reason = assert_refusal(send(desk.site, kind, record), "refused")
        assert setting in reason
        assert f"[privacy] {next(iter(limits))}" in reason
    assert SECRET in caplog.text  # of the site


def test_another_data_set_in_the_ledger_is_named_to_the_sites_log_and_to_nobody_else(
    new_desk: Callable[..., Any], send: Any, caplog: pytest.LogCaptureFixture
) -> None:
    desk = new_desk()
    privacy = desk.site.privacy
    with Ledger.open(desk.site.ledger, dataset=SECRET, delta=privacy.delta, max_epsilon=privacy.max_epsilon) as other:
        other.charge(Question("run", "1", "d", 1, "train", "train"), Release(0.03, 1.0, 1), lambda *_: b"reply")
    for kind, record in requests(desk).items():
        assert_refusal(send(desk.site, kind, record), "failed")
    assert SECRET in caplog.text


def test_a_site_without_budget_says_so_and_only_then(new_desk: Callable[..., Any], send: Any) -> None:
    desk = new_desk(site={"privacy": {"max_epsilon": 2.0}})
    for kind, record in requests(desk).items():
        assert "max_epsilon" in assert_refusal(send(desk.site, kind, record), "exhausted")
    assert desk.spent() == 0


def test_a_message_that_is_none_of_ours_is_not_answered(desk: Any, send: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    good = requests(desk)
    number = Array(np.zeros(3, np.float32))
    strange = {
        "nothing": RecordDict(),
        "another kind": good["evaluate"],
        "a field more": RecordDict({**good["train"], "code": ArrayRecord({"x": number})}),
        "a field less": RecordDict({"values": good["train"]["values"]}),
        "text as arrays": with_values(good["train"], run=None) | {"run": ArrayRecord({"x": number})},
        "arrays as text": RecordDict({"values": ConfigRecord({**good["train"]["values"], "arrays": "none"})}),
        "a round that is no number": RecordDict(with_values(good["train"], round="1")),
        "a round that is a truth": RecordDict(with_values(good["train"], round=True)),
        "arrays of float64": RecordDict(
            {**good["train"], "arrays": ArrayRecord({"flat": Array(np.zeros(2, np.float64))})}
        ),
    }
    for name, record in strange.items():
        assert_refusal(send(desk.site, "train", RecordDict(dict(record))), "failed")
        assert desk.spent() == 0, name


def with_values(record: RecordDict, **changes: Any) -> dict[str, Any]:
    values = {**record["values"], **changes}
    kept = {name: value for name, value in values.items() if value is not None}
    return {**record, "values": ConfigRecord(kept)}


def test_good_requests_are_answered_by_their_kind(desk: Any, send: Any) -> None:
    expected = {"join": JoinReply, "train": TrainReply, "evaluate": EvaluateReply}
    for kind, record in requests(desk).items():
        assert type(from_record(send(desk.site, kind, record), *REPLIES)) is expected[kind]
    assert desk.spent() == 2


# -- which site a node is ----------------------------------------------------------------------------------------


def test_a_node_finds_its_site_by_its_own_configuration_or_by_its_number(
    new_site: Callable[..., Site], tmp_path: Path
) -> None:
    def context(run: str = "", **node: Any) -> Context:
        return Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config={"run": run})

    own = new_site("north")
    path = tmp_path / "north" / "site.toml"
    assert site_from_context(context(site=str(path), run="/elsewhere")) == own
    (tmp_path / "run" / "sites").mkdir(parents=True)
    (tmp_path / "north").rename(tmp_path / "run" / "sites" / "north")
    assert site_from_context(context(str(tmp_path / "run"), **{"partition-id": 0})).name == "north"
    for node in ({"partition-id": 1}, {"partition-id": -1}, {}):
        with pytest.raises(ConfigError, match="holds 1 sites"):
            site_from_context(context(str(tmp_path / "run"), **node))
