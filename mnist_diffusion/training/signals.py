"""Signals that end a run: the first is a request, acted on after the step in hand; a second INT acts at once."""

from __future__ import annotations

import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# torchrun hands the terminal's INT on to workers that had it from the terminal already.
REPEATED_BY_LAUNCHER_SECONDS = 1.0


def leave_terminal() -> None:
    """Print into the void from here on, where it would go to a terminal that is closed."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


@dataclass
class StopRequest:
    """The number of the signal that asked the run to end, 0 while there was none."""

    number: int = 0
    since: float = 0.0

    def receive(self, number: int) -> bool:
        """Take note of a signal; whether the process is to end at once."""
        now = time.monotonic()
        if self.number == 0:
            self.number, self.since = number, now
            return False
        repeated = "TORCHELASTIC_RUN_ID" in os.environ and now - self.since < REPEATED_BY_LAUNCHER_SECONDS
        return number == signal.SIGINT and not repeated


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Collect INT, TERM, USR1 and HUP while the block runs.

    Python runs its signal handlers between two operations only, which may be a long step apart. The interpreter's
    wake-up descriptor is written to at once, so a thread of its own reads it and can end the process in mid-step.

    In another thread than the main one, no signal arrives. In a notebook a second INT interrupts the cell.
    """
    request, notebook = StopRequest(), "ipykernel" in sys.modules
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    reading, writing = socket.socketpair()
    writing.setblocking(False)

    def watch() -> None:
        while received := reading.recv(1):
            if received[0] in STOPPING and not notebook and request.receive(received[0]):
                os._exit(128 + received[0])

    def receive(number: int, frame: object) -> None:
        if notebook and request.receive(number):
            raise KeyboardInterrupt

    watcher = threading.Thread(target=watch, name="stop signals", daemon=True)
    # What is ignored, as HUP under `nohup`, stays so.
    heard = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, receive) for number in heard}
    previous = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    watcher.start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(previous)
        for number, handler in before.items():
            signal.signal(number, handler)
        writing.close()
        watcher.join()
        reading.close()
