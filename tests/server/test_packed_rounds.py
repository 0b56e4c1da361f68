"""Runs whose updates travel packed: shorter by what was promised, the same after a kill, and safe from what is no update."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import keyed_runs
import numpy as np
import pytest
from flwr.app import Message

from client import residual
from client.site import load as load_site
from client.site import open_ledger
from server import checkpoints, job
from server.history.store import History
from shared import compression, messages
from shared.arrays import nbytes
from shared.messages import Refusal, TrainReply
from shared.run_config import Compression
from simulations import prepare

ALONE = {"warm_start.rounds": 0, "refit.rounds": 0, "evaluation.every": 100}
FULL = ALONE | {"model.trainable": "full", "training.rounds": 2, "training.local_steps": 1}
PACKED = {
    "float16": ({"compression.update": "float16"}, 2.0),
    "int8": ({"compression.update": "int8"}, 3.94),
    "top-k by bits": ({"compression.update": "top-k", "compression.keep": 0.1}, 7.62),
    "top-k by numbers": ({"compression.update": "top-k", "compression.keep": 0.01}, 50.0),
}


def sent(run, home):
    """Give the bytes of every update, by round and site."""
    with History.open(f"sqlite:///{home / 'history.db'}") as history:
        return {(n, part.site): part.bytes_up for n, part in history.participations(run) if part.kind == "train"}


def digests(run, home):
    with History.open(f"sqlite:///{home / 'history.db'}") as history:
        return [item.checkpoint.digest for item in history.rounds(run)]


@pytest.fixture(scope="module")
def plain(tiny_scenario, tmp_path_factory):
    """Play two rounds whose updates travel as they are; give the bytes of each."""
    home = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOONFLOWER_HOME", "")
        run = keyed_runs.lay_out(tiny_scenario, home, FULL)
        keyed_runs.play(run, home)
        return sent(run, home)


@pytest.mark.parametrize(("settings", "factor"), PACKED.values(), ids=PACKED)
def test_a_private_run_finishes_with_fewer_bytes_by_the_encodings_factor(
    plain, tiny_scenario, moonflower_home, settings, factor
):
    run = keyed_runs.lay_out(tiny_scenario, moonflower_home, FULL | settings)
    finished = keyed_runs.play(run, moonflower_home)
    assert (finished.status, finished.private) == ("completed", True)
    packed = sent(run, moonflower_home)
    with History.open(f"sqlite:///{moonflower_home / 'history.db'}") as history:
        moved, last = history.traffic(run), history.rounds(run)[-1]
    chosen = job.load(prepare.run_folder(run)).config.compression
    exchanged = checkpoints.read(prepare.run_folder(run) / "checkpoints", last.checkpoint.digest).iterate
    values, expected = nbytes(exchanged), compression.size(exchanged, chosen)
    assert values / expected == pytest.approx(factor, rel=0.01)
    assert all(expected < size < expected + 800 for size in packed.values())  # the other fields, and a header
    assert all(values < size < values + 8000 for size in plain.values())  # names and shapes of all arrays, too
    assert packed.keys() == plain.keys()
    assert moved[1][0] == sum(size for (number, _), size in packed.items() if number == 1)


def test_a_run_of_the_largest_values_killed_in_a_round_ends_with_the_same_bits_and_residuals(
    tiny_scenario, moonflower_home, tmp_path
):
    settings = ALONE | {"compression.update": "top-k", "compression.keep": 0.05, "warm_start.rounds": 1}
    run = keyed_runs.lay_out(tiny_scenario, moonflower_home, settings)
    whole = tmp_path / "whole"
    shutil.copytree(moonflower_home, whole)
    keyed_runs.play(run, whole)
    command = [sys.executable, keyed_runs.__file__, run, str(moonflower_home), "3", "south"]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(digests(run, moonflower_home)) == 2
    keyed_runs.play(run, moonflower_home)
    assert digests(run, moonflower_home) == digests(run, whole)
    left = [residuals(run, home) for home in (moonflower_home, whole)]
    assert left[0] == left[1]
    assert len({state for _, state in left[0]}) == 3
    assert [count for count, _ in left[0]] == [5, 5, 5]  # four updates and one histogram each


def residuals(run, home):
    """Give, for each site, how many replies its ledger has charged, and what it has not sent."""
    os.environ["MOONFLOWER_HOME"] = str(home)
    found = []
    for _, node in sorted(prepare.nodes(run).items()):
        with open_ledger(load_site(Path(str(node["site"])))) as ledger:
            found.append((len(ledger.spends()), ledger.state(run, residual.KIND)))
    return found


def tampering(change):
    """Stand between: `change(honest reply)` of west's update is what the coordinator gets."""

    def wrap(app):
        def answer(message, context):
            reply = app(message=message, context=context)
            if message.metadata.message_type != "train" or context.node_id != 3:
                return reply
            return Message(
                messages.to_record(change(messages.from_record(reply.content, TrainReply))), reply_to=message
            )

        return answer

    return wrap


