"""The statement of a real run: derived from what was recorded, and in doubt where that contradicts itself."""

import json
import shutil
import subprocess
import sys
from dataclasses import fields
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from server.history.store import History
from server.privacy import claims, statement, statement_page
from server.privacy.cli import privacy
from server.privacy.records import ranges
from server.privacy.statement import StudyError
from shared import accounting
from shared.accounting import Release
from shared.errors import RunFailedError
from shared.messages import REPLIES

SITES = ["north", "south", "west"]

PARTS = ["train", "validation"]
TAMPER = "UPDATE spends SET {} WHERE site = 'north' AND part = 'train' AND round_id = (SELECT max(id) FROM rounds)"


def account(stated, site, part):
    (found,) = [each for each in stated["accounts"] if (each["site"], each["part"]) == (site, part)]
    return found


def test_a_run_is_stated_with_what_its_recorded_releases_come_to(played):
    stated = played.stated()
    with History.open(played.url) as history:
        spends = [spend for _, spend in history.spends(played.run, site="north") if spend.part == "train"]
    expected = accounting.epsilon([Release(s.sampling_rate, s.noise_multiplier, s.steps) for s in spends], 1e-5)
    said = stated["guarantee"]
    assert said["epsilon"] == pytest.approx(expected, rel=1e-9)
    assert 7.9 < said["epsilon"] <= 8.0
    assert (said["delta"], said["so_far"], said["verdict"]) == (1e-5, False, "holds")
    assert (said["unit"], said["neighbours"]) == ("one record of a site's dataset", "add or remove one record")
    assert (stated["doubts"], stated["uncounted"], stated["notes"]) == ([], [], [])
    (train,) = account(stated, "north", "train")["releases"]
    assert (train["rounds"], train["steps"], train["sampling_rate"]) == ("1-3", 5, 0.5)
    assert (train["mechanism"], train["noise_source"]) == ("gaussian", "aes-256-ctr")
    (scored,) = account(stated, "north", "validation")["releases"]
    assert (scored["rounds"], scored["steps"], scored["sampling_rate"]) == ("2-3", 2, 1.0)


def test_every_site_and_part_has_an_account_and_the_runs_epsilon_is_the_largest_never_a_sum(mine):
    stated = mine.stated()
    assert [(each["site"], each["part"]) for each in stated["accounts"]] == [(s, p) for s in SITES for p in PARTS]
    assert stated["guarantee"]["epsilon"] == max(each["epsilon"] for each in stated["accounts"]) <= 8.0
    # The larger part counts, whichever it is.
    mine.change("UPDATE spends SET noise_multiplier = 0.5 WHERE site = 'west' AND part = 'validation'")
    stated = mine.stated(sound=False)
    assert stated["guarantee"]["largest"] == ["west", "tiny.west", "validation"]
    assert stated["guarantee"]["epsilon"] == pytest.approx(accounting.epsilon([Release(1.0, 0.5, 2)], 1e-5))


@pytest.mark.parametrize(("reported", "why"), [(1.0, "its ledger lacks some"), (9.5, "answers that never arrived")])
def test_epsilon_is_composed_from_the_releases_and_a_report_that_differs_is_said_loudly(mine, reported, why):
    mine.change(TAMPER.format("epsilon = ?"), reported)
    result = mine.state()
    assert result.exit_code == 1
    assert "is in doubt" in str(result.exception)
    stated = json.loads(result.stdout)
    assert account(stated, "north", "train")["reported"] == reported
    assert 7.9 < account(stated, "north", "train")["epsilon"] <= 8.0
    (doubt,) = stated["doubts"]
    assert why in doubt
    assert "NOT ESTABLISHED" in mine.state(style="text").output
    assert "Not established" in mine.state(style="html").output


def test_a_difference_of_rounding_is_none_and_a_larger_one_is(mine):
    mine.change(TAMPER.format("epsilon = epsilon * 1.0000005"))
    mine.stated()
    mine.change(TAMPER.format("epsilon = epsilon * 1.000003"))
    mine.stated(sound=False)


