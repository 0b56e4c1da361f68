"""`moonflower report`: what the page says, what it never says, and that it stands alone."""

import base64
import hashlib
import html
import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from server.history.records import Checkpoint, Metric, Participation, Round, Spend, Trial
from server.history.store import History
from server.report import facts, output, words
from server.report.cli import report
from server.report.output import ReportError
from shared.errors import MoonflowerError, NotFoundError

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
SITES = ("charite", "st-marys")
HOSTILE = "$\\frac$\"<script>alert('x')</script>\u202e"
VOID = {"meta", "br", "path", "use", "rect", "line"}


class Page(HTMLParser):
    """What a browser would make of a page: its elements, and its text outside of style and plots."""

    def __init__(self, written: str) -> None:
        super().__init__()
        self.html, self.tags, self.attributes, self.text = written, [], [], ""
        self._open: list[str] = []
        self.feed(written)
        assert self._open == [], "elements left open"
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag
        if tag in ("th", "td", "dt", "dd", "li"):
            self.text += " "

    def handle_data(self, data):
        if "style" not in self._open and "svg" not in self._open:
            self.text += data

    def plots(self) -> list[str]:
        return [value for tag, name, value in self.attributes if tag == "figure" and name == "id"]


def a_round(number: int, *, sites=SITES, private=True, test=True, attempt=1) -> Round:
    """Make a round in which every site trains and is scored."""
    spent = number / 2 if private else math.inf
    noise, budget = (1.9, 8.0) if private else (0.0, math.inf)
    accuracy = 0.7 + number / 1000
    interval = (accuracy - 0.02, accuracy + 0.02) if private else (None, None)
    scores = [("accuracy", accuracy), ("f1", accuracy - 0.01), ("auc", accuracy + 0.1), ("loss", 1 / number)]
    return Round(
        run="lungs-1",
        number=number,
        attempt=attempt,
        phase="warm_start" if number < 3 else "training",
        started_at=START + timedelta(minutes=number),
        seconds=12.25,
        checkpoint=Checkpoint(f"{number:064x}", 5_000_000),
        participations=tuple(
            Participation(site, kind, "ok", 3.5, 88_000_000, 6_000) for site in sites for kind in ("train", "evaluate")
        ),
        metrics=(
            *(Metric("test", None, name, value) for name, value in scores if test),
            Metric("validation", None, "accuracy", accuracy, *interval),
            *(Metric("validation", site, "accuracy", accuracy, *interval) for site in sites),
        ),
        spends=tuple(
            Spend(site, f"{site}-2026", part, spent, 1e-5, noise, 0.05, 20, budget)
            for site in sites
            for part in ("train", "validation")
        ),
    )


@pytest.fixture
def make(sqlite_url: str) -> Callable[..., Page]:
    """Write a run into a history on the disk, and give its page as the command makes it."""

    def write(
        rounds: list[Round],
        *,
        private=True,
        planned=None,
        end="completed",
        name="Lungs",
        config=None,
        engine="flower",
        trial=None,
    ) -> Page:
        with History.open(sqlite_url) as history:
            history.create_sweep("lungs-5ca1e", name="lungs", plan={}, version="0.1.0")
            history.create_run(
                "lungs-1",
                name=name,
                config=config or {"privacy": {"epsilon": 8.0 if private else "inf"}, "training": {"rounds": 5}},
                config_digest="c0ffee" * 8,
                rounds_planned=planned or len(rounds) or 5,
                private=private,
                version="0.1.0",
                trial=trial,
            )
            attempt = history.start_attempt("lungs-1", engine=engine)
            for each in rounds:
                history.commit_round(each)
            if end is not None:
                history.end_attempt("lungs-1", attempt.number, end, "the disk is full" if end == "failed" else None)
                history.finish_run("lungs-1", end, attempt=attempt.number)
        out = Path(sqlite_url.removeprefix("sqlite:///")).with_name("report.html")
        result = CliRunner().invoke(report, ["last", "--out", str(out), "--database", sqlite_url])
        assert result.exception is None, result.output
        return Page(out.read_text(encoding="utf-8"))

    return write


