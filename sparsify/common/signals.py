"""Ends a command cleanly when it gets a signal: Ctrl-C, SIGTERM or SIGUSR1.

Where no work would be lost, the signal raises :class:`Interrupted` at once, which unwinds like
Ctrl-C in any Python program. While a model is trained (:func:`hold`), the signal is only noted, and
the run ends after it has saved its state.

Only :func:`stoppable`, which the command line enters, installs signal handlers. Elsewhere, as in a
notebook, this module does nothing.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Exit status by signal. Batch systems send SIGUSR1 when time is nearly up.
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
if hasattr(signal, "SIGUSR1"):
    STATUS[signal.SIGUSR1] = 143

# A signal that is repeated within so many seconds is the same request: a terminal, a launcher and
# our own processes may each send it on.
SAME = 1.0
# So many seconds the other processes of a run have to end.
GRACE = 5.0
PARENT = "SPARSIFY_PARENT"


class Interrupted(BaseException):
    """The command was asked to end.

    Attributes:
        signum: the signal.
        advice: the end of the message that begins with "stopped", which says how to go on.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum
        self.advice = "before its end; start the same command again"


class _State:
    def __init__(self) -> None:
        self.asked: int | None = None
        self.asked_at = 0.0
        self.active = False
        self.held = False
        self.parent: int | None = None  # the process that started this one as one of its ranks
        self.children: Sequence[subprocess.Popen[Any]] = ()


_state = _State()


def active() -> bool:
    """Whether this process handles signals, that is, is inside :func:`stoppable`."""
    return _state.active


def asked() -> int | None:
    """The signal by which this process was asked to end, if any."""
    return _state.asked


def hold() -> None:
    """From now on only note a signal; :func:`release` must follow."""
    _state.held = True


def release() -> None:
    """From now on end at once when a signal comes.

    Raises:
        Interrupted: one came since :func:`hold`.
    """
    _state.held = False
    if _state.asked is not None:
        _pass_on(_state.asked)
        raise Interrupted(_state.asked)


def stop(signum: int) -> Interrupted:
    """The exception to raise when the ranks have agreed that one of them got this signal."""
    _state.held = False
    _state.asked = signum
    return Interrupted(signum)


def started(children: Sequence[subprocess.Popen[Any]]) -> None:
    """Register the processes that this one has started as further ranks."""
    _state.children = children


def _handle(signum: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _state.asked is None:
        _state.asked, _state.asked_at = signum, now
        if not _state.held:
            _pass_on(signum)
            raise Interrupted(signum)
        if _state.parent is None:
            os.write(2, b"\nfinishing this step and saving; a second signal stops at once\n")
    elif now - _state.asked_at > SAME:
        _pass_on(signum)
        _leave(_asked_status() or 1)


def _pass_on(signum: int) -> None:
    """Send a signal on to the ranks that this process started. They tell it of theirs by their exit
    status: a signal could arrive so late that it would count as a second one. While signals are
    held, the ranks agree among themselves.
    """
    for child in _state.children:
        child.send_signal(signum)


@contextmanager
def stoppable() -> Iterator[None]:
    """Run a command that signals end as the module says, then restore the former handlers.

    Python handles signals on the main thread only; on another one this only sets the exit status.

    Raises:
        SystemExit: a signal came before the command had ended; the status is the signal's.
    """
    global _state
    former_state, _state = _state, _State()
    _state.active = True
    die_with_parent()
    former: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        former = {number: signal.signal(number, _handle) for number in STATUS}
    try:
        try:
            yield
        except (Interrupted, KeyboardInterrupt) as stop:
            if isinstance(stop, Interrupted) and _state.parent is None:
                print(f"stopped {stop.advice}", file=sys.stderr)
            _end_ranks()
            _leave_if_ranked(_asked_status() or 130)
            raise SystemExit(_asked_status() or 130) from None
        except Exception:
            # When a signal stops a rank, another that waits for it fails, maybe before it gets the
            # signal itself.
            status = _asked_status() or _stopped_child()
            if status is None:
                raise
            _end_ranks()
            _leave_if_ranked(status)
            raise SystemExit(status) from None
        if (status := _asked_status()) is not None:
            raise SystemExit(status)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        _state = former_state


def _asked_status() -> int | None:
    return None if _state.asked is None else STATUS[signal.Signals(_state.asked)]


def _stopped_child() -> int | None:
    """The exit status for this run if a signal stopped one of its ranks, else None."""
    statuses = {-number: status for number, status in STATUS.items()}
    statuses |= {status: status for status in STATUS.values()}
    end = time.monotonic() + (1.0 if _state.children else 0.0)
    while True:
        for child in _state.children:
            code = child.poll()
            if code in statuses:
                return statuses[code]
        if time.monotonic() >= end:
            return None
        time.sleep(0.02)


def _end_ranks() -> None:
    """Wait a little for the ranks that this process started, then kill the rest: they may be
    waiting for this process in a collective. They lose nothing, as only rank 0 writes.
    """
    end = time.monotonic() + GRACE
    for child in _state.children:
        try:
            child.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _leave_if_ranked(status: int) -> None:
    """Leave at once if there is a process group: threads of its backend may abort the process while
    the interpreter exits.
    """
    # Not imported here: the signal may have come while PyTorch itself was being imported.
    dist: Any = sys.modules.get("torch.distributed")
    if hasattr(dist, "is_initialized") and dist.is_initialized():
        _leave(status)


def _leave(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for child in _state.children:
        child.kill()
    os._exit(status)


def die_with_parent() -> None:
    """If our launcher started this process as a rank, make it end when its parent ends, even by a
    kill.
    """
    own = os.environ.pop(PARENT, None)
    if own is None:
        return
    _state.parent = parent = int(own)
    try:
        if sys.platform == "linux":
            import ctypes

            set_death_signal = 1  # PR_SET_PDEATHSIG
            ctypes.CDLL(None, use_errno=True).prctl(set_death_signal, signal.SIGKILL)
        else:
            threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
    except (OSError, AttributeError):  # a C library without it
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # the parent died before this call
        os._exit(1)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def watch_ranks(done: threading.Event) -> None:
    """End this process when a rank that it started fails. An exception could not do that: in a
    rendezvous or a collective Python does not run.

    Args:
        done: set when the ranks have finished their work.
    """
    while not done.wait(0.2):
        failed = next((child for child in _state.children if child.poll()), None)
        if failed is None:
            continue
        if (stopped := _stopped_child()) is not None and _state.asked is None:
            os.kill(os.getpid(), signal.SIGINT if stopped == 130 else signal.SIGTERM)
        if done.wait(2 * GRACE):
            return
        status = _asked_status() or stopped
        if status is None:
            place = list(_state.children).index(failed) + 1
            print(f"error: rank {place} ended with status {failed.returncode}", file=sys.stderr)
        _leave(status or 1)
