"""Dispatch over Flower messages: whose answer it is, what went wrong, and who was silent."""

import gc
import json
import threading
import time
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from grids import WildGrid

from server import clock as machine
from server import dispatch, mail
from server.aggregation import Fold
from server.dispatch import Desk, Question
from shared import messages
from shared.errors import MachineError
from shared.messages import JoinReply, JoinRequest, Refusal, TrainReply, TrainRequest
from simulations.grid import InProcessGrid

REQUEST = TrainRequest("run-1", "{}", 2, {"a": np.ones(3, np.float32)})


def reply(site="a", **changed):
    values = {"site": site, "round": 2, "update": {"a": np.ones(3, np.float32)}, "sampling_rate": 0.5}
    values |= {"noise_multiplier": 1.0, "steps": 1, "epsilon": 0.5}
    values |= {"mechanism": "gaussian", "noise_source": "aes-256-ctr", "gradients": "hooks"}
    values |= {"ledger_id": "ab" * 16, "ledger_number": 1, "ledger_head": "0" * 64}
    return TrainReply(**{**values, **changed})


class Federation(InProcessGrid):
    """Nodes that answer as a function of their id says; replies come in the order given, some never."""

    def __init__(self, answer, nodes=(1, 2, 3), order=None, silent=()):
        app = ClientApp()

        @app.train()
        def train(message, context):
            answered = answer(context.node_id)
            if isinstance(answered, Error):
                return Message(answered, reply_to=message)
            content = answered if isinstance(answered, RecordDict) else messages.to_record(answered)
            return Message(content, reply_to=message)

        super().__init__(app, {node: {} for node in nodes})
        self.order, self.silent, self.seen = order, silent, []

    def pull_messages(self, message_ids):
        waiting = {self._waiting[i].metadata.dst_node_id: i for i in message_ids if i in self._waiting}
        self.seen.append(len(waiting))
        ready = [node for node in (self.order or sorted(waiting)) if node in waiting and node not in self.silent]
        return super().pull_messages([waiting[node] for node in ready[:1]])


def question(**settings):
    return Question("train", 2, REQUEST, TrainReply, **settings)


def desk_of(grid):
    dropped = []
    desk = Desk(grid, lambda letter, why: dropped.append((letter.site, letter.question.number, why)))
    return desk, dropped


def named(nodes):
    return {node: f"site-{node}" for node in nodes}


def train(grid, nodes=(1, 2, 3), deadline=5.0):
    return list(desk_of(grid)[0].ask(question(), named(nodes), deadline))


def test_replies_are_matched_to_their_nodes_in_whatever_order_they_come():
    grid = Federation(lambda node: reply(f"site-{node}"), order=[3, 1, 2])
    answers = train(grid)
    assert [(a.node, a.reply.site, a.outcome, a.error) for a in answers] == [
        (3, "site-3", "ok", None),
        (1, "site-1", "ok", None),
        (2, "site-2", "ok", None),
    ]


def test_an_answer_tells_its_time_and_its_bytes():
    (answer,) = train(Federation(lambda node: reply(update={"a": np.ones(10_000, np.float32)}), nodes=[1]), [1])
    assert 40_000 < answer.bytes_up < 42_000
    assert 12 <= answer.bytes_down < 1_500
    assert 0 <= answer.seconds < 5


def test_an_answer_is_given_before_the_next_site_works():
    worked = []

    def answer(node):
        worked.append(node)
        return reply(f"site-{node}")

    for number, _ in enumerate(desk_of(Federation(answer))[0].ask(question(), named([1, 2, 3]), 5), 1):
        assert len(worked) == number


def test_a_refusal_is_named_with_its_reason_and_a_failure_is_no_refusal():
    said = {1: Refusal("a", "refused", "limit of 8"), 2: Refusal("b", "failed", "its log"), 3: Refusal("c", "ok", "?")}
    answers = {a.node: (a.outcome, a.error, a.reply) for a in train(Federation(said.get))}
    assert answers == {
        1: ("refused", "limit of 8", None),
        2: ("failed", "its log", None),
        3: ("failed", "?", None),  # what is no refusal is a failure
    }


def test_a_reason_is_one_line_that_fits_into_a_history():
    said = {
        1: Refusal("a", "refused", "no\n" + "x" * 1000),
        2: Refusal("b", "refused", "x" * 100_000),
        3: reply(site="x"),
    }
    answers = {a.node: a.error for a in train(Federation(said.get))}
    assert answers == {1: "no", 2: "x" * 500, 3: None}


