"""What a SuperNode's lines lead to. The process here is a script that says them: when Flower does cannot be timed."""

import sys
import time
from pathlib import Path

import pytest

from client.node import supernode
from client.node.supernode import SuperNode
from client.site import Coordinator

SAYS = """#!{python}
import sys, time
with open({count!r}, "a") as file:
    file.write("x")
if len(open({count!r}).read()) == 1:
    print({line!r}, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("line", "starts"),
    [
        ("INFO :      Run ID 7 is not in `RUNNING` status. Ignoring message ab12.", 2),
        ("INFO :      Run ID 7 is not in `RUNNING` status. Ignoring reply message ab12.", 1),
        ("ERROR :     out of paper", 2),
    ],
)
def test_a_supernode_that_would_hold_a_reply_back_or_do_nothing_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, starts: int
) -> None:
    script, count = tmp_path / "flower-supernode", tmp_path / "starts"
    script.write_text(SAYS.format(python=sys.executable, count=str(count), line=line))
    script.chmod(0o755)
    monkeypatch.setattr(supernode, "program", lambda _: str(script))
    coordinator = Coordinator(name="north", address="127.0.0.1:1", state=tmp_path / "state")
    own = SuperNode(coordinator, insecure=True)
    own.start()
    try:
        until = time.monotonic() + (20 if starts > 1 else 3)
        while own.starts < starts + (starts == 1) and time.monotonic() < until:
            own.poll()
            time.sleep(0.05)
        assert own.starts == starts
    finally:
        own.stop(0.1)
