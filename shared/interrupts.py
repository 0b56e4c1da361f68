"""An interrupt that strikes where Python drops every error: in a finaliser, or a callback of the garbage collector."""

import signal
import sys
from types import FrameType

AGAIN_AFTER = 0.01  # seconds: by then the finaliser has returned


def raise_dropped_interrupts() -> None:
    """Let no interrupt get lost: one that Python would print as ignored, and go on, is raised again a moment later.

    It takes the place of `sys.unraisablehook`, and the process's alarm. To be called in the main thread.
    """
    print_ignored = sys.unraisablehook

    def raise_again(unraisable: "sys.UnraisableHookArgs") -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, AGAIN_AFTER)
        else:
            print_ignored(unraisable)

    signal.signal(signal.SIGALRM, _interrupt)
    sys.unraisablehook = raise_again


def _interrupt(_: int, __: FrameType | None) -> None:
    raise KeyboardInterrupt
