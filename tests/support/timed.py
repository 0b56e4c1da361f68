"""Runs in simulated time whose sites draw the same for the same question, and take the time that a test says."""

import hashlib
import os
import shutil
import sqlite3
from contextlib import closing

from flwr.app import Message

import client.app
from client.privacy.randomness import Keystream
from server import job, rounds
from server.history.store import History
from server.observer import Log
from shared import messages
from simulations import prepare, scenario, timing
from simulations.dynamics import Dynamics, Weather
from simulations.grid import InProcessGrid
from simulations.timeline import TimedGrid

HEADS = {"training.rounds": 0, "refit.rounds": 0, "evaluation.every": 100}  # quick: the head alone


def fixed(request_id):
    """Give the same draws for the same round and kind, whatever the run is called."""
    return Keystream(hashlib.sha256(request_id.partition("/")[2].encode()).digest())


class Given(Weather):
    """Sites that take `seconds(site, round, kind)` for an answer."""

    def __init__(self, seconds):
        super().__init__(Dynamics(), 0)
        self._seconds = seconds

    def work(self, site, number, kind, steps):
        return float(self._seconds(site, number, kind))


class Timed:
    """A run that is laid out, and ways to play it."""

    def __init__(self, run, home):
        self.run, self.home = run, home
        self.history = History.open(f"sqlite:///{home / 'history.db'}")

    @classmethod
    def lay_out(cls, file, home, settings):
        os.environ["MOONFLOWER_HOME"] = str(home)
        home.mkdir(parents=True, exist_ok=True)
        with History.open(f"sqlite:///{home / 'history.db'}") as history:
            return cls(prepare.prepare(scenario.load(str(file), settings), history), home)

    def copy(self, home):
        shutil.copytree(self.home, home)
        return Timed(self.run, home)

    def play(self, observer=None, weather=None, change=lambda *_: None, ahead=1):
        """Play the run; `change(kind, site, round, honest reply)` gives what is sent instead, or None."""
        os.environ["MOONFLOWER_HOME"] = str(self.home)
        virtual, found = prepare.nodes(self.run), job.load(prepare.run_folder(self.run))
        honest = client.app.build(client.app.site_from_context, fixed)

        def answer(message, context):
            reply, to = honest(message=message, context=context), message.metadata
            number = int(to.group_id) if to.group_id.isdigit() else 0
            changed = change(to.message_type, timing.site_name(virtual[context.node_id]), number, reply.content.message)
            return reply if changed is None else Message(messages.Held(changed), reply_to=message)

        inner = InProcessGrid(answer, virtual)
        if weather is None:
            grid = timing.around(self.run, inner, self.history.url, ahead)
        else:
            names = {node: timing.site_name(virtual[node]) for node in virtual}
            before = timing.before_of(self.run, self.history, {name: node for node, name in names.items()})
            grid = TimedGrid(inner, names.get, found.config, weather, before=before, ahead=ahead)
        return rounds.run(found, grid, self.history, observer or Log(), engine="in-process")

    def digests(self):
        return [item.checkpoint.digest for item in self.history.rounds(self.run)]

    def seconds(self):
        return [item.simulated_seconds for item in self.history.rounds(self.run)]

    def took_part(self, kind="train"):
        """Give (round, site, outcome, round that it was asked in)."""
        return [
            (number, part.site, part.outcome, part.asked or number)
            for number, part in self.history.participations(self.run)
            if part.kind == kind
        ]

    def charged(self, site):
        """Give the rounds whose training a site's ledger has, in the order of charging."""
        with closing(sqlite3.connect(self.home / "runs" / self.run / "sites" / site / "ledger.db")) as ledger:
            query = "SELECT round FROM spends WHERE run = ? AND kind = 'train' ORDER BY id"
            return [number for (number,) in ledger.execute(query, [self.run])]


class Stop(Log):
    """Raise where a process could die: at the so-manieth answer of a round."""

    def __init__(self, number, answers):
        self.number, self.left = number, answers

    def answered(self, number, kind, site, outcome, error):
        if number == self.number:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
