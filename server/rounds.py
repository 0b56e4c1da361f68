"""A run, top to bottom: restore, join, then for each round select, dispatch, fold in, step, score, commit.

A round is either in the history with its checkpoint on disk, or it did not happen. Whatever dies, the
next attempt goes on after the last committed round; sites resend what they had answered.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

import numpy as np
from flwr.serverapp import Grid

from server import checkpoints, ending, optimization, replies, selection, weighing
from server.aggregation import Rule, UpdateError, rules
from server.buffered import Buffer, Take, influence
from server.dispatch import SMALL, Answer, Desk, Letter, Question
from server.evaluation import TestSet
from server.history.records import Kind, Metric, Participation, Round, Run, Spend
from server.history.store import History
from server.job import Job
from server.joining import Roster
from server.ledgers import Ledgers
from server.observer import Observer
from server.optimization import ServerState
from server.patience import PATIENCE, insist
from server.quorum import Quorum
from shared import compression, models
from shared.arrays import Arrays
from shared.errors import MachineError, RunFailedError
from shared.messages import EvaluateReply, EvaluateRequest, MessageError, TrainReply, TrainRequest
from shared.models import LoadedModel

R = TypeVar("R")


@dataclass
class Seen:
    """What a round has gathered for the history so far; what a site is asked twice, it answers once."""

    participations: dict[tuple[str, Kind], Participation] = field(default_factory=dict)
    metrics: list[Metric] = field(default_factory=list)
    spends: list[Spend] = field(default_factory=list)


class Campaign:
    """One attempt at a run: what stays the same from round to round."""

    def __init__(
        self, job: Job, grid: Grid, history: History, observer: Observer, *, attempt: int, authenticated: bool
    ) -> None:
        self.job, self.history, self.observer = job, history, observer
        self.config = job.config
        self.buffered = job.config.federation.mode == "buffered"
        self.model: LoadedModel = models.load(job.config)
        self.model.module.to(models.pick_device(job.device))
        self.test_set = None if job.test_set is None else TestSet(job.test_set, job.config, self.model)
        last = history.last_round(job.run)
        again = last.number + 1 if last else 1
        oldest = max(1, again - self.config.federation.max_staleness) if self.buffered else again
        resumed = range(oldest, again + 1) if attempt > 1 else ()
        self.ledgers = Ledgers(history, job.run, simulated=job.simulated, study=job.study, resumed=resumed)
        self.desk = Desk(grid, self._dropped)
        self.asking: tuple[int, Kind] | None = None  # the question that was asked last,
        self.asked: set[int] = set()  # and whom
        self.roster = Roster(job, self.model, self.desk, history, observer, self.ledgers, authenticated=authenticated)
        self.buffer = Buffer(job, self.roster, history, observer, self.ledgers)
        self.clock, self.ended = self.desk.clock, self.desk.clock.now()  # when the last round ended

    def restore(self) -> tuple[int, ServerState]:
        """Return the last committed round's number and state; 0 and the start where there is none."""
        last = self.history.last_round(self.job.run)
        if last is None:
            return 0, optimization.start(self.model.arrays(), self.model.base_digest)
        state = checkpoints.read(self.job.checkpoints, last.checkpoint.digest)
        optimization.check_base(state, self.model, self.config.model.name)
        return last.number, state

    def train(self, number: int, state: ServerState, seen: Seen) -> ServerState:
        """Send the iterate out, fold the sites' updates in, and take the server's step."""
        name, settings, step = self.config.place(number)
        state = optimization.enter(state, name, self.model.names(name))
        question = self.asking_to_train(number, state)
        # An update is shaped like the phase's arrays, and so are the moments.
        with rules.chosen(self.config, number, state.iterate, state.first, self.job.checkpoints) as rule:
            self._take_in(rule, question, state, seen)
            mean = rule.mean()
        if rule.left_out:
            text = f"round {number}: {self.config.federation.aggregation} leaves out {', '.join(rule.left_out)}."
            self.history.add_event(self.job.run, "info", text)
        with np.errstate(over="ignore", invalid="ignore"):  # looked at below
            moved = optimization.step(state, settings, mean, done=(step - 1) / settings.rounds, pairs=rule.pairs)
        if not all(np.isfinite(array).all() for array in moved.iterate.values()):
            raise RunFailedError(
                f"round {number}: the server's step left arrays that are not finite; start a new run with {name}."
                f"server_learning_rate below {settings.server_learning_rate:g}."
            )
        return moved

    def _take_in(self, rule: Rule, question: Question[TrainReply], state: ServerState, seen: Seen) -> None:
        """Ask for a round's updates, and take them in as they come."""
        most, number = selection.largest(self.roster.sites.values()), question.number

        def take(asked: Question[TrainReply], answer: Answer[TrainReply]) -> str | None:
            error = self._folded(rule, state.first, asked.number, answer, number, most, seen)
            self._saw(seen, number, "train", answer, error, asked.number)
            return error

        if self.buffered:
            self.buffer.fill(question, take)
        else:
            self._gather(question, take)

    def asking_to_train(self, number: int, state: ServerState) -> Question[TrainReply]:
        """Return round `number`'s question, from the state that its phase has been entered with."""
        weights = weighing.weights(self.config, self.history, self.job.run, number)
        request = TrainRequest(self.job.run, self.config.as_json(), number, state.iterate, weights)
        longest = SMALL + 2 * compression.size(state.first, self.config.compression)
        return Question("train", number, request, TrainReply, largest=longest)

    def asked_before(self, number: int) -> Question[TrainReply]:
        """Return the question of a round that is committed, as it was asked."""
        name, _, _ = self.config.place(number)
        if number > 1:
            (before,) = self.history.rounds(self.job.run, round_number=number - 1)
            state = checkpoints.read(self.job.checkpoints, before.checkpoint.digest)
        else:
            state = optimization.start(self.model.arrays(), self.model.base_digest)
        return self.asking_to_train(number, optimization.enter(state, name, self.model.names(name)))

    def _gather(self, question: Question[TrainReply], take: Take) -> None:
        """Ask a cohort, and take its answers until they are enough."""
        quorum = Quorum(self.job, self.roster, self.history, question.number)
        nodes = quorum.cohort()
        while nodes:
            for answer in self._ask(question, nodes):
                quorum.heard(answer, take(question, answer))
            nodes = quorum.missing(question)

    def evaluate(self, number: int, state: ServerState, seen: Seen) -> None:
        """Score what the round published: on the public test set, and by the sites' released histograms."""
        if self.test_set is not None:
            seen.metrics += self.test_set.score(state.published, whole=number == self.config.rounds)
        if not self.config.evaluated(number):
            return
        request = EvaluateRequest(self.job.run, self.config.as_json(), number, state.published)
        question = Question("evaluate", number, request, EvaluateReply)
        total, variance = np.zeros(0), 0.0
        self.desk.look()
        able = self.roster.able()
        chosen = selection.select_to_evaluate(self.config, number, able)
        for answer in self._ask(question, {node: able[node].site for node in chosen}):
            reply, error = answer.reply, self._checked(answer, number, number, seen)
            if reply is not None and error is None:
                counts = replies.counts(reply, self.model.task)
                if counts is None:
                    error = "the histogram is not the one that was asked for."
                else:
                    seen.metrics += replies.validation(self.model.task, counts, reply.noise_multiplier, reply.site)
                    total = counts if total.size == 0 else total + counts
                    variance += reply.noise_multiplier**2
            self._saw(seen, number, "evaluate", answer, error)
        if total.size:
            seen.metrics += replies.validation(self.model.task, total, variance**0.5, None)
            seen.metrics += weighing.found(self.model.task, total, variance**0.5)

    def _ask(self, question: Question[R], nodes: Mapping[int, str]) -> Iterable[Answer[R]]:
        if self.asking != (question.number, question.kind):  # asked again: another run may have been charged since
            self.asking, self.asked = (question.number, question.kind), set()
        self.ledgers.look(self.roster.sites[node] for node in nodes if node not in self.asked)
        self.asked |= nodes.keys()
        self.observer.asked(question.number, question.kind, list(nodes.values()))
        return self.desk.ask(question, nodes, self.config.federation.deadline)

    def _folded(
        self, rule: Rule, like: Arrays, asked: int, answer: Answer[TrainReply], number: int, most: int, seen: Seen
    ) -> str | None:
        """Fold an update of arrays `like` these in, unpacked just now, or say why it cannot be."""
        error = self._checked(answer, asked, number, seen) or self.buffer.fault(asked, number)
        if answer.reply is None or error is not None:
            return error
        try:
            update = compression.decompress(answer.reply.update, like, self.config.compression)
            weight = selection.weight(self.config, self.roster.sites[answer.node], most)
            rule.add(update, weight, self.roster.sites[answer.node].site, influence(number - asked))
        except (MessageError, UpdateError) as refused:
            return str(refused)
        return None

    def _checked(
        self, answer: Answer[TrainReply] | Answer[EvaluateReply], asked: int, number: int, seen: Seen
    ) -> str | None:
        """Say what is wrong with an answer to round `asked` or its ledger, and keep what it has cost in round `number`."""
        reply, site = answer.reply, self.roster.sites[answer.node]
        if reply is None:
            return answer.error
        if (error := replies.at_odds(reply, site, asked)) is not None:
            return error
        # Spent at the site, whether or not the reply can be used.
        seen.spends.append(replies.spend(reply, site, self.config, number))
        if (error := self.ledgers.at_reply(reply, site)) is not None:
            self.roster.leave_out(answer.node, error)
        return error

    def _saw(
        self,
        seen: Seen,
        number: int,
        kind: Kind,
        answer: Answer[TrainReply] | Answer[EvaluateReply],
        error: str | None,
        asked: int | None = None,
    ) -> None:
        outcome = "failed" if error is not None and answer.outcome == "ok" else answer.outcome
        site = self.roster.sites[answer.node].site
        if outcome == "exhausted":
            self.roster.leave_out(answer.node, error or "its budget is spent")
        before = seen.participations.get((site, kind))
        # Asked twice: a refusal does not undo that the site may have been charged the first time.
        if before is None or outcome == "ok" or before.outcome not in ("timeout", "failed"):
            other = None if asked == number else asked
            item = Participation(site, kind, outcome, answer.seconds, answer.bytes_down, answer.bytes_up, error, other)
            seen.participations[site, kind] = item
        self.observer.answered(number, kind, site, outcome, error)

    def _dropped(self, letter: Letter, why: str) -> None:
        """Record an answer that is not used, with the round that it answers."""
        number, kind = letter.question.number, letter.question.kind
        self.history.add_event(self.job.run, "warning", f"site {letter.site}, round {number} ({kind}): {why}")
        self.observer.late(number, kind, letter.site, why)


