"""A statement held against the sites' ledgers: what either side has changed, dropped or forgotten is found."""

import json
import signal
import subprocess
import sys

import pytest

from server.privacy.export import load
from shared import accounting, ledger_chain
from shared.accounting import Release
from shared.errors import DataError

SITES = ["north", "south", "west"]


def rechained(path, change):
    """Rewrite an export as its own site could: change its events, and make the chain anew."""
    export = json.loads(path.read_text())
    events, head = change(export["events"]), ledger_chain.NO_HEAD
    for number, event in enumerate(events, 1):
        event |= {"number": number, "previous": head}
        head = event["row"] = ledger_chain.row_digest(export["dataset"], event)
    path.write_text(json.dumps({**export, "events": events, "head": head}))
    assert ledger_chain.verify(json.loads(path.read_text())) is None
    return path


def edited(path, **changes):
    """Change an event without the chain."""
    export = json.loads(path.read_text())
    export["events"][1] |= changes
    path.write_text(json.dumps(export))
    return path


def faults(run, *exports):
    stated = run.stated(*(word for export in exports for word in ("--verify", export)), sound=False)
    return [fault for each in stated["verifications"] for fault in each["faults"]]


def against(run, *sites):
    return run.stated(*(word for site in sites for word in ("--verify", run.export(site))))


def uncounted(stated):
    return [each["text"] for each in stated["uncounted"]]


def account(stated, site, part="train"):
    (found,) = [each for each in stated["accounts"] if (each["site"], each["part"]) == (site, part)]
    return found


def test_the_ledgers_of_all_sites_confirm_the_statement(played):
    stated = against(played, *SITES)
    assert {each["verified"] for each in stated["accounts"]} == {True}
    assert [(each["sites"], each["events"], each["of_this_run"]) for each in stated["verifications"]] == [
        ([site], 5, 5) for site in SITES
    ]
    assert (stated["notes"], stated["doubts"]) == ([], [])
    expected = accounting.rdp_to_epsilon(
        max(
            accounting.rdp(Release(0.5, account(stated, "north")["releases"][0]["noise_multiplier"], 5), 2),
            accounting.rdp(
                Release(1.0, account(stated, "north", "validation")["releases"][0]["noise_multiplier"], 2), 2
            ),
        ),
        2,
        1e-5,
    )
    assert stated["verifications"][0]["order"] == 2
    assert stated["verifications"][0]["lifetime_epsilon"] == pytest.approx(expected)


def test_a_site_whose_ledger_was_not_given_is_named(played):
    stated = against(played, "south")
    assert [account(stated, site)["verified"] for site in SITES] == [None, True, None]
    assert stated["notes"] == [
        "No ledger was given for north (train), north (validation), west (train), west (validation)."
    ]


def test_a_history_that_was_forged_to_agree_with_itself_is_found_by_the_ledger(mine):
    noise = 3.0
    mine.change("UPDATE spends SET noise_multiplier = ? WHERE site = 'north' AND part = 'train'", noise)
    epsilon = accounting.epsilon([Release(0.5, noise, 5)], 1e-5)
    mine.change("UPDATE spends SET epsilon = ? WHERE site = 'north' AND part = 'train'", epsilon)
    assert account(mine.stated(), "north")["epsilon"] == pytest.approx(epsilon)  # nothing to see in the history alone
    found = faults(mine, mine.export("north"))
    assert any("round 1 (train): the history has noise_multiplier 3.0, the ledger 0.9" in fault for fault in found)
    stated = mine.stated("--verify", mine.export("north"), sound=False)
    assert 7.9 < account(stated, "north")["epsilon"] <= 8.0
    assert account(stated, "north")["verified"] is False
    assert "CONTRADICTED by its ledger" in mine.state("--verify", mine.export("north"), style="text").output


@pytest.mark.parametrize(
    "change",
    [
        "sampling_rate = 0.25",
        "steps = 1",
        "mechanism = 'discrete-gaussian'",
        "ledger_number = 77",
        "ledger_head = '" + "0f" * 32 + "'",
    ],
)
def test_each_field_of_a_tampered_history_row_is_compared(mine, change):
    mine.change(f"UPDATE spends SET {change} WHERE site = 'west' AND part = 'train' AND ledger_number = 4")  # noqa: S608
    name = change.split(" ")[0].removeprefix("ledger_").replace("number", "event").replace("head", "digest")
    found = faults(mine, mine.export("west"))
    assert any(f"site west, round 3 (train): the history has {name}" in fault for fault in found), found


