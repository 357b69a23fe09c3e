"""A process that takes part in a conversion, as the one that started it sees it."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from sketchconv.parallel.messages import Report, Share, Task

# The modules of a process come from where ours do. Not `multiprocessing`: that would run the
# user's main module again, and a fork would copy locks that other threads hold.
_START = (
    "import sys; sys.path[:] = sys.argv[2:]; "
    "from sketchconv.parallel.child import serve; serve(int(sys.argv[1]))"
)
_LAST_SECONDS = 10.0
_POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Gone(Exception):
    """The process has ended."""


class Helper:
    """One process: started at once, and ended by `end` at the latest.

    It is no member of the terminal's group, so that a Ctrl-C reaches only the one that started it.

    Attributes:
        connection: to wait on.
        tasks: what it has in hand, in the order of its work.
        ready: whether it has said so.
        dismissed: whether it was told that nothing more comes.
        peak, solve_seconds: as it last said.
    """

    def __init__(self, share: Share) -> None:
        self._share = share
        self.connection, theirs = Pipe()
        self.tasks: deque[Task] = deque()
        self.ready = self.dismissed = False
        self.peak, self.solve_seconds = 0, 0.0
        with theirs:
            self._process = _started(theirs, share)

    def tell(self, order: Share | int | Task | None) -> None:
        """Send an order; one that has ended is noticed where it is listened to."""
        if isinstance(order, Task):
            self.tasks.append(order)
        with suppress(OSError):
            self.connection.send(order)

    def begin(self) -> None:
        """Tell it what it takes part in."""
        self.tell(self._share)

    def dismiss(self) -> None:
        """Tell it that nothing more comes."""
        if not self.dismissed:
            self.dismissed = True
            self.tell(None)

    def heard(self) -> Report:
        """Its next report; waits for it.

        Raises:
            Gone: it has ended.
        """
        try:
            report: Report = self.connection.recv()
        except (EOFError, OSError):
            raise Gone from None
        return report

    def how_it_ended(self) -> str:
        """What became of it, in words."""
        code = self._process.wait()
        if code >= 0:
            return f"ended with exit code {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        memory = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        return f"was ended by {name}{memory}"

    def wait(self) -> None:
        """Let it end by itself, which takes a moment, once all of its work is done."""
        try:
            self._process.wait(_LAST_SECONDS if self.ready else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.connection.close()

    def end(self) -> list[Report]:
        """End it now; what it had still said. May be called again."""
        said: list[Report] = []
        if self.connection.closed:
            return said
        self._process.kill()
        self._process.wait()
        with self.connection, suppress(EOFError, OSError, pickle.UnpicklingError):
            while self.connection.poll():
                said.append(self.connection.recv())
        return said


def _started(theirs: Connection, share: Share) -> subprocess.Popen[bytes]:
    number = theirs.fileno()
    command = [sys.executable, "-c", _START, str(number), *sys.path]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, **dict.fromkeys(_POOLS, str(share.threads))},
        pass_fds=(number, *share.shared.descriptors),
        start_new_session=True,
    )