def play(campaign: Campaign, number: int, state: ServerState, attempt: int) -> tuple[ServerState, Round]:
    """Play one round and commit it."""
    job = campaign.job
    ending.check_stop(job, campaign.history)
    started, clock = datetime.now(UTC), time.monotonic()
    phase, _, _ = campaign.config.place(number)
    campaign.observer.round_started(number, phase)
    campaign.roster.welcome(number)
    seen = Seen()
    state = campaign.train(number, state, seen)
    campaign.evaluate(number, state, seen)
    seen.participations |= {(part.site, part.kind): part for part in campaign.buffer.pending(number)}
    campaign.ledgers.write()
    began, campaign.ended = campaign.ended, campaign.clock.now()
    write = partial(checkpoints.write, job.checkpoints, state)
    done = Round(
        run=job.run,
        number=number,
        attempt=attempt,
        phase=phase,
        started_at=started,
        seconds=time.monotonic() - clock,
        checkpoint=insist(write, MachineError, patience=PATIENCE if job.supervised else 0.0),
        participations=tuple(seen.participations.values()),
        metrics=tuple(seen.metrics),
        spends=tuple(seen.spends),
        simulated_seconds=campaign.ended - began if campaign.clock.simulated else None,
    )
    campaign.history.commit_round(done)
    campaign.observer.round_finished(done)
    return state, done


