"""A run, top to bottom: restore, join, then for each round select, dispatch, fold in, step, score, commit.

A round is either in the history with its checkpoint on disk, or it did not happen. Whatever dies, the
next attempt goes on after the last committed round; sites resend what they had answered.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
from flwr.serverapp import Grid

from server import checkpoints, joining, optimization, selection
from server.aggregation import Fold, UpdateError
from server.dispatch import Answer, ask
from server.evaluation import TestSet
from server.history.records import Kind, Metric, Participation, Round, Run, Spend
from server.history.store import History
from server.job import Job
from server.ledgers import Ledgers
from server.observer import Observer
from server.optimization import ServerState
from shared import messages, metrics, models
from shared.errors import RunFailedError, interrupted
from shared.messages import EvaluateReply, EvaluateRequest, JoinReply, TrainReply, TrainRequest
from shared.models import LoadedModel

R = TypeVar("R")


class Campaign:
    """One attempt at a run: what stays the same from round to round."""

    def __init__(self, job: Job, grid: Grid, history: History, observer: Observer, *, attempt: int) -> None:
        self.job, self.grid, self.history, self.observer = job, grid, history, observer
        self.config = job.config
        self.model: LoadedModel = models.load(job.config)
        self.model.module.to(models.pick_device(job.device))
        self.test_set = None if job.test_set is None else TestSet(job.test_set, job.config, self.model)
        self.sites: dict[int, JoinReply] = {}  # that joined
        self.weights: dict[int, float] = {}
        self.left_out: dict[int, str] = {}  # of those, the ones that are not asked again, and why
        last = history.last_round(job.run)
        resumed = last.number + 1 if last else 1
        self.ledgers = Ledgers(history, job.run, simulated=job.simulated, resumed=resumed if attempt > 1 else None)

    def join(self) -> None:
        """Ask every node whether it takes part in the whole run."""
        self.sites = joining.join(self.job, self.model, self.grid, self.history, self.observer, self.ledgers)
        self.weights = selection.weights(self.config, self.sites)

    def asked(self, number: int) -> dict[int, JoinReply]:
        """Return the sites that can still be asked.

        Raises
        ------
        RunFailedError
            Where too few are left: the others' budget is not spent on a round that cannot be.
        """
        sites = {node: reply for node, reply in self.sites.items() if node not in self.left_out}
        if len(sites) < self.config.federation.min_sites:
            raise RunFailedError(
                f"round {number}: {len(sites)} of the federation.min_sites={self.config.federation.min_sites} sites are left: "
                + "; ".join(f"{self.sites[node].site}: {reason}" for node, reason in self.left_out.items())
            )
        return sites

    def restore(self) -> tuple[int, ServerState]:
        """Return the last committed round's number and state; 0 and the start where there is none."""
        last = self.history.last_round(self.job.run)
        if last is None:
            return 0, optimization.start(self.model.arrays(), self.model.base_digest)
        state = checkpoints.read(self.job.checkpoints, last.checkpoint.digest)
        optimization.check_base(state, self.model, self.config.model.name)
        return last.number, state

    def train(self, number: int, state: ServerState, seen: "Seen") -> ServerState:
        """Send the iterate out, fold the sites' updates in, and take the server's step."""
        name, settings, step = self.config.place(number)
        state = optimization.enter(state, name, self.model.names(name))
        request = TrainRequest(self.job.run, self.config.as_json(), number, state.iterate)
        fold = Fold(state.first, unit=settings.learning_rate * settings.clipping_norm)  # shaped like the phase's arrays
        folded = 0
        nodes = selection.select(self.config, number, self.asked(number))
        for answer in self._ask("train", number, request, TrainReply, nodes):
            reply, error = answer.reply, answer.error
            if reply is not None and (error := self._at_odds(reply, answer.node, number)) is None:
                # Spent at the site, whether or not the update can be used.
                seen.spends.append(self._spend(reply, answer.node))
                error = self._doubted(reply, answer.node)
                try:
                    if error is None:
                        fold.add(reply.update, self.weights[answer.node])
                        folded += 1
                except UpdateError as refused:
                    error = str(refused)
            self._saw(seen, number, "train", answer, error)
        if folded < self.config.federation.min_sites:
            raise RunFailedError(
                f"round {number}: {folded} of the federation.min_sites={self.config.federation.min_sites} sites sent an update; "
                + next(
                    (f"{item.site}: {item.error}" for item in seen.participations if item.error),
                    "no reason was given",
                )
            )
        with np.errstate(over="ignore", invalid="ignore"):  # looked at below
            moved = optimization.step(state, settings, fold.mean(), done=(step - 1) / settings.rounds)
        if not all(np.isfinite(array).all() for array in moved.iterate.values()):
            raise RunFailedError(
                f"round {number}: the server's step left arrays that are not finite; start a new run with {name}."
                f"server_learning_rate below {settings.server_learning_rate:g}."
            )
        return moved

    def evaluate(self, number: int, state: ServerState, seen: "Seen") -> None:
        """Score what the round published: on the public test set, and by the sites' released histograms."""
        if self.test_set is not None:
            seen.metrics += self.test_set.score(state.published, whole=number == self.config.rounds)
        if not self.config.evaluated(number):
            return
        request = EvaluateRequest(self.job.run, self.config.as_json(), number, state.published)
        total, variance = np.zeros(0), 0.0
        nodes = sorted(self.sites.keys() - self.left_out.keys())
        for answer in self._ask("evaluate", number, request, EvaluateReply, nodes):
            reply, error = answer.reply, answer.error
            if reply is not None and (error := self._at_odds(reply, answer.node, number)) is None:
                seen.spends.append(self._spend(reply, answer.node))
                counts, error = self._counts(reply), self._doubted(reply, answer.node)
                if counts is None:
                    error = error or "the histogram is not the one that was asked for."
                elif error is None:
                    seen.metrics += _validation(counts, reply.noise_multiplier, self.sites[answer.node].site)
                    total = counts if total.size == 0 else total + counts
                    variance += reply.noise_multiplier**2
            self._saw(seen, number, "evaluate", answer, error)
        if total.size:
            seen.metrics += _validation(total, variance**0.5, None)

    def _counts(self, reply: EvaluateReply) -> npt.NDArray[np.float64] | None:
        """Return the reply's histogram, or None where it is another than was asked for."""
        labels, bins = len(self.config.task.labels), self.config.evaluation.confidence_bins
        counts = reply.histogram.get("counts")
        if len(reply.histogram) != 1 or counts is None or counts.shape != (labels, labels, bins):
            return None
        return counts.astype(np.float64) if np.isfinite(counts).all() else None

    def _at_odds(self, reply: TrainReply | EvaluateReply, node: int, number: int) -> str | None:
        """Say what is wrong with a reply's public values, before any of them is used or kept."""
        if reply.site != self.sites[node].site or reply.round != number:
            return f"the reply is of site {reply.site!r} and round {reply.round}, not of {self.sites[node].site!r} and {number}."
        plausible = reply.epsilon >= 0 and 0 <= reply.noise_multiplier < math.inf  # false for what is no number
        if isinstance(reply, TrainReply):
            plausible = plausible and 0 < reply.sampling_rate <= 1 and 1 <= reply.steps <= messages.LARGEST
        if not plausible:
            return "the reply's epsilon, noise multiplier, sampling rate or steps are no such values."
        return messages.implausible(reply)

    def _doubted(self, reply: TrainReply | EvaluateReply, node: int) -> str | None:
        """Say what is wrong with the ledger that a reply comes from; its site is not asked again."""
        error = self.ledgers.at_reply(reply, self.sites[node])
        if error is not None:
            self._leave_out(node, error)
        return error

    def _leave_out(self, node: int, reason: str) -> None:
        self.left_out[node] = reason
        text = f"site {self.sites[node].site} is not asked again in this attempt: {reason}"
        self.history.add_event(self.job.run, "warning", text)

    def _ask(
        self, kind: Kind, number: int, request: object, expected: type[R], nodes: list[int]
    ) -> Iterable[Answer[R]]:
        group, deadline = str(number), self.config.federation.deadline
        self.ledgers.look()
        return ask(self.grid, kind, nodes, request, expected, group=group, deadline=deadline)

    def _saw(
        self,
        seen: "Seen",
        number: int,
        kind: Kind,
        answer: Answer[TrainReply] | Answer[EvaluateReply],
        error: str | None,
    ) -> None:
        outcome = "failed" if error is not None and answer.outcome == "ok" else answer.outcome
        site = self.sites[answer.node].site
        if outcome == "exhausted":
            self._leave_out(answer.node, error or "its budget is spent")
        seen.participations.append(
            Participation(site, kind, outcome, answer.seconds, answer.bytes_down, answer.bytes_up, error)
        )
        self.observer.answered(number, kind, site, outcome, error)

    def _spend(self, reply: TrainReply | EvaluateReply, node: int) -> Spend:
        site, privacy = self.sites[node], self.config.privacy
        rate, steps, gradients = 1.0, 1, ""  # of a histogram, over all validation records
        if isinstance(reply, TrainReply):
            rate, steps, gradients = reply.sampling_rate, reply.steps, reply.gradients
        return Spend(
            site=site.site,
            dataset=site.dataset,
            part="train" if isinstance(reply, TrainReply) else "validation",
            epsilon=reply.epsilon,
            delta=privacy.delta,
            noise_multiplier=reply.noise_multiplier,
            sampling_rate=rate,
            steps=steps,
            budget=privacy.epsilon,
            mechanism=reply.mechanism,
            noise_source=reply.noise_source,
            gradients=gradients,
            ledger_id=reply.ledger_id,
            ledger_number=reply.ledger_number,
            ledger_head=reply.ledger_head,
        )


