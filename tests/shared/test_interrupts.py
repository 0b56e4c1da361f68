"""An interrupt that strikes inside a finaliser, where Python only prints it, still ends the command."""

import subprocess
import sys

FINALISED = """
import os, signal, time, weakref
import click
from shared import cli, interrupts

class Held: pass

def finalise(_):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.001)  # the handler runs here, in a callback that drops every error

@click.command()
def hold():
    held = Held()
    watched = weakref.ref(held, finalise)
    del held
    time.sleep(5)
    print("went on")

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in what it starts in the background
cli.root.add_command(hold)
cli.root.get_command = lambda ctx, name: hold
import sys
sys.argv = ["moonflower", "hold"]
cli.main()
"""


def played(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)


def test_an_interrupt_dropped_by_a_finaliser_is_raised_again() -> None:
    done = played(FINALISED)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "Interrupted.")


def test_another_error_in_a_finaliser_is_printed_as_ever() -> None:
    done = played(FINALISED.replace("os.kill(os.getpid(), signal.SIGINT)", "raise ValueError('lost')"))
    assert (done.returncode, done.stdout) == (0, "went on\n")
    assert "ValueError: lost" in done.stderr
