"""Processes of their own for what may crash or hang: an answer, or the reason why there is none."""

import multiprocessing
from collections.abc import Callable
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

CONTEXT = multiprocessing.get_context("spawn")
_subject: Any = None  # what the process of a Worker answers for


class WorkerFailed(RuntimeError):
    """A call has no answer: it raised, killed its process, or took too long."""


class SetupFailed(RuntimeError):
    """The process could not make what it is to answer for."""


def ask(
    pool: ProcessPool, function: Callable[..., Any], *arguments: Any, seconds: float
) -> ProcessFuture:
    """Call a function in a process of the pool, which is replaced if it dies or takes longer."""
    return pool.schedule(_guarded, (function, *arguments), timeout=seconds)


def answer(future: ProcessFuture, seconds: float) -> Any:
    """What a call returned; WorkerFailed says why it did not within `seconds`."""
    try:
        return future.result()
    except TimeoutError as error:
        raise WorkerFailed(f"no answer in {seconds:g} s") from error
    except ProcessExpired as error:
        raise WorkerFailed(f"the process died with exit code {error.exitcode}") from error


class Worker:
    """Calls methods of `make(*arguments)`, which lives in another process.

    The process starts with the first call. A call that fails ends it, since what failed may have
    left anything behind; the next call starts another.
    """

    def __init__(
        self, make: Callable[..., Any], *arguments: Any, setup_seconds: float = 300.0
    ) -> None:
        self._make, self._arguments, self._setup_seconds = make, arguments, setup_seconds
        self._pool: ProcessPool | None = None

    def ask(self, method: str, *arguments: Any, seconds: float) -> Any:
        """What the method returns; WorkerFailed says why it does not within `seconds`."""
        if self._pool is None:
            self._pool = ProcessPool(1, context=CONTEXT)
            try:
                self._answer(_set_up, self._make, *self._arguments, seconds=self._setup_seconds)
            except WorkerFailed as error:
                raise SetupFailed(str(error)) from error
        return self._answer(_call, method, *arguments, seconds=seconds)

    def close(self) -> None:
        """End the process, whatever it is doing, and wait for its end."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def _answer(self, function: Callable[..., Any], *arguments: Any, seconds: float) -> Any:
        try:
            return answer(ask(self._pool, function, *arguments, seconds=seconds), seconds)
        except BaseException:
            self.close()
            raise


def _guarded(function: Callable[..., Any], *arguments: Any) -> Any:
    """Not every exception survives the way back to the parent: its text does."""
    try:
        return function(*arguments)
    except Exception as error:
        raise WorkerFailed(f"{type(error).__name__}: {error}") from None


def _set_up(make: Callable[..., Any], *arguments: Any) -> None:
    global _subject
    _subject = make(*arguments)


def _call(method: str, *arguments: Any) -> Any:
    return getattr(_subject, method)(*arguments)
