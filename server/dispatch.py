"""Ask nodes, yield their answers as they come, and drop what comes too late.

A reply is matched by the message that it answers, because Flower's own error replies do not name their node. One
reply at a time is read, and let go before the next.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from server import clock, mail
from server.history.records import Outcome
from server.mail import Node
from shared.messages import Held, Kind, MessageError, Refusal, content_size, from_record, size, to_record

R = TypeVar("R")

QUICK, SLOW = 0.05, 0.5  # seconds between looks for replies: when one has just come, and when that is long ago
PACE = 0.02  # between the two: a look is late by at most this share of the time waited
LOOK = 5.0  # seconds between looks for nodes that were started anew, and have forgotten what they were asked
LOST = (3, 4)  # Flower's codes for a message that was lost on its way; to ask again costs the site nothing
REFUSALS: dict[str, Outcome] = {"refused": "refused", "exhausted": "exhausted"}  # any other word: failed
LONGEST = 500  # characters of a reason that the history keeps: its first line, and no traceback
UNSENT = "the request could not be handed to the SuperLink."
SMALL = 2**20  # bytes: more than any reply without parameters has


@dataclass(frozen=True)
class Answer(Generic[R]):
    """A node's reply to one question, or why there is none; `seconds` is from the sending to the reply's arrival."""

    node: int
    outcome: Outcome
    reply: R | None
    error: str | None
    seconds: float
    bytes_down: int
    bytes_up: int


@dataclass(frozen=True, eq=False)
class Question(Generic[R]):
    """What nodes are asked in round `number`, and what answers it; an honest reply has at most `largest` bytes."""

    kind: Kind
    number: int
    request: Any
    expected: type[R]
    largest: int = SMALL

    @cached_property
    def held(self) -> Held:
        """The request for nodes of this machine, whom nothing need be written down for."""
        return Held(self.request)

    @cached_property
    def content(self) -> RecordDict:
        """The request written down, once for all nodes."""
        return to_record(self.request)

    @cached_property
    def bytes(self) -> int:
        """What it takes to send it."""
        return content_size(self.held)


@dataclass(frozen=True)
class Letter:
    """A question under way to one node, or its answer back; `sent` and `due` by the desk's clock."""

    node: int
    site: str
    question: Question[Any]
    sent: float
    due: float
    activated: str  # the node's start that it was sent to


Work = dict[int, tuple[Question[Any], str]]  # by node: what it is asked, and its site's name


