"""A process of its own for what may crash or hang: it answers calls, and is replaced if it dies."""

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

CONTEXT = multiprocessing.get_context("spawn")


class WorkerFailed(RuntimeError):
    """A call has no answer: it raised, killed its process, or took too long."""


class SetupFailed(RuntimeError):
    """The process could not make what it is to answer for."""


class Worker:
    """Calls methods of `make(*arguments)`, which lives in another process.

    The process starts with the first call. A call that fails ends it, since what failed may have
    left anything behind; the next call starts another.
    """

    def __init__(
        self, make: Callable[..., Any], *arguments: Any, setup_seconds: float = 300.0
    ) -> None:
        self._make, self._arguments, self._setup_seconds = make, arguments, setup_seconds
        self._process: multiprocessing.Process | None = None
        self._connection: Connection | None = None

    def ask(self, method: str, *arguments: Any, seconds: float) -> Any:
        """What the method returns; WorkerFailed says why it does not within `seconds`."""
        if self._process is None:
            self._start()
        return self._answer(seconds, (method, arguments))

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """End the process and wait for its end."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None

    def _start(self) -> None:
        self._connection, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(
            target=_serve, args=(theirs, self._make, self._arguments), daemon=True
        )
        process.start()
        self._process = process  # not before: another thread may kill it
        theirs.close()
        try:
            self._answer(self._setup_seconds)
        except WorkerFailed as error:
            raise SetupFailed(str(error)) from error

    def _answer(self, seconds: float, request: tuple | None = None) -> Any:
        reason = f"no answer in {seconds:g} s"
        try:
            if request is not None:
                self._connection.send(request)
            if self._connection.poll(seconds):
                succeeded, answer = self._connection.recv()
                if succeeded:
                    return answer
                reason = answer
        except (EOFError, OSError):
            self._process.join()
            reason = f"the process died with exit code {self._process.exitcode}"
        except BaseException:
            self.close()
            raise
        self.close()
        raise WorkerFailed(reason)


def _serve(connection: Connection, make: Callable[..., Any], arguments: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    try:
        subject = make(*arguments)
        connection.send((True, None))
        while True:
            method, given = connection.recv()
            connection.send((True, getattr(subject, method)(*given)))
    except EOFError:  # the parent is gone
        return
    except Exception as error:
        connection.send((False, f"{type(error).__name__}: {error}"))