def few(count: int = 5, **options) -> list[Round]:
    return [a_round(number, **options) for number in range(1, count + 1)]


def test_a_private_run_states_its_largest_epsilon_its_unit_and_what_is_not_covered(make):
    rounds = few()
    dearest = replace(rounds[-1].spends[2], epsilon=3.1401)  # st-marys, train
    rounds[-1] = replace(rounds[-1], spends=(*rounds[-1].spends[:2], dearest, rounds[-1].spends[3]))
    text = make(rounds).text
    assert "Each record of each site lost at most ε = 3.15 of 8 planned, at δ = 10⁻⁵." in text
    assert "train records is ε = 3.15 of 8, at st-marys" in text
    assert "validation records is ε = 2.50 of 8" in text
    for words_ in ("add-or-remove-one", "per site", "compose in parallel", "declare that they share no records"):
        assert words_ in text
    for words_ in ("rounded size", "process dies", "floating-point", "operating system's randomness", "Other runs"):
        assert words_ in text
    assert "WITHOUT PRIVACY" not in text
    assert "Not established" not in text


def test_a_run_at_epsilon_inf_says_without_privacy_and_nowhere_claims_otherwise(make):
    made = make(few(private=False), private=False)
    assert made.text.count("WITHOUT PRIVACY") == 2  # the title and the banner
    assert ("div", "role", "alert") in made.attributes
    for claim in ("Each record of each site lost", "promised", "compose in parallel", "95 %", "budget", "planned:"):
        assert claim not in made.html.partition("</style>")[2]
    assert "plot-epsilon" not in made.plots()


def test_a_run_whose_configuration_says_inf_is_not_private_whatever_its_row_says(make):
    made = make(few(private=False), private=True, config={"privacy": {"epsilon": "inf"}})
    assert "WITHOUT PRIVACY" in made.text
    assert "Each record of each site lost" not in made.text


def _with_spend(**changes) -> list[Round]:
    rounds = few()
    first = replace(rounds[2].spends[0], **changes)
    rounds[2] = replace(rounds[2], spends=(first, *rounds[2].spends[1:]))
    return rounds


@pytest.mark.parametrize(
    ("rounds", "doubt"),
    [
        (_with_spend(epsilon=math.inf), "charite reports no finite ε for its train records"),
        (_with_spend(epsilon=9.0), "charite reports ε = 9.00 for its train records, above the 8 planned"),
        (_with_spend(noise_multiplier=0.0), "charite released a sum of its train records without noise"),
        (
            [replace(each, spends=each.spends[:3] if each.number == 4 else each.spends) for each in few()],
            "st-marys answered in round 4 (evaluate), and no spend is recorded",
        ),
    ],
    ids=["unbounded", "overspent", "noiseless", "unrecorded"],
)
def test_a_history_that_contradicts_the_promise_takes_the_place_of_the_claim(make, rounds, doubt):
    made = make(rounds)
    assert doubt in made.text
    assert "Not established." in made.text
    assert "Each record of each site lost" not in made.text


def test_a_site_that_reports_less_than_its_releases_cost_is_named(make):
    made = make([replace(each, spends=tuple(replace(s, epsilon=0.9) for s in each.spends)) for each in few()])
    assert "charite reports ε = 0.90 for its train records, but its releases come to 1.18." in made.text
    assert "Not established." in made.text


def test_a_site_that_reports_less_is_found_among_many_different_ones(make):
    rounds = few(2, sites=[f"site-{number:02d}" for number in range(20)])
    spends = [
        tuple(replace(spend, noise_multiplier=2 + place / 100) for place, spend in enumerate(each.spends))
        for each in rounds
    ]
    spends = [
        tuple(replace(spend, epsilon=spend.epsilon * (0.3 if spend.site == "site-17" else 3)) for spend in each)
        for each in spends
    ]
    made = make([replace(each, spends=changed) for each, changed in zip(rounds, spends, strict=True)])
    assert "Site site-17 reports ε = 0.30" in made.text
    assert "16 of 40 accounts" in made.text


