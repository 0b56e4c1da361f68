"""A coordinator and three sites as separate processes, from their kits, with TLS, node authentication and PostgreSQL."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import machines as federations
import pytest
from machines import Machines

SITES = {"north": 60, "south": 80, "west": 100}
ROUNDS = 3
EXACT = '[hardware]\nprecision = "float32"'  # as the card's code computes


@pytest.fixture
def machines(tmp_path: Path, tiny_model: Path, postgres_url: str) -> Iterator[Machines]:
    made = federations.provisioned(
        tmp_path / "f",
        SITES,
        model=str(tiny_model),
        database=postgres_url.replace("postgresql://", "postgresql+psycopg://"),
    )
    yield made
    made.end()


# The code of the model's own card, run in the model's folder, where Moonflower cannot be imported.
SCORE = """
import json, sys
from pathlib import Path
sys.modules.update(dict.fromkeys(["shared", "server", "client", "moonflower"]))
blocks = Path("README.md").read_text().split("```python")[1:]
names = {}
for block in blocks:
    exec(block.split("```")[0], names)
rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
found = names["run"]([row["text"] for row in rows]).argmax(1)
print(json.dumps([names["labels"][number] == row["label"] for number, row in zip(found, rows)]))
"""


def test_a_run_over_real_machines_is_submitted_watched_exported_and_scored(
    machines: Machines, tiny_model: Path
) -> None:
    machines.start_all()
    test_set = machines.folder / "test.jsonl"
    federations.write_rows(test_set, federations.made_up(200, "test"))
    config = machines.folder / "run.toml"
    config.write_text(federations.tiny_run(str(tiny_model), rounds=ROUNDS, sites=3, extra=EXACT), encoding="utf-8")
    run = machines.submit(config, "--test-set", str(test_set))

    watched = machines.moonflower("run", "watch", run).stdout
    assert machines.run(run).status == "completed"
    for name in SITES:
        assert name in watched
    assert [done.number for done in machines.rounds(run)] == list(range(1, ROUNDS + 1))
    for name in SITES:  # one release for each request, and the ledger has it
        expected = [f"{run}/{number}/{kind}" for number in range(1, ROUNDS + 1) for kind in ("train", "evaluate")]
        assert [request for _, request, _, _ in machines.ledger(name)] == expected
    with machines.history() as history:
        epsilons = [spend.epsilon for _, spend in history.spends(run) if spend.part == "train"]
        accuracy = next(
            metric.value
            for number, metric in history.metrics(run)
            if number == ROUNDS and metric.scope == "test" and metric.name == "accuracy"
        )
    assert max(epsilons) <= 8
    assert not any(math.isinf(epsilon) for epsilon in epsilons)

    machines.moonflower("run", "export", run, "--form", "merged", "--out", str(machines.folder / "model"))
    scored = subprocess.run(
        [sys.executable, "-I", "-c", SCORE, str(test_set)],
        capture_output=True,
        text=True,
        timeout=120,
        env=machines.environment,
        cwd=machines.folder / "model",
        check=False,
    )
    assert scored.returncode == 0, scored.stderr
    right = json.loads(scored.stdout.splitlines()[-1])
    assert sum(right) / len(right) == pytest.approx(accuracy, abs=1e-6)

    listed = json.loads(machines.moonflower("site", "list", "--format", "json").stdout)
    assert sorted(site["name"] for site in listed) == sorted(SITES)
