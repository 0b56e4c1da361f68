"""What a site sends of its noised updates, and what it keeps: nothing but noised updates, in the commit that charges them."""

import json
import os
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import pytest

from client import residual, training
from client.privacy.randomness import Keystream
from shared import compression, messages
from shared.arrays import Arrays
from shared.errors import ConfigError, DatabaseError, RefusedError
from shared.run_config import RunConfig

Desks = Callable[..., Any]
TOP_K = {"compression": {"update": "top-k", "keep": 0.1}}


def arrived(desk: Any, reply: Any) -> Arrays:
    """Unpack a reply as the coordinator does."""
    like = {name: desk.start()[name] for name in desk.model.names(desk.config.place(reply.round)[0])}
    return compression.decompress(reply.update, like, desk.config.compression)


def left(desk: Any, run: str = "run") -> Arrays:
    """Return what the site has not sent, as its ledger has it."""
    state = kept(desk, run)
    assert state is not None
    return residual.from_bytes(state)[1]


def kept(desk: Any, run: str = "run") -> bytes | None:
    with desk.ledger() as ledger:
        found: bytes | None = ledger.state(run, residual.KIND)
        return found


def flat(arrays: Arrays) -> Any:
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)])


def trained(desk: Any, number: int) -> Arrays:
    """Return the noised update that the same numbers give a site that packs nothing."""
    update = desk.train(number).update
    assert isinstance(update, dict)
    return update


# -- after the noise -------------------------------------------------------------------------------------------


def test_what_is_sent_and_what_is_left_are_the_noised_update_and_the_largest_of_it_are_sent(new_desk: Desks) -> None:
    desk, plain = new_desk(config=TOP_K), new_desk(name="plain")
    update = trained(plain, 1)
    reply = desk.train(1)
    sent = arrived(desk, reply)
    assert np.array_equal(flat(sent) + flat(left(desk)), flat(update))
    expected, _ = compression.compress(update, {}, desk.config.compression, Keystream.from_system().words)
    assert np.array_equal(reply.update, expected)
    noise = reply.noise_multiplier * 1.0 / (0.5 * 80)  # of each value, two steps of it; the largest are noise, too
    assert np.abs(flat(sent)).max() > 2 * noise


