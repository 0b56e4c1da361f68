"""A contract with the installed Flower: what the in-process Grid relies on, and what an app may rely on."""

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp

from simulations.grid import InProcessGrid


class Nodes:
    """A ClientApp that tells who it is, and keeps who has worked."""

    def __init__(self):
        self.worked = []
        self.app = ClientApp()

        @self.app.train()
        def train(message: Message, context: Context) -> Message:
            self.worked.append(context.node_id)
            if message.content.config_records.get("fail"):
                raise ValueError("a record's text")
            runs = context.state.config_records.setdefault("runs", ConfigRecord({"count": 0}))
            runs["count"] += 1
            said = {"node": context.node_id, "name": context.node_config["name"], "runs": runs["count"]}
            return Message(RecordDict({"said": ConfigRecord(said)}), reply_to=message)


@pytest.fixture
def nodes():
    return Nodes()


@pytest.fixture
def grid(nodes):
    return InProcessGrid(nodes.app, {number: {"name": f"site-{number}"} for number in (3, 5, 8)}, run_id=42)


def message(node, content=None, **options):
    return Message(content=content or RecordDict(), dst_node_id=node, message_type="train", **options)


def test_it_is_a_grid_with_every_method_of_flowers(grid):
    assert isinstance(grid, Grid)
    assert not Grid.__abstractmethods__ - set(dir(type(grid)))
    assert list(grid.get_node_ids()) == [3, 5, 8]
    assert grid.run.run_id == 42


def test_every_message_has_an_id_of_its_own_even_with_the_same_content(grid):
    content = RecordDict({"values": ConfigRecord({"a": 1})})
    messages = [message(node, content, group_id="7") for node in (3, 5, 8, 3)]
    ids = list(grid.push_messages(messages))
    assert len(set(ids)) == 4
    assert [m.metadata.message_id for m in messages] == ids
    assert {(m.metadata.run_id, m.metadata.group_id) for m in messages} == {(42, "7")}


def test_a_reply_names_the_message_that_it_answers_and_its_node(grid):
    first, second = grid.push_messages([message(5), message(3)])
    (reply,) = grid.pull_messages([second])
    assert reply.metadata.reply_to_message_id == second
    assert reply.metadata.src_node_id == 3
    assert reply.content["said"]["name"] == "site-3"
    (reply,) = grid.pull_messages([first])
    assert reply.metadata.reply_to_message_id == first


def test_nothing_runs_before_its_reply_is_pulled_and_then_one_at_a_time(grid, nodes):
    ids = list(grid.push_messages([message(node) for node in (3, 5, 8)]))
    assert nodes.worked == []
    for number in (1, 2, 3):
        assert len(list(grid.pull_messages(ids))) == 1
        assert len(nodes.worked) == number
    assert list(grid.pull_messages(ids)) == []
    assert nodes.worked == [3, 5, 8]


def test_unknown_ids_have_no_reply(grid):
    assert list(grid.pull_messages(["nobody"])) == []


def test_an_exception_in_a_clientapp_is_an_error_reply_without_its_text(grid, caplog):
    content = RecordDict({"fail": ConfigRecord({"yes": True})})
    (message_id,) = grid.push_messages([message(5, content)])
    (reply,) = grid.pull_messages([message_id])
    assert reply.has_error()
    assert not reply.has_content()
    assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert "record" not in (reply.error.reason or "")
    assert reply.metadata.reply_to_message_id == message_id
    assert "node 5" in caplog.text


def test_a_message_to_nobody_is_an_error_reply(grid, caplog):
    (reply,) = grid.send_and_receive([message(99)])
    assert reply.has_error()


def test_an_interrupt_is_no_error_reply(grid, nodes):
    @nodes.app.evaluate()
    def evaluate(message, context):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(grid.send_and_receive([Message(RecordDict(), 3, "evaluate")]))


def test_sending_and_receiving_gives_one_reply_for_each_message(grid):
    replies = list(grid.send_and_receive([message(node) for node in (8, 3, 8)], timeout=5))
    assert [reply.content["said"]["node"] for reply in replies] == [8, 3, 8]


def test_a_node_keeps_its_state_and_its_configuration_from_message_to_message(grid):
    replies = list(grid.send_and_receive([message(3), message(3), message(5)]))
    assert [(r.content["said"]["name"], r.content["said"]["runs"]) for r in replies] == [
        ("site-3", 1),
        ("site-3", 2),
        ("site-5", 1),
    ]


def test_a_serverapp_runs_on_it_and_its_errors_come_out(grid):
    app = ServerApp()
    seen = []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        seen.extend(reply.content["said"]["node"] for reply in grid.send_and_receive([message(3), message(5)]))
        raise LookupError(context.run_config["why"])

    context = Context(run_id=42, node_id=0, node_config={}, state=RecordDict(), run_config={"why": "because"})
    with pytest.raises(LookupError, match="because"):
        app(grid, context)
    assert seen == [3, 5]


def test_an_error_reply_can_be_made_and_read_as_flower_does(grid):
    sent = message(3)
    list(grid.push_messages([sent]))
    reply = Message(Error(5, "gone"), reply_to=sent)
    assert (reply.error.code, reply.error.reason) == (5, "gone")
    assert reply.metadata.reply_to_message_id == sent.metadata.message_id