def test_flowers_own_errors_are_failures_with_a_reason_in_one_line():
    said = {1: Error(5, "node is gone\nTraceback (most recent call last):\n  a record"), 2: Error(3), 3: reply("c")}
    answers = {a.node: (a.outcome, a.error) for a in train(Federation(said.get))}
    assert answers == {1: ("failed", "node is gone"), 2: ("failed", "Flower error 3."), 3: ("ok", None)}


def test_an_exception_in_a_clientapp_fails_its_site_alone(caplog):
    def answer(node):
        if node == 2:
            raise RuntimeError("text of a record")
        return reply(f"site-{node}")

    answers = {a.node: (a.outcome, a.error) for a in train(Federation(answer))}
    assert answers[1] == answers[3] == ("ok", None)
    assert answers[2][0] == "failed"
    assert "text of a record" not in answers[2][1]


def without(record, name):
    del record["values"][name]
    return record


def with_value(record, name, value):
    record["values"][name] = value
    return record


def with_arrays(record, array):
    record["update"] = ArrayRecord({"flat": array})
    return record


good = messages.to_record
MALFORMED = {
    "a missing field": lambda: without(good(reply()), "steps"),
    "an extra field": lambda: with_value(good(reply()), "loss", 0.3),
    "a number as text": lambda: with_value(good(reply()), "epsilon", "0.5"),
    "a whole number for a float": lambda: with_value(good(reply()), "epsilon", 1),
    "float64": lambda: with_arrays(good(reply()), Array(np.ones(3))),
    "garbage for an array": lambda: with_arrays(good(reply()), Array("float32", (3,), "numpy.ndarray", b"garbage")),
    "an unknown serialisation": lambda: with_arrays(good(reply()), Array("float32", (3,), "pickle", b"garbage")),
    "shapes that numpy cannot count": lambda: with_value(
        with_arrays(good(reply()), Array(np.ones(1000, np.float32))),
        "update.shapes",
        json.dumps({"a": [1000], "b": [1000] * 15 + [0]}),
    ),
    "another message": lambda: good(JoinReply("a", "d", "record", 10, 0.1, "ab" * 16, 0, "0" * 64)),
    "no values": lambda: RecordDict({"update": ArrayRecord()}),
    "nothing": RecordDict,
    "empty words": lambda: with_value(good(JoinReply("", "", "record", 1, 0.1, "", 0, "")), "more", ""),
    "an empty list": lambda: with_value(good(reply()), "steps", []),
    "no name": lambda: RecordDict({"values": ConfigRecord({"site": "a"})}),
}