@pytest.mark.parametrize(
    ("change", "doubt"),
    [
        ("noise_multiplier = noise_multiplier * 2", "its recorded releases come to"),
        ("steps = steps + 40", "is above the run's 8"),
        ("noise_multiplier = 0, mechanism = 'none'", "released without noise"),
        ("mechanism = 'laplace'", "no mechanism that is accounted for"),
        ("sampling_rate = 7", "no mechanism that is accounted for"),
        ("ledger_number = 1", "has given the number 1 to 2 releases (rounds 1, 3)"),
    ],
)
def test_a_history_that_contradicts_itself_is_in_doubt(mine, change, doubt):
    mine.change(TAMPER.format(change))
    assert any(doubt in line for line in mine.stated(sound=False)["doubts"])


def test_an_answer_without_a_recorded_spend_is_in_doubt(mine):
    mine.change("DELETE FROM spends WHERE site = 'west' AND round_id = (SELECT max(id) FROM rounds)")
    doubts = mine.stated(sound=False)["doubts"]
    assert "site west answered in round 3 (train), and no spend is recorded for it." in doubts
    assert "site west answered in round 3 (evaluate), and no spend is recorded for it." in doubts


def uncounted(stated):
    return [each["text"] for each in stated["uncounted"]]


@pytest.mark.parametrize("outcome", ["failed", "timeout"])
def test_an_answer_lost_after_the_last_recorded_release_is_said_and_the_claim_is_of_what_was_recorded(begun, outcome):
    begun.play_losing(("south", "train", 3))
    begun.change("UPDATE participations SET outcome = ? WHERE outcome <> 'ok'", outcome)
    stated = begun.stated()
    (said,) = uncounted(stated)
    assert said.startswith(f"site south may have charged train of round 3, of which no answer counts ({outcome}: lost")
    assert stated["guarantee"]["verdict"] == "holds as recorded"
    text, page = begun.state(style="text").output, begun.state(style="html").output
    assert "By the recorded releases, each record of each site lost at most epsilon" in text
    assert "Each record of each site lost" not in text + page
    assert said in text
    assert said.split(" (")[0] in page


def test_a_lost_answer_before_the_last_recorded_release_is_told_by_what_the_site_reports(begun):
    begun.play_losing(("north", "train", 2))
    stated = begun.stated(sound=False)
    assert uncounted(stated) == []
    assert any("answers that never arrived" in doubt for doubt in stated["doubts"])


def test_a_site_none_of_whose_answers_passed_the_coordinators_checks_is_named(begun):
    def nonsense(inner):
        def answer(message, context):
            reply = inner(message=message, context=context)
            if context.node_id == 3 and message.metadata.message_type != "query":
                reply.content.config_records["values"]["epsilon"] = -1.0
            return reply

        return answer

    begun.play(nonsense)
    said = uncounted(begun.stated())
    assert [line.split(",")[0] for line in said] == [
        "site west may have charged evaluate of rounds 2-3",
        "site west may have charged train of rounds 1-3",
    ]
    assert "are no such values" in said[0]


def test_a_site_that_a_resumed_run_no_longer_asks_is_named(mine):
    """Its answer to the round that the first attempt did not commit is in no round, and in its ledger."""
    mine.change("UPDATE rounds SET attempt = 2 WHERE number = 3")
    mine.change("DELETE FROM participations WHERE site = 'west' AND round_id = (SELECT max(id) FROM rounds)")
    mine.change("DELETE FROM spends WHERE site = 'west' AND round_id = (SELECT max(id) FROM rounds)")
    mine.change("UPDATE ledgers SET number = 3 WHERE site = 'west'")
    assert [line.split(",")[0] for line in uncounted(mine.stated())] == [
        "site west may have charged evaluate of round 3",
        "site west may have charged train of round 3",
    ]