@pytest.mark.parametrize("changes", [{"at": "2020-01-01T00:00:00+00:00"}, {"digest": "ab" * 32}, {"steps": 1}])
def test_a_ledger_edited_without_its_chain_is_found_whatever_was_edited(mine, changes):
    assert any("event 2 was edited" in fault for fault in faults(mine, edited(mine.export("north"), **changes)))


def test_a_ledger_rewritten_chain_and_all_has_other_digests_than_the_history(mine):
    def backdate(events):
        events[0]["at"] = "2020-01-01T00:00:00+00:00"
        return events

    found = faults(mine, rechained(mine.export("north"), backdate))
    assert sum("the history has digest" in fault for fault in found) == 4  # all but the first event's


def test_a_ledger_that_was_put_back_is_found_by_what_it_lacks(mine):
    found = faults(mine, rechained(mine.export("north"), lambda events: events[:3]))
    assert any("ends at event 3, and the coordinator has seen event 5: it is an older copy" in fault for fault in found)
    assert any("train of rounds 3 is in the history and not in the ledger" in fault for fault in found)
    assert any("evaluate of rounds 3 is in the history and not in the ledger" in fault for fault in found)


def test_a_put_back_ledger_that_went_on_alone_is_found_by_its_digests(mine):
    """It has as many events as the coordinator saw, and more; the lost ones were replaced by another's."""

    def elsewhere(events):
        return [*events[:3], *({**event, "run": "elsewhere"} for event in events[3:]), {**events[4], "run": "more"}]

    found = faults(mine, rechained(mine.export("north"), elsewhere))
    assert not any("older copy" in fault for fault in found)
    assert any("train of rounds 3 is in the history and not in the ledger" in fault for fault in found)


def test_a_release_that_only_the_ledger_knows_is_a_fault(mine):
    mine.change("DELETE FROM spends WHERE site = 'north' AND ledger_number = 5")
    mine.change("DELETE FROM participations WHERE site = 'north' AND kind = 'evaluate' AND round_id = 3")
    found = faults(mine, mine.export("north"))
    assert any(
        "round 3 (evaluate) is in the ledger of north, and the history knows of no such" in each for each in found
    )


def test_a_round_charged_twice_is_a_fault(mine):
    found = faults(mine, rechained(mine.export("north"), lambda events: [*events, {**events[0], "request": "again"}]))
    assert any("round 1 (train) was charged twice" in fault for fault in found)


def test_an_account_that_took_the_place_of_the_runs_own_is_a_fault(mine):
    export = json.loads(mine.export("north").read_text())
    export["dataset"]["account"] = "ab" * 16
    path = mine.home / "other.json"
    path.write_text(json.dumps(export))
    found = faults(mine, rechained(path, lambda events: events))
    assert any("account abababab, is not the one that the run's releases are in" in fault for fault in found)


def test_what_has_nothing_to_do_with_the_run_is_refused(mine, tmp_path):
    north = mine.export("north")
    elsewhere = json.loads(north.read_text())
    elsewhere["dataset"] |= {"id": "notes", "account": "cd" * 16}
    other, text, missing = tmp_path / "other.json", tmp_path / "text.json", tmp_path / "missing.json"
    other.write_text(json.dumps(elsewhere))
    rechained(other, lambda events: [{**event, "run": "elsewhere"} for event in events])
    text.write_text("[]")
    for exports, said in (
        ([other], "has nothing of run"),
        ([north, north], "two of the ledgers are of one account"),
        ([text], "export"),
        ([missing], "No such file"),
    ):
        result = mine.state(*(word for export in exports for word in ("--verify", export)))
        assert isinstance(result.exception, DataError), result.output
        assert said in str(result.exception)


def test_an_answer_that_was_lost_is_in_doubt_until_the_ledger_explains_and_counts_it(begun):
    begun.play_losing(("north", "train", 2))
    stated = begun.stated(sound=False)
    assert any("charged answers that never arrived" in doubt for doubt in stated["doubts"])
    before = account(stated, "north")["epsilon"]
    stated = against(begun, "north")
    assert (
        "round 2 (train) is in the ledger of north and not in the history: its answer was lost. It is counted."
        in (stated["verifications"][0]["notes"])
    )
    assert before < 7.0 < account(stated, "north")["epsilon"] == account(stated, "north")["reported"]