@pytest.mark.parametrize("malformed", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_reply_fails_its_site_with_a_reason_and_the_others_go_on(malformed):
    answers = {a.node: a for a in train(Federation(lambda node: malformed() if node == 2 else reply(f"s{node}")))}
    assert (answers[1].outcome, answers[3].outcome) == ("ok", "ok")
    assert (answers[2].outcome, answers[2].reply) == ("failed", None)
    assert answers[2].error
    assert "\n" not in answers[2].error


def test_silence_past_the_deadline_is_a_timeout_and_comes_last():
    grid = Federation(lambda node: reply(f"site-{node}"), silent={1})
    started = time.monotonic()
    answers = train(grid, deadline=0.3)
    assert 0.3 <= time.monotonic() - started < 3
    assert [(a.node, a.outcome) for a in answers] == [(2, "ok"), (3, "ok"), (1, "timeout")]
    assert answers[-1].error == "no reply within 0.3 s (federation.deadline)."
    assert answers[-1].bytes_up == 0


def test_a_second_reply_to_one_request_does_not_count():
    class Twice(Federation):
        def pull_messages(self, message_ids):
            replies = list(super().pull_messages(message_ids))
            return [*replies, *replies]

    answers = train(Twice(lambda node: reply(f"site-{node}")))
    assert [(a.node, a.outcome) for a in answers] == [(1, "ok"), (2, "ok"), (3, "ok")]


def test_nobody_is_asked_when_there_is_nobody():
    assert train(Federation(lambda node: reply()), nodes=[]) == []


def test_a_request_reaches_the_handler_of_its_kind():
    app = ClientApp()

    @app.query()
    def query(message, context):
        request = messages.from_record(message.content, JoinRequest)
        return Message(
            messages.to_record(JoinReply(request.run, "d", "record", 10, 0.1, "ab" * 16, 0, "0" * 64)), reply_to=message
        )

    request = JoinRequest("run-9", "{}", "0", "{}")
    asked = Question("join", 0, request, JoinReply)
    (answer,) = desk_of(InProcessGrid(app, {7: {}}))[0].ask(asked, named([7]), 5)
    assert answer.reply == JoinReply("run-9", "d", "record", 10, 0.1, "ab" * 16, 0, "0" * 64)


# -- nodes that are late, gone, or started anew ---------------------------------------------------------------------


def wild(answer=lambda node: reply(f"site-{node}"), nodes=(1, 2, 3), **settings):
    app = ClientApp()

    @app.train()
    def train(message, context):
        answered = answer(context.node_id)
        content = answered if isinstance(answered, Error) else messages.to_record(answered)
        return Message(content, reply_to=message)

    return WildGrid(app, {node: {} for node in nodes}, **settings)


def outcomes(answers):
    return [(answer.node, answer.outcome) for answer in answers]


def test_a_late_reply_is_told_by_site_and_round_and_answers_no_later_question():
    grid = wild(delay=lambda node, kind, group: 0.4 if (node, group) == (2, "2") else 0.0)
    desk, dropped = desk_of(grid)
    desk.look()
    assert outcomes(desk.ask(question(), named([1, 2, 3]), 0.2)) == [(1, "ok"), (3, "ok"), (2, "timeout")]
    assert desk.owing() == {2}
    next_one = Question("train", 3, REQUEST, TrainReply)
    grid.delay = lambda *_: 0.6  # the late reply comes while this one is waited for
    answers = list(desk.ask(next_one, named([1, 2]), 5))
    assert outcomes(answers) == [(1, "ok"), (2, "ok")]
    assert all(answer.seconds >= 0.6 for answer in answers)
    assert [(site, number) for site, number, _ in dropped] == [("site-2", 2)]
    assert "after the deadline" in dropped[0][2]
    assert desk.owing() == set()


def test_what_comes_late_is_found_between_questions_too():
    desk, dropped = desk_of(wild(delay=lambda node, *_: 0.3 * node))
    list(desk.ask(question(), named([1, 2]), 0.1))
    assert desk.collect() == []
    time.sleep(0.7)
    assert desk.collect() == []
    assert [site for site, *_ in dropped] == ["site-1", "site-2"]


def test_the_same_question_asked_again_waits_for_the_first_message_and_sends_no_second():
    grid = wild(delay=lambda node, *_: 0.4 if node == 2 else 0.0)
    desk, dropped = desk_of(grid)
    desk.look()
    asked = question()
    assert outcomes(desk.ask(asked, named([1, 2]), 0.1)) == [(1, "ok"), (2, "timeout")]
    assert outcomes(desk.ask(asked, named([2]), 5)) == [(2, "ok")]
    assert [node for node, *_ in grid.pushed] == [1, 2]
    assert dropped == []


def test_a_node_that_was_started_anew_is_asked_again(monkeypatch):
    monkeypatch.setattr(dispatch, "LOOK", 0.1)
    grid = wild(delay=lambda *_: 0.3)
    desk, dropped = desk_of(grid)
    desk.look()
    answers = []
    asking = threading.Thread(target=lambda: answers.extend(desk.ask(question(), named([1, 2]), 10)))
    asking.start()
    time.sleep(0.1)
    grid.starts[2] = 1
    asking.join(10)
    assert sorted(outcomes(answers)) == [(1, "ok"), (2, "ok")]
    assert [node for node, *_ in grid.pushed] == [1, 2, 2]
    assert dropped == []


def test_whoever_stops_listening_has_the_rest_later_and_what_lasts_is_kept_meanwhile():
    grid = wild(nodes=(1, 2, 3, 4))
    desk, dropped = desk_of(grid)
    desk.look()
    lasting = question()
    desk.lasting.update({node: (lasting, f"site-{node}") for node in (1, 2, 3)})
    heard = []
    for asked, answer in desk.hear(desk.lasting, desk.clock.now() + 5):
        heard.append((asked.number, answer.node))
        break
    next_one = Question("train", 3, REQUEST, TrainReply)
    assert outcomes(desk.ask(next_one, named([4]), 5)) == [(4, "ok")]
    assert desk.collect() == []
    assert set(desk.lasting) == {2, 3}
    heard += [(asked.number, answer.node) for asked, answer in desk.hear(desk.lasting, desk.clock.now() + 5)]
    assert heard == [(2, 1), (2, 2), (2, 3)]
    assert [node for node, *_ in grid.pushed] == [1, 2, 3, 4]
    assert dropped == []


def test_a_node_that_goes_away_fails_at_once_and_not_at_the_deadline():
    grid = wild()
    grid.away = {2}
    started = time.monotonic()
    assert sorted(outcomes(train(grid, deadline=30))) == [(1, "ok"), (2, "failed"), (3, "ok")]
    assert time.monotonic() - started < 5


def test_a_message_that_cannot_be_pushed_is_its_nodes_failure():
    grid = wild()
    grid.unpushable = {2}
    answers = {answer.node: answer for answer in train(grid)}
    assert (answers[1].outcome, answers[3].outcome) == ("ok", "ok")
    assert (answers[2].outcome, answers[2].error) == ("failed", "the request could not be handed to the SuperLink.")


def test_messages_that_are_too_large_together_are_pushed_one_by_one():
    class Narrow(WildGrid):
        def push_messages(self, messages):
            messages = list(messages)
            too_large = len(messages) > 1 or messages[0].metadata.dst_node_id == 3
            return [] if too_large else super().push_messages(messages)  # as HttpGrid does at status 413

    grid = wild()
    grid.__class__ = Narrow
    assert sorted(outcomes(train(grid))) == [(1, "ok"), (2, "ok"), (3, "failed")]


def test_a_message_lost_on_its_way_is_asked_for_once_more():
    said = {1: [Error(4, "lost"), reply()], 2: [Error(3, "lost"), Error(3, "lost again"), reply()]}
    answers = train(wild(lambda node: said[node].pop(0), nodes=(1, 2)), nodes=(1, 2))
    assert [(a.node, a.outcome, a.error) for a in answers] == [(1, "ok", None), (2, "failed", "lost again")]


def test_a_reply_beyond_the_size_of_an_honest_one_is_refused_unread():
    grid = wild(lambda node: reply(update={"a": np.ones(5000 if node == 2 else 3, np.float32)}))
    desk, _ = desk_of(grid)
    answers = {answer.node: answer for answer in desk.ask(question(largest=10_000), named([1, 2]), 5)}
    assert answers[1].outcome == "ok"
    assert answers[2].outcome == "failed"
    assert "at most 10000 are expected" in answers[2].error
    assert answers[2].reply is None


def test_a_site_that_answers_twice_at_once_counts_once_and_is_named():
    grid = wild()
    grid.twice = {2}
    desk, dropped = desk_of(grid)
    assert outcomes(desk.ask(question(), named([1, 2, 3]), 5)) == [(1, "ok"), (2, "ok"), (3, "ok")]
    assert dropped == [("site-2", 2, "it answered twice; the first answer counts.")]


def test_replies_are_fetched_in_shares_that_fit_into_memory_and_small_ones_at_once():
    for largest, most in ((mail.MEMORY // 2, 2), (mail.MEMORY * 9, 1), (1000, 20)):
        grid = wild(nodes=range(1, 21))
        desk, _ = desk_of(grid)
        assert len(list(desk.ask(question(largest=largest), named(range(1, 21)), 5))) == 20
        assert max(grid.pulls) == most


def test_looks_for_replies_are_quick_at_first_and_rare_in_a_long_round(monkeypatch):
    grid = wild(nodes=[1], delay=lambda *_: 100.0)
    slept = []
    clock = iter(range(10_000))
    monkeypatch.setattr(machine.time, "monotonic", lambda: next(clock) / 2)
    monkeypatch.setattr(machine.time, "sleep", slept.append)
    list(desk_of(grid)[0].ask(question(), named([1]), 60.0))
    assert slept[0] == 0.05
    assert slept[-1] == 0.5
    assert slept == sorted(slept)


def test_a_grid_that_fails_is_the_machines_fault_in_one_line():
    class Broken(WildGrid):
        def pull_messages(self, message_ids):
            raise ConnectionError("the SuperLink is gone\nand a second line")

    grid = wild()
    grid.__class__ = Broken
    with pytest.raises(MachineError) as raised:
        train(grid)
    assert "ConnectionError: the SuperLink is gone)" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_memory_does_not_grow_with_the_number_of_sites():
    """4 MB a reply, all there at once: what is held is a share of them, and the fold."""
    like = {"a": np.zeros(1_000_000, np.float32)}

    def peak(count):
        grid = wild(lambda node: reply(update={"a": np.full(1_000_000, node, np.float32)}), nodes=range(1, count + 1))
        desk, fold = desk_of(grid)[0], Fold(like)
        tracemalloc.start()
        for answer in desk.ask(question(largest=9_000_000), named(range(1, count + 1)), 60):
            fold.add(answer.reply.update)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        np.testing.assert_allclose(fold.mean()["a"][0], (count + 1) / 2)
        return most

    gc.collect()
    gc.disable()  # what is let go is gone, and does not wait for a collection
    try:
        peak(1)
        assert peak(100) < 1.1 * peak(20)
    finally:
        gc.enable()