class Desk:
    """All that one attempt at a run has under way.

    Parameters
    ----------
    dropped
        Told of each reply that does not count: the letter, and why. It came late, or it is a second one.

    Attributes
    ----------
    online
        Who is connected, as of the last look.
    lasting
        What nodes may take longer for than a round: an answer to it is kept until `hear` is asked for it.
    """

    def __init__(self, grid: Grid, dropped: Callable[[Letter, str], None]) -> None:
        self._grid, self._dropped = grid, dropped
        self.clock = clock.of(grid)
        self._fetch_replies = mail.fetcher(grid)
        self.online: dict[int, Node] = {}
        self.lasting: Work = {}
        self._under_way: dict[str, Letter] = {}
        self._answered: dict[str, Letter] = {}  # of what was asked last
        self._inbox: list[Answer[Any]] = []  # answers to what was posted
        self._kept: list[tuple[Message, Letter]] = []  # answers to what lasts

    def look(self) -> dict[int, Node]:
        """See who is connected, and forget what was sent to a node that was started anew since."""
        self.online = mail.connected(self._grid)
        for key, letter in list(self._under_way.items()):
            node = self.online.get(letter.node)
            if node is not None and node.activated != letter.activated:
                del self._under_way[key]
        return self.online

    def asked(self, question: Question[Any]) -> set[int]:
        """Return the nodes that a question is under way to."""
        return {letter.node for letter in self._under_way.values() if letter.question is question}

    def owing(self, but: Question[Any] | None = None) -> set[int]:
        """Return the nodes at work on a question of a round, other than this one: a new one would wait behind it."""
        letters = self._under_way.values()
        return {each.node for each in letters if each.question.kind != "join" and each.question is not but}

    def since(self, node: int) -> float:
        """Return for how many seconds a node has been at work on what it was asked, or its answer has waited."""
        letters = [*self._under_way.values(), *(letter for _, letter in self._kept)]
        sent = [each.sent for each in letters if each.node == node and each.question.kind != "join"]
        return self.clock.now() - min(sent, default=self.clock.now())

    def ask(self, question: Question[R], nodes: Mapping[int, str], deadline: float) -> Iterator[Answer[R]]:
        """Ask nodes (with their sites' names), and yield one answer each, in order of arrival.

        Nodes that have not answered `deadline` seconds from now are yielded last, as timeouts; what they send later is
        dropped, unless the question is asked again. A reply that is there when it is looked for is in time.
        """
        missing: Work = {node: (question, site) for node, site in nodes.items()}
        for _, answer in self.hear(missing, self.clock.now() + deadline):
            yield answer
        for node in missing:
            reason = f"no reply within {deadline:g} s (federation.deadline)."
            yield Answer(node, "timeout", None, reason, deadline, question.bytes, 0)

    def hear(self, work: Work, until: float) -> Iterator[tuple[Question[Any], Answer[Any]]]:
        """Ask nodes, and yield their answers in order of arrival, until all have answered or the time is up.

        `work` is the caller's: a node that has answered is taken out of it, and one that is put in between two answers is
        asked then. A node that was asked the same question before and still owes the answer is waited for, not
        asked twice; one that has forgotten it, or whose message was lost, is asked again.
        """
        heard = looked = self.clock.now()
        lost = set[int]()
        self._answered.clear()
        while work:
            for node, question in self._send_missing(work, until):
                del work[node]
                yield question, Answer(node, "failed", None, UNSENT, 0.0, question.bytes, 0)
            quiet = True
            for message, letter in self._awaited(work):
                quiet, heard = False, self.clock.now()
                if message.has_error() and message.error.code in LOST and letter.node not in lost:
                    lost.add(letter.node)
                    continue
                del work[letter.node]
                yield letter.question, self._read(message, letter)
            now = self.clock.now()
            if not quiet:
                continue
            if now >= until:
                break
            if now - looked > LOOK:
                looked = now
                self.look()
            self.clock.wait(min(SLOW, max(QUICK, PACE * (now - heard))), until)

    def post(self, question: Question[Any], nodes: Mapping[int, str]) -> None:
        """Send a question that nobody waits for; `collect` gives its answers."""
        for node in self._send(question, nodes, math.inf):
            self._inbox.append(Answer(node, "failed", None, UNSENT, 0.0, question.bytes, 0))

    def collect(self, but: Question[Any] | None = None) -> list[Answer[Any]]:
        """Return the answers to what was posted that have come since the last call, and drop what has come late.

        Answers to the question `but` stay where they are: it is asked again.
        """
        heard = True
        while heard:
            heard = False
            for message in self._fetch({}, but):
                heard = True
                self._sort(message, {})
        inbox, self._inbox = self._inbox, []
        return inbox

    def _send_missing(self, work: Work, due: float) -> list[tuple[int, Question[Any]]]:
        """Send what is not under way to those in `work`; return those whom it cannot be sent to."""
        letters = [*self._under_way.values(), *(letter for _, letter in self._kept)]
        there = {(letter.node, letter.question) for letter in letters}
        new: dict[Question[Any], dict[int, str]] = {}
        for node, (question, site) in work.items():
            if (node, question) not in there:
                new.setdefault(question, {})[node] = site
        return [(node, question) for question, nodes in new.items() for node in self._send(question, nodes, due)]

    def _send(self, question: Question[Any], nodes: Mapping[int, str], due: float) -> list[int]:
        """Send a question to those of `nodes` that it is not under way to; return those whom it cannot be sent to."""
        asked = self.asked(question)
        wanted = [node for node in nodes if node not in asked]
        content = question.held if mail.in_process(self._grid) else question.content
        sent = mail.push(self._grid, question.kind, question.number, content, wanted)
        for node, key in sent.items():
            activated = self.online[node].activated if node in self.online else ""
            self._under_way[key] = Letter(node, nodes[node], question, self.clock.now(), due, activated)
        return [node for node in wanted if node not in sent]

    def _awaited(self, work: Work) -> Iterator[tuple[Message, Letter]]:
        """Yield the answers of those in `work` that are there, with what they answer."""
        for kept in list(self._kept):
            if _is_in(kept[1], work):
                self._kept.remove(kept)
                yield kept
            elif not _is_in(kept[1], self.lasting):
                self._kept.remove(kept)
                self._drop(kept[1])
        for message in self._fetch(work):
            letter = self._sort(message, work)
            if letter is not None:
                yield message, letter

    def _fetch(self, work: Work, but: Question[Any] | None = None) -> Iterator[Message]:
        """Yield what has come: answers of those in `work` before others, and none to `but`."""
        letters = {key: letter for key, letter in self._under_way.items() if but is None or letter.question is not but}
        ids = sorted(letters, key=lambda key: not _is_in(letters[key], work))
        return self._fetch_replies(ids, max((each.question.largest for each in letters.values()), default=SMALL))

    def _sort(self, message: Message, work: Work) -> Letter | None:
        """Return the letter that a message answers if it is awaited; keep, or drop, any other."""
        key = message.metadata.reply_to_message_id
        letter = self._under_way.pop(key, None)
        if letter is None:
            if key in self._answered:
                self._dropped(self._answered[key], "it answered twice; the first answer counts.")
            return None
        if _is_in(letter, work):
            self._answered[key] = letter
            return letter
        if letter.question.kind == "join":
            self._inbox.append(self._read(message, letter))
        elif _is_in(letter, self.lasting):
            self._kept.append((message, letter))
        elif message.has_content():  # else Flower's own word that nothing will come
            self._drop(letter)
        return None

    def _drop(self, letter: Letter) -> None:
        late = self.clock.now() - letter.due
        said = f"{late:.1f} s after the deadline" if late > 0 else "when it was no longer asked for"
        self._dropped(letter, f"its answer came {said} and is not used.")

    def _read(self, message: Message, letter: Letter) -> Answer[Any]:
        """Read what a node sent, or say why it cannot be read."""
        seconds, question = self.clock.now() - letter.sent, letter.question
        if message.has_error():
            reason = _said(message.error.reason or "") or f"Flower error {message.error.code}."
            return Answer(letter.node, "failed", None, reason, seconds, question.bytes, 0)
        up = size(message)
        try:
            if up > question.largest:
                raise MessageError(f"the reply has {up} bytes, and at most {question.largest} are expected.")
            reply = from_record(message.content, question.expected, Refusal)
        except MessageError as error:
            return Answer(letter.node, "failed", None, _said(str(error)), seconds, question.bytes, up)
        if isinstance(reply, Refusal):
            outcome = REFUSALS.get(reply.outcome, "failed")
            return Answer(letter.node, outcome, None, _said(reply.reason), seconds, question.bytes, up)
        return Answer(letter.node, "ok", reply, None, seconds, question.bytes, up)


def _is_in(letter: Letter, work: Work) -> bool:
    """Whether what a node was sent is what it is asked in `work`."""
    return letter.node in work and work[letter.node][0] is letter.question


def _said(text: str) -> str:
    return text.partition("\n")[0][:LONGEST]