@pytest.mark.parametrize("number", [0, 5])
def test_a_site_that_joined_a_lost_attempt_alone_is_named_however_far_its_ledger_was(mine, number):
    """It was asked, may have been charged, and never came back; an earlier run may have seen its ledger as far."""
    mine.change("DELETE FROM spends WHERE site = 'west'")
    mine.change("DELETE FROM participations WHERE site = 'west'")
    mine.change("UPDATE rounds SET attempt = 2")
    mine.change("UPDATE attempts SET outcome = 'lost'")
    mine.change(
        "INSERT INTO attempts (run_id, number, engine, started_at) SELECT run_id, 2, engine, started_at FROM attempts"
    )
    mine.change("UPDATE ledgers SET number = ? WHERE site = 'west'", number)
    said = [line for line in uncounted(mine.stated()) if line.startswith("site west")]
    assert said == [
        f"site west: its ledger was seen at event {number}, and no release of it is recorded. What it may have answered to a "
        "round that was not committed is not in these numbers; its ledger (--verify) has it."
    ]


def test_a_run_that_failed_in_its_first_round_has_no_recorded_release_and_says_what_was_seen(begun):
    with pytest.raises(RunFailedError):
        begun.play_losing(("south", "train", 1), ("west", "train", 1))
    stated = begun.stated()
    assert (stated["guarantee"]["verdict"], stated["accounts"]) == ("nothing recorded", [])
    assert any(
        "site north: its ledger was seen at event 1, and no release of it is" in line for line in uncounted(stated)
    )
    for style in ("text", "html"):
        written = begun.state(style=style).output
        assert "No release is recorded." in written
        assert "site north: its ledger was seen at event 1" in written
        assert "Nothing has been released" not in written


def test_what_an_unfinished_run_may_have_left_is_said_when_a_later_run_has_moved_the_ledger_on(mine):
    mine.change("UPDATE ledgers SET number = 9, run_id = 'later' WHERE site = 'north'")
    assert uncounted(mine.stated()) == []  # one attempt that committed all its rounds has left nothing
    mine.change("UPDATE runs SET status = 'failed'")
    said = uncounted(mine.stated())
    assert said[0].startswith(
        "site north: its ledger was seen at event 9 by run later, and its last committed release is"
    )
    assert said[1].startswith("A round under way")


def test_a_ledger_that_the_run_moved_and_of_which_it_records_nothing_is_named(mine):
    mine.change("DELETE FROM spends WHERE site = 'north'")
    mine.change("DELETE FROM participations WHERE site = 'north'")
    (said,) = uncounted(mine.stated())
    assert said.startswith("site north: its ledger was seen at event 5, and no release of it is recorded.")


def test_a_run_without_privacy_has_no_guarantee_and_says_so_everywhere(without_privacy):
    stated = without_privacy.stated()
    assert (stated["guarantee"]["verdict"], stated["guarantee"]["epsilon"]) == ("none", "Infinity")
    assert "NO GUARANTEE" in without_privacy.state(style="text").output
    page = without_privacy.state(style="html").output
    assert "WITHOUT PRIVACY" in page
    assert "Each record of each site" not in page
    without_privacy.change("UPDATE runs SET private = 1")  # whatever the row says, no noise is no privacy
    without_privacy.stated()
    without_privacy.change("UPDATE runs SET config = '{}'")
    assert without_privacy.stated(sound=False)["guarantee"]["epsilon"] == "Infinity"


