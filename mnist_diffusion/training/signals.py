"""Stop signals: the first ends the run after the current step; Ctrl-C after that interrupts it at once."""

from __future__ import annotations

import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

STOPPING = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU),  # which batch systems send some time before they kill
)
REPEATED_BY_TORCHRUN_SECONDS = 1.0
"""torchrun forwards the terminal's INT to workers that have it already."""


def detach_stdio() -> None:
    """Redirect stdout and stderr to /dev/null where they lead to a terminal."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


@dataclass
class StopRequest:
    """The number of the signal that asked the run to end; 0 while there was none."""

    number: int = 0
    since: float = 0.0

    def receive(self, number: int, frame: object) -> None:
        """Note a signal; SIGINT after an earlier signal raises KeyboardInterrupt."""
        now = time.monotonic()
        if self.number == 0:
            self.number, self.since = number, now
            return
        repeated = "TORCHELASTIC_RUN_ID" in os.environ and now - self.since <= REPEATED_BY_TORCHRUN_SECONDS
        if number == signal.SIGINT and not repeated:
            raise KeyboardInterrupt


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Collect the signals of `STOPPING` while the block runs; those that are ignored, as HUP under nohup, stay ignored.

    Signals arrive in the main thread only.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    heard = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, request.receive) for number in heard}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
