"""Replies from a real SuperLink: what a hostile site may send costs it its own reply, and nobody else anything."""

import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from doors import SuperLink, free_port, new_site, opened
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.runtime_pb2 import PullTaskInputRequest
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid
from hands import Hand, pieces_of, tree_of

from server.daemon.flower import Flower
from server.dispatch import Answer, Desk, Question
from server.parcels import Parcels
from shared.certificates import loopback
from shared.messages import JoinReply, JoinRequest, Refusal, to_record

REPLY = JoinReply("honest", "notes", "record", 100, 0.2, "ab" * 16, 0, "0" * 64)
MIB = 2**20
pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # flwr's build of a bundle


class Playing:
    """A Flower run under way: its grid, as a ServerApp has it, and two sites by hand."""

    def __init__(self, grid: HttpGrid, database: Path, hands: dict[str, Hand]) -> None:
        self.grid, self.database, self.hands = grid, database, hands
        self.asked: dict[str, Message] = {}

    def ask(
        self,
        hostile: Callable[[Hand, Message], None],
        deadline: float = 8.0,
        each: Callable[[], object] = lambda: None,
    ) -> dict[str, Answer[JoinReply]]:
        """Ask both sites to join; `hostile` answers for one, the other is honest."""
        names = {hand.node.node_id: name for name, hand in self.hands.items()}
        desk = Desk(self.grid, lambda letter, why: None)
        desk.look()
        question = Question("join", 0, JoinRequest("run", secrets.token_hex(4), "", "{}"), JoinReply)
        desk.post(question, names)
        self.asked = {name: hand.pull() for name, hand in self.hands.items()}
        hostile(self.hands["hostile"], self.asked["hostile"])
        honest(self.hands["honest"], self.asked["honest"])
        answers = {}
        for answer in desk.ask(question, names, deadline):
            answers[names[answer.node]] = answer
            each()
        return answers

    def kept(self) -> int:
        """Return how many bytes of pieces the SuperLink keeps."""
        with closing(sqlite3.connect(self.database)) as link:
            return int(link.execute("SELECT coalesce(sum(length(content)), 0) FROM objects").fetchone()[0])


def honest(hand: Hand, asked: Message) -> None:
    send(hand, asked, Message(to_record(REPLY), reply_to=asked))


@pytest.fixture(scope="module")
def playing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Playing]:
    folder = tmp_path_factory.mktemp("parcels")
    secret = secrets.token_bytes(32)
    (folder / "secret").write_bytes(secret)
    isolation = ("--isolation", "process", "--superexec-auth-secret-file", str(folder / "secret"))
    link = SuperLink(folder, loopback(folder / "tls"), free_port(), isolation=isolation)
    with ExitStack() as ending:
        link.start()
        ending.callback(link.stop)
        sites = {name: new_site(folder, name) for name in ("hostile", "honest")}
        flower = Flower(link.address, link.tls.ca, secret)
        ending.callback(flower.close)
        nodes = {name: flower.register(site.public, name) for name, site in sites.items()}
        door = ending.enter_context(opened(link, link.tls, {site.public: name for name, site in sites.items()}))
        hands = {name: Hand(door, sites[name], node) for name, node in nodes.items()}
        started = flower.start(folder)
        grid = HttpGrid(link.address, root_certificates=link.tls.ca.read_bytes(), token=started.token)
        ending.callback(grid.close)
        begin(grid, started.id)
        for hand in hands.values():
            hand.activate()
            ending.callback(hand.close)
        yield Playing(grid, folder / "link.db", hands)


def begin(grid: HttpGrid, run: int) -> None:
    """Take the run's task up, as flwr-serverapp does."""
    grid._runtime_client.PullTaskInput(PullTaskInputRequest())
    grid.set_run(Run.create_empty(run))
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run, 1, 1


def test_an_honest_reply_arrives_whole(playing: Playing) -> None:
    answers = playing.ask(honest)
    assert {name: each.reply for name, each in answers.items()} == {"hostile": REPLY, "honest": REPLY}