@dataclass
class Seen:
    """What a round has gathered for the history so far."""

    participations: list[Participation]
    metrics: list[Metric]
    spends: list[Spend]


def _validation(counts: np.ndarray, noise: float, site: str | None) -> list[Metric]:
    return [
        Metric("validation", site, score.name, score.value, score.low, score.high)
        for score in metrics.scores(counts, noise)
    ]


def play(campaign: Campaign, number: int, state: ServerState, attempt: int) -> tuple[ServerState, Round]:
    """Play one round and commit it."""
    started, clock = datetime.now(UTC), time.monotonic()
    phase, _, _ = campaign.config.place(number)
    campaign.observer.round_started(number, phase)
    seen = Seen([], [], [])
    state = campaign.train(number, state, seen)
    campaign.evaluate(number, state, seen)
    done = Round(
        run=campaign.job.run,
        number=number,
        attempt=attempt,
        phase=phase,
        started_at=started,
        seconds=time.monotonic() - clock,
        checkpoint=checkpoints.write(campaign.job.checkpoints, state),
        participations=tuple(seen.participations),
        metrics=tuple(seen.metrics),
        spends=tuple(seen.spends),
    )
    campaign.history.commit_round(done)
    campaign.observer.round_finished(done)
    return state, done


def run(job: Job, grid: Grid, history: History, observer: Observer, *, engine: str) -> Run:
    """Play all rounds that are left, and return the finished run.

    Raises
    ------
    RunFailedError
        Where too few sites join or answer. What is committed stays: resume goes on from there.
    """
    attempt = history.start_attempt(job.run, engine=engine)
    try:
        campaign = Campaign(job, grid, history, observer, attempt=attempt.number)
        last, state = campaign.restore()
        campaign.join()
        observer.run_started(history.run(job.run), list(campaign.sites.values()))
        kept = [item.checkpoint.digest for item in history.rounds(job.run)]
        for number in range(last + 1, job.config.rounds + 1):
            state, played = play(campaign, number, state, attempt.number)
            kept.append(played.checkpoint.digest)
            newest = set(kept[-job.config.federation.keep_checkpoints :])
            checkpoints.prune(job.checkpoints, newest, before=played.started_at)
    except BaseException as error:
        outcome: Literal["stopped", "failed"] = "stopped" if interrupted(error) else "failed"
        reason = "interrupted by a person or a signal" if outcome == "stopped" else str(error) or type(error).__name__
        history.end_attempt(job.run, attempt.number, outcome, reason)
        history.finish_run(job.run, outcome, attempt=attempt.number)
        raise
    history.end_attempt(job.run, attempt.number, "completed")
    history.finish_run(job.run, "completed", attempt=attempt.number)
    return history.run(job.run)
