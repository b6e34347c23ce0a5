"""The errors of ranks that do not agree, or of which one is gone."""

from __future__ import annotations


class RingError(RuntimeError):
    """A message of the ring did not arrive or could not be sent: a peer is gone, is stopped or has raised.

    The groups of the ring cannot be used again: their connections are closed, so that the other ranks raise as well.

    Attributes:
        rank: this process, as a rank of the default group.
        peer: the process that the message was to go to or come from, counted alike.
        step: which message it was, such as "step 3 of 7".
    """

    def __init__(self, message: str, rank: int, peer: int, step: str) -> None:
        super().__init__(message)
        self.rank, self.peer, self.step = rank, peer, step

    def __reduce__(self) -> tuple[type, tuple[str, int, int, str]]:
        return type(self), (str(self), self.rank, self.peer, self.step)


class RingTimeoutError(RingError):
    """A message of the ring neither arrived nor failed within the time-out."""


class RingMismatchError(ValueError):
    """The ranks did not call the same thing with the same shapes, dtypes, layouts or flags. All of them raise this."""