def run(job: Job, grid: Grid, history: History, observer: Observer, *, engine: str, authenticated: bool = False) -> Run:
    """Play all rounds that are left, and return the finished run.

    Parameters
    ----------
    authenticated
        The grid's nodes prove themselves by keys, which the history knows the sites of.

    Raises
    ------
    RunFailedError
        Where too few sites join or answer. What is committed stays: resume goes on from there.
    """
    attempt = history.start_attempt(job.run, engine=engine)
    try:
        campaign = Campaign(job, grid, history, observer, attempt=attempt.number, authenticated=authenticated)
        last, state = campaign.restore()
        campaign.roster.start()
        campaign.buffer.restore(history.last_round(job.run), campaign.asked_before)
        observer.run_started(history.run(job.run), list(campaign.roster.sites.values()))
        kept = [item.checkpoint.digest for item in history.rounds(job.run)]
        for number in range(last + 1, job.config.rounds + 1):
            state, played = play(campaign, number, state, attempt.number)
            kept.append(played.checkpoint.digest)
            newest = set(kept[-job.config.federation.checkpoints :])
            checkpoints.prune(job.checkpoints, newest, before=played.started_at)
    except BaseException as error:
        ending.close(job, history, attempt.number, error)
        raise
    history.end_attempt(job.run, attempt.number, "completed")
    history.finish_run(job.run, "completed", attempt=attempt.number)
    return history.run(job.run)
