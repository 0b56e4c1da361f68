"""What is said of a round: in a log, and on a screen that a site's words cannot steer."""

import io
import math
from dataclasses import replace

from rich.console import Console

from server.observer import Log, summary
from shared.messages import JoinReply
from simulations.engine import Silent
from simulations.progress import Live, line, size

HOSTILE = "\x1b[31m[/red][bold] limit (site.toml, [privacy] max_epsilon)\nnext"


def test_a_rounds_line_tells_scores_and_the_largest_sites_epsilon(new_round):
    assert summary(new_round(2)) == "accuracy 0.5200, epsilon 1.00 of 8"
    assert summary(new_round(2, epsilon=math.inf)).endswith("no privacy")
    assert summary(replace(new_round(2), spends=(), metrics=())) == ""


def test_the_log_names_who_did_not_answer(caplog):
    caplog.set_level("INFO", "moonflower.run")
    Log().answered(3, "train", "a", "ok", None)
    Log().answered(3, "train", "b", "refused", "max_epsilon=1 is spent")
    assert [record.getMessage() for record in caplog.records] == ["round 3: train of b refused: max_epsilon=1 is spent"]


def test_the_log_says_which_run_has_no_privacy(caplog, new_run, sqlite_url):
    from server.history.store import History

    caplog.set_level("INFO", "moonflower.run")
    with History.open(sqlite_url) as history:
        Log().run_started(
            new_run(history, private=False), [JoinReply("a", "d", "record", 10, 0.1, "ab" * 16, 0, "0" * 64)]
        )
    assert "WITHOUT PRIVACY (epsilon inf), sites a" in caplog.text


def test_a_sites_words_are_printed_whole_and_steer_no_terminal(new_round):
    for terminal in (False, True):
        screen = io.StringIO()
        with Live(Console(file=screen, force_terminal=terminal, width=60, color_system=None)) as live:
            live.round_started(1, "warm_start")
            live.answered(0, "join", "node 5", "refused", HOSTILE)
            live.answered(1, "train", "st-marys", "failed", HOSTILE)
            live.round_finished(new_round(1))
        printed = screen.getvalue()
        assert printed.count("[/red][bold] limit (site.toml, [privacy] max_epsilon)") == 2
        assert "\x1b[31m" not in printed
        assert "round   1" in printed


def test_the_screen_line_has_scores_epsilon_seconds_and_bytes(new_round):
    assert line(new_round(1)) == "round   1  test accuracy 0.510  ε 0.50/8  12.2 s  ↑ 6.1 GB ↓ 176.0 MB"
    assert "ε ∞ (no privacy)" in line(new_round(1, epsilon=math.inf))
    assert [size(n) for n in (0, 999, 1000, 2_500_000)] == ["0 B", "999 B", "1.0 kB", "2.5 MB"]


def test_silence_says_nothing(capsys, new_round):
    Silent().round_finished(new_round(1))
    Silent().answered(1, "train", "a", "failed", "why")
    assert capsys.readouterr() == ("", "")