def test_a_reply_that_is_far_too_large_is_let_go_at_the_limit_and_the_others_count(
    playing: Playing, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []
    piece = Parcels._piece

    def counted(self: Parcels, key: str) -> bytes | None:
        fetched.append(piece(self, key) or b"")
        return fetched[-1]

    monkeypatch.setattr(Parcels, "_piece", counted)

    def flood(hand: Hand, asked: Message) -> None:
        record = to_record(REPLY)
        record["update"] = ArrayRecord({"flat": Array(np.random.default_rng(0).random(8 * MIB, np.float32))})
        send(hand, asked, Message(record, reply_to=asked))

    answers = playing.ask(flood)
    assert answers["honest"].reply == REPLY
    assert answers["hostile"].outcome == "failed"
    assert "more than 1048576 bytes" in (answers["hostile"].error or "")
    assert sum(map(len, fetched)) < 8 * MIB
    assert playing.kept() < MIB  # the SuperLink has let go of it


def test_a_reply_that_is_announced_and_never_sent_holds_nobody_up(playing: Playing) -> None:
    def withhold(hand: Hand, asked: Message) -> None:
        hand.announce(Message(to_record(REPLY), reply_to=asked))

    started = time.monotonic()
    arrived = []
    answers = playing.ask(withhold, deadline=4.0, each=lambda: arrived.append(time.monotonic() - started))
    assert (answers["honest"].reply, answers["hostile"].outcome) == (REPLY, "timeout")
    assert arrived[0] < 3 < arrived[1] < 8


def test_a_reply_that_comes_slowly_is_taken_when_it_is_whole(playing: Playing) -> None:
    ending: list[threading.Thread] = []

    def slowly(hand: Hand, asked: Message) -> None:
        answer = Message(to_record(REPLY), reply_to=asked)
        told = hand.announce(answer)

        def send() -> None:
            for key, content in pieces_of(answer).items():
                time.sleep(0.4)
                hand.upload(asked.metadata.run_id, told, {key: content})

        ending.append(threading.Thread(target=send))
        ending[0].start()

    answers = playing.ask(slowly)
    ending[0].join()
    assert {name: each.reply for name, each in answers.items()} == {"hostile": REPLY, "honest": REPLY}


GARBAGE = sha256(b"x").hexdigest()


@pytest.mark.parametrize(
    "content",
    [
        b"Message  7\0garbage",
        f"Message {GARBAGE} 0\0".encode(),
        b"CustomDataClass  3\0abc",
        b"ArrayRecord  2\0{}",
        b"RecordDict  2\0[]",
    ],
)
def test_a_reply_that_cannot_be_read_fails_its_site_alone(playing: Playing, content: bytes) -> None:
    def garble(hand: Hand, asked: Message) -> None:
        key = sha256(content).hexdigest()
        told = hand.announce(Message(RecordDict(), reply_to=asked), tree_of(key))
        assert hand.upload(asked.metadata.run_id, told, {key: content}) == [True]

    answers = playing.ask(garble)
    assert answers["honest"].reply == REPLY
    assert answers["hostile"].outcome == "failed"
    assert "cannot be read" in (answers["hostile"].error or "")


def test_a_reply_answers_what_the_superlink_checked_and_not_what_it_says(playing: Playing) -> None:
    def forge(hand: Hand, asked: Message) -> None:
        forged = Message(to_record(Refusal("honest", "exhausted", "forged")), reply_to=asked)
        forged.metadata.__dict__["_reply_to_message_id"] = playing.asked["honest"].metadata.message_id
        key, pieces = forged.object_id, pieces_of(forged)
        envelope = Message(RecordDict(), reply_to=asked)
        told = hand.announce(envelope, get_object_tree(forged))
        assert envelope.metadata.message_id == key
        assert all(hand.upload(asked.metadata.run_id, told, pieces))

    answers = playing.ask(forge)
    assert answers["honest"].reply == REPLY
    assert (answers["hostile"].outcome, answers["hostile"].error) == ("exhausted", "forged")


def send(hand: Hand, asked: Message, answer: Message) -> None:
    told = hand.announce(answer)
    assert all(hand.upload(asked.metadata.run_id, told, pieces_of(answer)))


@pytest.mark.parametrize("forged", ["a request", "a reply"])
def test_a_site_that_knows_anothers_node_hands_in_nothing_in_its_name_nor_in_the_coordinators(
    playing: Playing, forged: str
) -> None:
    def forge(hand: Hand, asked: Message) -> None:
        victim = playing.hands["honest"].node.node_id
        message = Message(to_record(Refusal("honest", "exhausted", "forged")), reply_to=playing.asked["honest"])
        if forged == "a request":
            message = Message(to_record(JoinRequest("other", "{}", "", "{}")), dst_node_id=victim, message_type="query")
            assert message.metadata.src_node_id == 1  # the coordinator
        else:
            message.metadata.__dict__["_src_node_id"] = victim
        assert hand.announce(message).status_code == 400
        honest(hand, asked)

    answers = playing.ask(forge)
    assert {name: each.reply for name, each in answers.items()} == {"hostile": REPLY, "honest": REPLY}
    request = PullMessagesRequest(node=playing.hands["honest"].node)
    assert not playing.hands["honest"].call("pull-messages", request, PullMessagesResponse).messages_list