def test_releases_that_no_mechanism_can_make_are_a_doubt_and_not_a_crash(make):
    made = make(_with_spend(sampling_rate=7.0))
    assert "charite reports releases of its train records that no mechanism can make." in made.text


def test_the_page_says_what_it_composed_again(make):
    text = make(few()).text
    assert "the largest comes to ε = 1.18, and no site reports less than its releases cost." in text


def test_the_sites_table_lists_releases_epsilon_answers_and_accuracy(make):
    rounds = few()
    refused = Participation("aku", "train", "refused", 0.1, 512, 64, "max_epsilon=8 is spent")
    late = Participation("charite", "train", "timeout", 60.0, 512, 0, "no answer")
    rounds[3] = replace(
        rounds[3], participations=(refused, late, *rounds[3].participations[1:]), spends=rounds[3].spends[1:]
    )
    text = make(rounds).text
    assert re.search(
        r"charite charite-2026 80 . q 0\.05, . 1\.9 2\.50 of 8 100 . q 0\.05, . 1\.9 2\.50 of 8 10⁻⁵", text
    )
    assert re.search(r"charite charite-2026 .* 9 0 0 1 0\.705 ?\(0\.685 to 0\.725\)", text)
    assert re.search(r"aku – – – – – – 0 1 0 0 –", text)
    assert "aku train refused 1 4 max_epsilon=8 is spent" in text
    assert "1 request failed or timed out." in text


def test_key_numbers_are_those_of_the_last_round(make):
    text = make(few()).text
    assert "Test accuracy 0.705 after round 5" in text
    assert "Test loss 0.200 after round 5" in text
    assert "Data moved 1.76 GB 1.76 GB to the sites, 120 kB back" in text
    assert "Time 1 min 01 s in committed rounds" in text
    assert "commonest label" not in text


def test_the_majority_baseline_is_shown_only_where_the_metrics_hold_it(make):
    rounds = few()
    rounds[-1] = replace(rounds[-1], metrics=(*rounds[-1].metrics, Metric("test", None, "majority_accuracy", 0.615)))
    assert "always the commonest label: 0.615" in make(rounds).text