def test_an_update_that_is_not_packed_as_the_run_asks_is_recorded_and_moves_nothing(
    tiny_scenario, moonflower_home, tmp_path
):
    settings = ALONE | {"compression.update": "int8", "training.rounds": 6, "model.trainable": "head"}
    run = keyed_runs.lay_out(tiny_scenario, moonflower_home, settings)
    without = tmp_path / "without"
    shutil.copytree(moonflower_home, without)
    head = {"head.bias": np.zeros(2, np.float32), "head.weight": np.zeros((2, 32), np.float32)}
    other, _ = compression.compress(head, {}, Compression(update="float16"), lambda n: np.zeros(n, np.uint64))

    def infinite(packed):
        return np.concatenate([packed[:4], np.float32([np.inf]).view(np.uint8), packed[8:]])

    changes = {
        "is not packed as the run's compression.update='int8' asks": lambda reply: replace(reply, update=head),
        "is not packed as": lambda reply: replace(reply, update=other),
        "the packed update has 73 bytes, and 74 are expected": lambda reply: replace(reply, update=reply.update[:-1]),
        "the packed update has 75 bytes": lambda reply: replace(
            reply, update=np.append(reply.update, reply.update[:1])
        ),
        "is not finite": lambda reply: replace(reply, update=infinite(reply.update)),
        "is not packed": lambda reply: replace(reply, update=reply.update[:0]),
    }
    keyed_runs.play(
        run, moonflower_home, app_of=tampering(lambda reply: list(changes.values())[reply.round - 1](reply))
    )
    keyed_runs.play(run, without, app_of=tampering(lambda reply: Refusal("west", "refused", "no")))
    assert digests(run, moonflower_home) == digests(run, without)
    with History.open(f"sqlite:///{moonflower_home / 'history.db'}") as history:
        parts = [part for _, part in history.participations(run, site="west") if part.kind == "train"]
    assert [part.outcome for part in parts] == ["failed"] * 6
    for part, reason in zip(parts, changes, strict=True):
        assert reason in part.error


def test_a_packed_update_of_a_run_that_packs_nothing_is_recorded_and_moves_nothing(tiny_scenario, moonflower_home):
    settings = ALONE | {"training.rounds": 1, "model.trainable": "head"}
    run = keyed_runs.lay_out(tiny_scenario, moonflower_home, settings)
    packed = np.zeros(272, np.uint8)
    keyed_runs.play(run, moonflower_home, app_of=tampering(lambda reply: replace(reply, update=packed)))
    with History.open(f"sqlite:///{moonflower_home / 'history.db'}") as history:
        (part,) = [part for _, part in history.participations(run, site="west") if part.kind == "train"]
    assert part.error == "the update is packed, and the run's compression.update is 'none'."