def test_over_rounds_a_site_sends_its_noised_updates_and_no_more(new_desk: Desks) -> None:
    desk, plain = new_desk(config=TOP_K), new_desk(name="plain")
    carried = np.float32(0)
    for number in (1, 2, 3):
        whole = flat(trained(plain, number)) + carried
        sent = flat(arrived(desk, desk.train(number)))
        carried = whole - sent
        assert np.array_equal(flat(left(desk)), carried)
        assert np.count_nonzero(sent) == -(-sent.size // 10)


@pytest.mark.parametrize(("update", "share"), [("float16", 2**-11), ("int8", 1 / 127)])
def test_what_is_rounded_is_near_the_noised_update_and_leaves_nothing(
    new_desk: Desks, update: str, share: float
) -> None:
    desk, plain = new_desk(config={"compression": {"update": update}}), new_desk(name="plain")
    expected = flat(trained(plain, 1))
    sent = flat(arrived(desk, desk.train(1)))
    assert not np.array_equal(sent, expected)
    assert np.abs(sent - expected).max() <= np.abs(expected).max() * share * 1.001
    assert kept(desk) is None


def test_what_leaves_is_made_of_noised_updates_alone(
    new_desk: Desks, new_rows: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sites of other records whose noised updates are made the same say, and keep, the same."""
    first, second = (new_desk(name=name, config=TOP_K, rows=new_rows(count)) for name, count in (("a", 100), ("b", 60)))
    update = training.Trained(trained(new_desk(name="c"), 1), "gaussian", "aes-256-ctr", "one-pass")
    monkeypatch.setattr(training, "train", lambda *_: update)
    for number in (1, 2):
        assert np.array_equal(first.train(number).update, second.train(number).update)
        assert kept(first) == kept(second)


def test_packing_costs_nothing(new_desk: Desks) -> None:
    replies = [new_desk(name=f"site-{n}", config=config).train(1) for n, config in enumerate(({}, TOP_K))]
    assert len({(reply.epsilon, reply.noise_multiplier, reply.steps) for reply in replies}) == 1


def test_the_rounding_goes_on_in_the_stream_that_made_the_noise(new_desk: Desks) -> None:
    """No word is used twice: else what is rounded up would tell of the noise."""
    made: list[Any] = []

    class Told(Keystream):
        def words(self, n: int) -> Any:
            drawn = super().words(n)
            made.append(drawn)
            return drawn

    desk = new_desk(config={"compression": {"update": "int8"}}, randomness=lambda _: Told(bytes(32)))
    desk.train(1)
    drawn = np.concatenate(made)
    assert np.unique(drawn).size == drawn.size
    assert made[-1].size == -(-flat(arrived(desk, desk.train(1))).size // 2)


# -- retries, and what stays with a spend -------------------------------------------------------------------------


def test_a_retry_resends_the_packed_bytes_and_leaves_the_residual_as_it_is(new_desk: Desks) -> None:
    desk = new_desk(config=TOP_K, randomness=lambda _: Keystream.from_system())
    first, state = messages.to_bytes(desk.train(1)), kept(desk)
    for _ in range(3):
        assert messages.to_bytes(desk.train(1)) == first
        assert kept(desk) == state
    assert desk.spent() == 1
    with closing(sqlite3.connect(desk.site.ledger)) as connection:
        assert connection.execute("SELECT reply FROM replies").fetchall() == [(first,)]
    plain = new_desk(name="plain").train(1)
    assert len(first) < len(messages.to_bytes(plain)) / 2


@pytest.mark.parametrize("table", ["spends", "replies", "states WHEN NEW.kind = 'train'"])
def test_residual_spend_and_reply_are_one_commit(new_desk: Desks, table: str) -> None:
    desk, whole = new_desk(config=TOP_K), new_desk(name="whole", config=TOP_K)
    desk.train(1), whole.train(1)
    before = kept(desk)
    fault = f"CREATE TRIGGER full BEFORE INSERT ON {table} BEGIN SELECT RAISE (FAIL, 'disk is full'); END"
    with closing(sqlite3.connect(desk.site.ledger)) as connection, connection:
        connection.execute(fault)
    with pytest.raises(DatabaseError, match="disk is full"):
        desk.train(2)
    assert (desk.spent(), kept(desk)) == (1, before)
    with closing(sqlite3.connect(desk.site.ledger)) as connection, connection:
        connection.execute("DROP TRIGGER full")
    assert np.array_equal(desk.train(2).update, whole.train(2).update)
    assert kept(desk) == kept(whole)
    assert desk.spent() == 2


def die_at(statement: str) -> None:
    """Have this process killed right before a statement of the transaction that charges."""
    charging = False

    def look(text: str) -> None:
        nonlocal charging
        charging = charging or text.startswith("INSERT INTO spends")
        if charging and text.startswith(statement):
            os.kill(os.getpid(), signal.SIGKILL)

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = right(*arguments, **options)
        connection.set_trace_callback(look)
        return connection

    right, sqlite3.connect = sqlite3.connect, connect  # type: ignore[assignment]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_kill_between_computing_and_charging_neither_loses_the_residual_nor_adds_it_twice(new_desk: Desks) -> None:
    desk, whole = new_desk(config=TOP_K), new_desk(name="whole", config=TOP_K)
    for number in (1, 2):
        whole.train(number)
    desk.train(1)
    before = kept(desk)
    charge = ("INSERT INTO spends", "INSERT INTO replies", "INSERT OR REPLACE INTO states", "COMMIT")
    for statement in charge:
        child = os.fork()
        if not child:
            try:
                die_at(statement)
                desk.train(2)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, statement
        assert (desk.spent(), kept(desk)) == (1, before), statement
    reply = desk.train(2)
    assert np.array_equal(reply.update, whole.train(2).update)
    assert kept(desk) == kept(whole)
    assert desk.spent() == 2


def test_a_residual_that_another_process_has_sent_meanwhile_is_not_sent_again(
    new_desk: Desks, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = new_desk(config=TOP_K)
    desk.train(1)
    other = type(desk)(desk.site, desk.config)
    monkeypatch.setattr(residual.Compressed, "__init__", late(residual.Compressed.__init__, partial(other.train, 2)))
    with pytest.raises(RefusedError, match="another process of this site"):
        desk.train(3)
    monkeypatch.undo()
    state = left(desk)
    plain = new_desk(name="plain")
    third = flat(arrived(desk, desk.train(3)))
    assert np.array_equal(third + flat(left(desk)), flat(trained(plain, 3)) + flat(state))
    assert desk.spent() == 3


def late(right: Any, work: Callable[[], Any]) -> Any:
    """Do some work, once, right after the residual was read."""
    done: list[bool] = []

    def begin(self: Any, *given: Any) -> None:
        right(self, *given)
        if not done:
            done.append(True)
            work()

    return begin


# -- rounds without the site, phases, runs --------------------------------------------------------------------------


def test_a_site_that_is_not_asked_keeps_what_it_has_for_the_next_round_that_asks(new_desk: Desks) -> None:
    desk, plain = new_desk(config=TOP_K), new_desk(name="plain")
    desk.train(1)
    before = flat(left(desk))
    sent = flat(arrived(desk, desk.train(3)))
    assert np.array_equal(sent + flat(left(desk)), flat(trained(plain, 3)) + before)


def test_a_phase_begins_without_a_residual_and_so_does_a_run(new_desk: Desks) -> None:
    phases = {
        "warm_start": {"rounds": 1, "sampling_rate": 0.5, "clipping_norm": 1.0},
        "refit": {"rounds": 1, "sampling_rate": 0.5, "clipping_norm": 1.0},
    }
    desk, plain = new_desk(config=TOP_K | phases), new_desk(name="plain", config=phases)
    for number in (1, 2, 5):  # the first of each phase
        sent = flat(arrived(desk, desk.train(number)))
        assert np.array_equal(sent + flat(left(desk)), flat(trained(plain, number)))
    before = kept(desk)
    first, again = arrived(desk, desk.train(1, run="other")), left(desk, "other")
    assert kept(desk) == before
    assert np.array_equal(flat(first) + flat(again), flat(plain.train(1, run="other").update))


def test_a_phase_of_the_same_arrays_begins_without_a_residual_too(new_desk: Desks) -> None:
    head = {"model": {"trainable": "head"}, "warm_start": {"rounds": 1, "sampling_rate": 0.5, "clipping_norm": 1.0}}
    desk, plain = new_desk(config=TOP_K | head), new_desk(name="plain", config=head)
    desk.train(1)
    sent = flat(arrived(desk, desk.train(2)))
    assert np.array_equal(sent + flat(left(desk)), flat(trained(plain, 2)))


# -- what a site does not know ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"update": "int4"}, "compression.update='int4' must be 'none', 'float16', 'int8' or 'top-k'"),
        ({"update": "top-k", "keep": 0.0}, "compression.keep=0.0 must be above 0"),
        ({"update": "top-k", "keep": 1.5}, "compression.keep=1.5 must be at most 1"),
        ({"update": "int8", "block": 1}, "compression.block=1 must be at least 8"),
        ({"update": "int8", "seed": 7}, "unknown setting 'compression.seed'"),
    ],
)
def test_an_encoding_that_the_site_does_not_know_is_refused(desk: Any, changes: dict[str, Any], said: str) -> None:
    values = desk.config.as_dict()
    values["compression"] |= changes
    with pytest.raises(ConfigError) as refused:
        desk.train(config=json.dumps(values))
    assert said in str(refused.value)
    assert desk.spent() == 0


def test_the_encoding_is_fixed_with_a_runs_first_answer(desk: Any, new_config: Callable[..., RunConfig]) -> None:
    desk.train(1)
    desk.config = new_config(**TOP_K)
    with pytest.raises(RefusedError, match="began with another configuration"):
        desk.train(2)