def test_nothing_but_the_history_is_needed_and_torch_is_not_loaded(mine):
    shutil.rmtree(mine.home / "runs")
    script = (
        "import sys; from click.testing import CliRunner; from server.privacy.cli import privacy\n"
        "result = CliRunner().invoke(privacy, ['statement', 'last', '--database', sys.argv[1]])\n"
        "print(result.output); loaded = {'torch', 'opacus', 'transformers'} & set(sys.modules)\n"
        "sys.exit(result.exit_code or bool(loaded))"
    )
    done = subprocess.run([sys.executable, "-c", script, mine.url], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Each record of each site lost at most epsilon 8.00 at delta 1e-05" in done.stdout


def test_the_public_list_names_every_field_that_leaves_a_site():
    marked = {mark: {f.name for r in REPLIES for f in fields(r) if f.metadata["leaves"] == mark} for mark in PUBLIC}
    assert marked == {"public": set(claims.PUBLIC), "released": set(claims.RELEASED)}


PUBLIC = ("public", "released")


def test_what_is_assumed_and_not_covered_is_said(played):
    stated = played.stated()
    assert any("Sites share no record" in line for line in stated["assumed"])
    for word in ("Tuning", "several records", "How long", "floating point"):
        assert any(word in line for line in stated["not_covered"]), word
    assert any("dp-accounting 0.6" in line for line in stated["accountant"])
    assert stated["leaves_a_site"]["released"]["TrainReply"] == ["update"]


def test_discrete_noise_and_a_devices_generator_are_named(mine):
    mine.change("UPDATE spends SET mechanism = 'discrete-gaussian', noise_source = 'device'")
    stated = mine.stated(sound=False)  # composed by Rényi divergences, epsilon is another than was reported
    assert [line for line in stated["accountant"] if "Rényi divergences at integer orders" in line]
    assert not [line for line in stated["accountant"] if "privacy-loss" in line]
    assert not [line for line in stated["not_covered"] if "floating point" in line]
    assert stated["noise_sources"] == ["the accelerator's own generator, which is not a cryptographic one"]


def test_a_history_of_the_first_schema_is_stated_once_it_is_upgraded(tmp_path):
    asset = Path(__file__).parents[2] / "assets" / "history-0001.db"
    url = f"sqlite:///{shutil.copy(asset, tmp_path / 'old.db')}"
    History.upgrade(url)
    result = CliRunner().invoke(privacy, ["statement", "lungs-1", "--database", url, "--format", "json"])
    stated = json.loads(result.stdout)
    assert stated["noise_sources"] == [
        "not recorded (an answer that was lost, or a history from before releases named it)"
    ]
    assert stated["accounts"][0]["events"] is None


class Reader(HTMLParser):
    """What a page loads, and its text."""

    def __init__(self, page):
        super().__init__()
        self.loads, self.tags, self.text = [], set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "action")]

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_else_and_escapes_what_others_wrote(mine, tmp_path):
    mine.change("UPDATE runs SET name = '<script>alert(1)</script>'")
    mine.change("UPDATE spends SET gradients = '<img src=x>' WHERE part = 'train'")
    out = tmp_path / "statement.html"
    result = mine.state("--out", out, style="html")
    assert result.exit_code == 0, result.output
    assert "Each record of each site lost at most epsilon 8.00" in result.output
    page = Reader(out.read_text(encoding="utf-8"))
    assert page.loads == []
    assert not {"script", "img", "link", "iframe"} & page.tags
    for word in ("<script>alert(1)</script>", "ε = 8.00", "north", "Poisson sampling", "Tuning", "simulation"):
        assert word in page.text, word


def test_where_the_statement_goes_is_looked_at_first(mine, tmp_path):
    result = mine.state("--out", tmp_path / "none" / "page.html", style="html")
    assert result.exit_code != 0
    assert "there is no folder" in str(result.exception)


def test_round_numbers_are_written_shortly():
    assert ranges([]) == ""
    assert ranges([3, 1, 2, 7, 9, 10]) == "1-3, 7, 9-10"


def test_a_run_of_a_sweep_is_a_study_and_is_not_stated(mine, tmp_path):
    mine.change("INSERT INTO sweeps VALUES ('tiny-5ca1e', 'tiny', '{}', '2026-03-01 12:00:00', '0')")
    mine.change("INSERT INTO trials VALUES (?, 'tiny-5ca1e', 1, 0)", mine.run)
    refused = mine.state("--out", str(tmp_path / "statement.json"))
    assert refused.exit_code != 0
    assert refused.stdout == ""
    assert not (tmp_path / "statement.json").exists()
    assert isinstance(refused.exception, StudyError)
    said = str(refused.exception)
    assert said.startswith(
        f"Run {mine.run} is a study, one of the 1 of sweep tiny-5ca1e, and has no privacy statement: "
    )
    assert "\n" not in said
    # Nor do the pages that an export writes claim anything.
    with History.open(mine.url) as history:
        made = statement.make(statement.read(history, history.run(mine.run)), now=datetime.now(UTC))
    assert statement_page.claim(made).startswith("A STUDY, NO STATEMENT")
    assert "lost at most" not in statement_page.as_text(made) + statement_page.as_page(made)
    stated = json.loads(statement_page.as_json(made))["guarantee"]
    assert (stated["verdict"], stated["epsilon"], stated["largest"]) == ("study", None, None)