def test_the_statement_of_a_killed_run_is_so_far_and_its_ledgers_hold_what_was_not_committed(
    begun, environment, tmp_path
):
    script = tmp_path / "killed.py"
    script.write_text(
        f"""
import os, signal
import client.app
from server import job, rounds
from server.history.store import History
from server.observer import Log
from simulations import prepare
from simulations.grid import InProcessGrid

class Kill(Log):
    def answered(self, number, kind, site, outcome, error):
        if (number, kind, site) == (2, "train", "south"):
            os.kill(os.getpid(), signal.SIGKILL)

grid = InProcessGrid(client.app.build(client.app.site_from_context), prepare.nodes({begun.run!r}))
with History.open({begun.url!r}) as history:
    rounds.run(job.load(prepare.run_folder({begun.run!r})), grid, history, Kill(), engine="in-process")
""",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, timeout=200, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()

    stated = begun.stated()
    assert (stated["guarantee"]["so_far"], stated["run"]["rounds"]) == (True, 1)
    (sums,) = account(stated, "north")["releases"]
    one_step = accounting.epsilon([Release(0.5, sums["noise_multiplier"], 1)], 1e-5)
    assert stated["guarantee"]["epsilon"] == pytest.approx(one_step)
    assert "so far (1 of 3 rounds)" in begun.state(style="text").output
    assert any(
        text.startswith("site north: its ledger was seen at event 2, and its last committed release is event 1")
        for text in uncounted(stated)
    )
    assert not any(text.startswith("site west") for text in uncounted(stated))

    stated = against(begun, *SITES)
    assert uncounted(stated) == ["A round under way may have been charged at the sites, and is not in these numbers."]
    three_steps = accounting.epsilon([Release(0.5, sums["noise_multiplier"], 3)], 1e-5)
    assert [account(stated, site)["epsilon"] for site in SITES] == pytest.approx([three_steps, three_steps, one_step])
    assert stated["guarantee"]["epsilon"] == pytest.approx(three_steps)

    begun.play()
    stated = against(begun, *SITES)
    assert (stated["guarantee"]["so_far"], uncounted(stated), stated["notes"]) == (False, [], [])
    assert {each["verified"] for each in stated["accounts"]} == {True}
    assert [each["notes"] for each in stated["verifications"]] == [[], [], []]
    assert [each["events"] for each in stated["verifications"]] == [5, 5, 5]


def test_an_export_is_read_without_a_network_a_site_or_a_database(played):
    export = load(played.export("north"))
    assert (export.dataset, len(export.events), export.fault) == ("tiny.north", 5, None)


def test_a_report_that_the_ledger_does_not_bear_out_stays_in_doubt(mine):
    mine.change(
        "UPDATE spends SET epsilon = 9.5 WHERE site = 'north' AND part = 'train' AND ledger_number = 4"
    )  # as if it had charged more than it has
    stated = mine.stated("--verify", mine.export("north"), sound=False)
    assert any("reported epsilon 9.5, and its ledger comes to 7.99" in f for f in stated["verifications"][0]["faults"])
    assert any("charged answers that never arrived" in doubt for doubt in stated["doubts"])


def test_a_run_with_discrete_noise_is_stated_by_renyi_divergences_and_confirmed(discrete):
    stated = against(discrete, *SITES)
    assert {each["verified"] for each in stated["accounts"]} == {True}
    (sums,) = account(stated, "north")["releases"]
    assert sums["mechanism"] == "discrete-gaussian"
    expected = accounting.epsilon([Release(0.5, sums["noise_multiplier"], 1, "discrete-gaussian")], 1e-5)
    assert account(stated, "north")["epsilon"] == pytest.approx(expected)
    assert any("Rényi divergences at integer orders" in line for line in stated["accountant"])
    assert not any("floating point" in line for line in stated["not_covered"])


def test_releases_of_which_the_history_has_no_part_are_counted_from_the_ledger(begun):
    """Each of a site's scores was charged and lost: the history knows of no account of its validation records."""
    begun.play_losing(("north", "evaluate", 2), ("north", "evaluate", 3))
    stated = begun.stated()
    assert not [each for each in stated["accounts"] if (each["site"], each["part"]) == ("north", "validation")]
    stated = against(begun, *SITES)
    found = account(stated, "north", "validation")
    (sums,) = found["releases"]
    assert (sums["rounds"], sums["steps"], found["verified"], found["reported"]) == ("2-3", 2, True, None)
    expected = accounting.epsilon([Release(1.0, sums["noise_multiplier"], 2)], 1e-5)
    assert found["epsilon"] == pytest.approx(expected) == account(stated, "south", "validation")["epsilon"]
    assert (found["budget"], found["delta"]) == (8.0, 1e-5)
    assert [each["site"] for each in stated["accounts"]] == [site for site in SITES for _ in range(2)]
    assert stated["guarantee"]["epsilon"] == max(each["epsilon"] for each in stated["accounts"])
    assert (stated["guarantee"]["verdict"], uncounted(stated)) == ("holds", [])


def test_an_account_that_only_the_ledger_has_can_be_the_largest_and_above_the_budget(begun):
    begun.play_losing(("north", "evaluate", 2), ("north", "evaluate", 3))

    def loud(events):
        return [event | {"noise_multiplier": 0.2} if event["kind"] == "evaluate" else event for event in events]

    begun.change("UPDATE spends SET ledger_number = 0 WHERE site = 'north'")  # so that digests are not compared
    stated = begun.stated("--verify", rechained(begun.export("north"), loud), sound=False)
    assert stated["guarantee"]["largest"] == ["north", "tiny.north", "validation"]
    assert stated["guarantee"]["epsilon"] == pytest.approx(accounting.epsilon([Release(1.0, 0.2, 2)], 1e-5))
    assert stated["verifications"][0]["faults"] == []
    assert any("site north, validation records" in doubt and "above the run's 8" in doubt for doubt in stated["doubts"])


def test_a_release_without_noise_that_only_the_ledger_has_is_in_doubt(begun):
    begun.play_losing(("north", "evaluate", 2), ("north", "evaluate", 3))
    begun.change("UPDATE spends SET ledger_number = 0 WHERE site = 'north'")  # so that digests are not compared
    path = rechained(begun.export("north"), lambda events: [*events[:-1], events[-1] | {"noise_multiplier": 0.0}])
    stated = begun.stated("--verify", path, sound=False)
    assert (stated["guarantee"]["epsilon"], stated["verifications"][0]["faults"]) == ("Infinity", [])
    assert any("site north, validation records: a sum was released without noise" in line for line in stated["doubts"])


def test_a_site_that_was_always_late_is_counted_from_its_ledger(begun):
    lost = [("west", "train", 1), ("west", "train", 2), ("west", "train", 3)]
    begun.play_losing(*lost, ("west", "evaluate", 2), ("west", "evaluate", 3))
    begun.change("UPDATE participations SET outcome = 'timeout' WHERE site = 'west'")
    stated = begun.stated()
    assert stated["guarantee"]["verdict"] == "holds as recorded"
    assert {each["site"] for each in stated["uncounted"]} == {"west"}
    stated = against(begun, *SITES)
    assert stated["verifications"][2]["faults"] == []
    assert stated["verifications"][2]["sites"] == ["west"]
    assert account(stated, "west")["epsilon"] == pytest.approx(account(stated, "north")["epsilon"])
    assert (stated["guarantee"]["verdict"], uncounted(stated)) == ("holds", [])


def test_an_answer_of_which_the_history_has_no_request_is_a_fault_of_an_unrecorded_site_too(begun):
    begun.play_losing(*(("west", kind, number) for kind in ("train", "evaluate") for number in (1, 2, 3)))
    begun.change("DELETE FROM participations WHERE site = 'west' AND kind = 'evaluate'")
    found = faults(begun, begun.export("west"))
    assert [fault.split(" is in")[0] for fault in found] == ["round 2 (evaluate)", "round 3 (evaluate)"]


def test_a_release_charged_to_no_part_of_the_dataset_is_a_fault(mine):
    def elsewhere(events):
        return [*events, events[-1] | {"round": 4, "kind": "train", "part": "none"}]

    found = faults(mine, rechained(mine.export("north"), elsewhere))
    assert "dataset 'tiny.north': round 4 (train) is charged to 'none'." in found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda export: export["dataset"].update(delta=10**400), "delta is not a float"),
        (lambda export: export["dataset"].update(delta=2.0), "delta is not within 0 and 1"),
        (lambda export: export["dataset"].update(order=10**9), "order not from 2 to 16384"),
        (lambda export: export["dataset"].update(order=1), "order not from 2 to 16384"),
        (lambda export: export["events"][0].update(steps=10**400), "steps is not a int"),
        (lambda export: export["events"][0].update(sampling_rate=10**400), "sampling_rate is not a float"),
        (lambda export: export["events"][0].update(steps=2**31), "more than 2147483647 steps"),
    ],
)
def test_an_export_with_numbers_that_no_ledger_holds_is_refused_in_one_line(mine, change, said):
    path = mine.export("north")
    export = json.loads(path.read_text())
    change(export)
    path.write_text(json.dumps(export))
    with pytest.raises(DataError) as refused:
        load(path)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_export_nested_without_end_is_refused_in_one_line(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text("[" * 200_000)
    with pytest.raises(DataError, match="not the JSON of a ledger's export"):
        load(path)


def test_noise_beyond_a_floats_square_bounds_nothing_and_is_no_traceback(mine):
    found = faults(
        mine, rechained(mine.export("north"), lambda events: [events[0] | {"noise_multiplier": 1e300}, *events[1:]])
    )
    assert any("the history has noise_multiplier" in fault for fault in found)
