"""Stopping a run by a signal: the first asks for a checkpoint, the second ends it at once."""

import contextlib
import signal
import threading
from collections.abc import Iterator

# Whatever ends a process by default: terminals that close (HUP), clusters that announce the end of
# a time slice (USR1, USR2, XCPU), Ctrl-\ (QUIT), Ctrl-Break on Windows.
ASKED_FIRST = ("SIGINT", "SIGTERM")
OTHERS = ("SIGHUP", "SIGQUIT", "SIGXCPU", "SIGUSR1", "SIGUSR2", "SIGBREAK")


class Interrupted(BaseException):
    """A signal asked the run to end, and its checkpoint is written if there was room for one.

    A BaseException, like KeyboardInterrupt: a decoder that takes every Exception for a damaged
    image must not swallow it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.exit_code = 128 + number
        self.can_resume = True  # False where no checkpoint could be written


class StopRequest:
    """Remember the first signal that asks to stop; a second one ends the process at once.

    In another thread than the main one (of a notebook's server, say) no signal can be handled, so
    whoever started it decides what they do.
    """

    def __init__(self) -> None:
        self.number = 0
        self._raises = False
        in_main = threading.current_thread() is threading.main_thread()
        numbers = _signals_that_end() if in_main else []
        self._before = {n: signal.signal(n, self._note) for n in numbers}

    def _note(self, number: int, _frame: object) -> None:
        if self.number:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.number = number
        if self._raises:
            raise Interrupted(number)

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Inside, raise Interrupted at once when a signal comes, or if one has come."""
        before, self._raises = self._raises, True
        try:
            if self.number:
                raise Interrupted(self.number)
            yield
        finally:
            self._raises = before

    def close(self) -> None:
        """Restore the handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _signals_that_end() -> list[int]:
    """SIGINT and SIGTERM always; the others unless they are ignored, as SIGHUP is under nohup."""
    present = [getattr(signal, name) for name in OTHERS if hasattr(signal, name)]
    asked = [getattr(signal, name) for name in ASKED_FIRST]
    return asked + [n for n in present if signal.getsignal(n) is not signal.SIG_IGN]