def test_all_plots_are_drawn_with_words_for_who_cannot_see_them(make):
    made = make(few())
    assert made.plots() == [
        "plot-scores",
        "plot-loss",
        "plot-validation",
        "plot-epsilon",
        "plot-seconds",
        "plot-transfer",
    ]
    labels = [value for tag, name, value in made.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(labels) == 6
    assert "accuracy 0.701 to 0.705" in labels[0]
    assert "charite 0.705 (0.685 to 0.725)" in labels[2]
    assert "train records: 2 sites 2.50, of 8" in labels[3]
    for axis in ("round", "cross-entropy (nats)", "seconds a round", "MB a round", "ε spent in this run", "warm start"):
        assert f">{axis}</text>" in made.html


def test_a_run_without_a_test_set_shows_the_sites_validation_instead(make):
    made = make(few(test=False))
    assert made.plots()[0] == "plot-validation"
    assert "No public test set was scored" in made.text
    assert "Validation accuracy 0.705 0.685 to 0.725 (95 % of the noise), all sites" in made.text


def test_a_run_that_was_never_scored_is_reported(make):
    made = make([replace(each, metrics=()) for each in few()])
    assert made.plots() == ["plot-epsilon", "plot-seconds", "plot-transfer"]


def test_scores_that_are_not_finite_are_named_and_not_drawn(make):
    rounds = few()
    broken = (Metric("test", None, "accuracy", 0.5), Metric("test", None, "loss", math.nan))
    made = make([replace(each, metrics=broken) for each in rounds])
    assert "Test loss not a number" in made.text
    assert "plot-loss" not in made.plots()


def test_one_round_is_enough_for_a_report(make):
    assert len(make(few(1)).plots()) == 6


def test_a_run_that_goes_on_is_reported_as_far_as_it_got(make):
    text = make(few(3), planned=10, end=None).text
    assert "Each record of each site has lost at most ε = 1.50" in text
    assert "running 3 of 10 rounds, 2 sites; not finished, and reported as far as it got" in text


def test_a_run_with_no_rounds_claims_nothing(make):
    made = make([], end=None)
    assert "No release is recorded yet. Planned: at most ε = 8" in made.text
    assert "No round was committed, so there is nothing to plot." in made.text
    assert "Each record of each site lost" not in made.text


def test_a_failed_run_shows_its_error_and_what_is_missing(make):
    text = make(few(2), planned=5, end="failed").text
    assert "failed 2 of 5 rounds, 2 sites; it ended before its last round" in text
    assert "error Attempt 1 failed: the disk is full" in text


def test_an_in_process_run_is_called_a_simulation(make):
    assert "A simulation. The sites of this run were virtual" in make(few(), engine="in-process").text


def test_a_run_of_a_sweep_is_called_a_study_and_claims_nothing(make):
    page = make(few(), trial=Trial("lungs-5ca1e", 1, 0))
    assert "A study: no claim." in page.text
    assert "one of sweep lungs-5ca1e" in page.text
    assert "lost at most" not in page.text


def test_other_peoples_text_is_escaped_everywhere(make, sqlite_url):
    rounds = [
        replace(
            each,
            phase=HOSTILE,
            participations=(*each.participations, Participation(HOSTILE + "2", "train", "failed", 1, 0, 0, HOSTILE)),
        )
        for each in few(3, sites=(HOSTILE, "b"))
    ]
    rounds[0] = replace(rounds[0], phase="warm_start")
    with History.open(sqlite_url):
        pass
    made = make(rounds, name=HOSTILE, config={"privacy": {"epsilon": 8}, "labels": [HOSTILE]}, end="failed")
    assert "script" not in made.tags
    assert "\u202e" not in made.html
    assert "<script" not in made.html
    assert not any(name.startswith("on") for _, name, _ in made.attributes)
    assert made.text.count("<script>alert('x')</script>") > 6  # read as words: name, sites, error, configuration
    assert re.search(r">\$.frac\$\"&lt;script&gt;[^<]*</text>", made.html)  # in a plot, not taken for a formula


def test_the_page_loads_nothing_and_allows_nothing(make):
    made = make(few())
    assert "://" not in made.html
    assert not {"script", "link", "iframe", "img", "object", "a", "form"} & set(made.tags)
    assert all(value.startswith("#") for _, name, value in made.attributes if name in ("href", "src", "xlink:href"))
    assert all(each.startswith("#") for each in re.findall(r"url\(([^)]*)\)", made.html))
    assert "@import" not in made.html
    policy = next(v for t, n, v in made.attributes if (t, n) == ("meta", "content") and "default-src" in v)
    assert policy.startswith("default-src 'none';")
    assert "script-src" not in policy
    assert made.tags.count("style") == 1


def test_the_policy_names_the_digest_of_the_style_sheet_in_the_page(make):
    written = make(few()).html
    sheet = re.search(r"<style>(.*?)</style>", written, re.DOTALL)[1]
    assert f"'sha256-{base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()}'" in written


def test_ids_are_unique_and_what_refers_to_them_finds_them(make):
    made = make(few(40))
    ids = [value for _, name, value in made.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    asked = {value.removeprefix("#") for _, name, value in made.attributes if name == "href"}
    asked |= {value for _, name, value in made.attributes if name == "aria-labelledby"}
    asked |= set(re.findall(r"url\(#([^)]*)\)", made.html))
    assert asked <= set(ids)


def test_headings_descend_by_one_and_every_table_header_has_a_scope(make):
    made = make(few())
    levels = [int(tag[1]) for tag in made.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert made.tags.count("th") == sum((tag, name) == ("th", "scope") for tag, name, _ in made.attributes)
    assert ("html", "lang", "en") in made.attributes


def test_the_whole_configuration_is_there_as_json(make):
    config = {"privacy": {"epsilon": 8.0}, "task": {"labels": ["gut", "schlecht & böse"]}, "seed": None}
    shown = re.search(r"<pre><code>(.*?)</code></pre>", make(few(), config=config).html, re.DOTALL)[1]
    assert json.loads(html.unescape(shown)) == config


def test_many_sites_are_drawn_as_quantiles_and_named_in_the_table(make):
    sites = tuple(f"clinic-{number:03d}" for number in range(60))
    made = make(few(40, sites=sites))
    assert "10 % of sites" in made.html
    assert "clinic-059" in made.text
    assert len(made.html) < 400_000


def test_a_long_run_keeps_to_a_size_and_says_what_it_leaves_out(make):
    made = make(few(500, sites=("a",)))
    assert len(made.html) < 600_000
    assert "400 of 500 rounds, evenly spread" in made.text
    assert "The largest for train records is ε = 250.00" in made.text  # of the last round, which is never left out


def test_errors_without_end_are_grouped_and_cut(make):
    rounds = [
        replace(
            each,
            participations=tuple(
                Participation(f"s{n}", "train", "failed", 1, 0, 0, f"{each.number} " + "x" * 9000) for n in range(3)
            ),
            spends=(),
        )
        for each in few(60)
    ]
    made = make(rounds)
    assert "80 more; moonflower history participations lungs-1 --limit 0 lists all." in made.text
    assert len(made.html) < 600_000


def test_the_same_error_is_one_line_with_its_count(make):
    rounds = [
        replace(each, participations=(*each.participations, Participation("aku", "train", "refused", 1, 0, 0, "no")))
        for each in few()
    ]
    assert "aku train refused 5 1 to 5 no" in make(rounds).text


def test_an_older_report_is_replaced_whole(make, sqlite_url, tmp_path):
    make(few())
    out = tmp_path / "report.html"
    out.write_text("old")
    assert CliRunner().invoke(report, ["last", "--out", str(out), "--database", sqlite_url]).exit_code == 0
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [each.name for each in tmp_path.iterdir() if each.suffix == ".part"] == []


@pytest.mark.parametrize("place", ["missing/report.html", "folder"])
def test_a_place_that_cannot_take_the_report_is_one_clear_line(make, sqlite_url, tmp_path, place):
    make(few(1))
    (tmp_path / "folder").mkdir()
    result = CliRunner().invoke(report, ["last", "--out", str(tmp_path / place), "--database", sqlite_url])
    assert isinstance(result.exception, ReportError)
    assert isinstance(result.exception, MoonflowerError)
    assert place.partition("/")[0] in str(result.exception)
    assert "\n" not in str(result.exception)


def test_a_device_is_never_replaced_by_a_file():
    with pytest.raises(ReportError, match="is not a file"):
        output.check(Path("/dev/null"))


def test_a_write_that_fails_leaves_the_old_report_and_no_rest(tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    out.write_text("old")

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ReportError, match="No space left on device"):
        output.write(out, "new")
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_an_unknown_run_and_an_empty_history_are_clear_errors(sqlite_url, tmp_path):
    with History.open(sqlite_url) as history:
        with pytest.raises(NotFoundError, match="moonflower simulate"):
            facts.read(history, "last")
        with pytest.raises(NotFoundError, match="no run 'nope'"):
            facts.read(history, "nope")


def test_epsilon_is_rounded_up_and_never_down():
    assert words.epsilon(7.9901) == "8.00"
    assert words.epsilon(1.0001) == "1.01"
    assert words.epsilon(0.00011) == "0.0002"
    assert words.epsilon(8.0) == "8.00"
    assert words.epsilon(math.inf) == "∞"


def test_a_sample_of_rounds_holds_the_first_and_the_last():
    assert facts.sample(range(1, 2001), 160)[0] == 1
    assert facts.sample(range(1, 2001), 160)[-1] == 2000
    assert len(set(facts.sample(range(1, 162), 160))) == 160
    assert facts.sample([3, 4], 160) == [3, 4]


def test_help_has_an_example_and_loads_neither_matplotlib_nor_the_database():
    code = "import sys; from server.report.cli import report; print('matplotlib' in sys.modules, 'sqlalchemy' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False False\n"
    )
    assert "Example: moonflower report last --out report.html" in CliRunner().invoke(report, ["--help"]).output
