"""The error tree. Each class owns its exit code; `cli.main` catches once.

Exit codes: 0 done; 1 internal, or the machine failed us; 2 usage or bad input; 3 parity or accuracy missed;
4 the result is not what was asked; 5 slower than asked; 6 something is not installed or no such device.
"""

from __future__ import annotations

from typing import ClassVar


class AttnDeployError(Exception):
    """An error a user can act on: what happened, what was got, what was expected, what to do next.

    `module` is the module path or file name the error is about. Every part but `what` may be left out.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        expected: object = None,
        next_step: str | None = None,
        where: str | None = None,
    ) -> None:
        self.what = what
        self.got = None if got is None else str(got)
        self.expected = None if expected is None else str(expected)
        self.next_step = next_step
        self.where = where
        super().__init__(what)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.got, self.expected, self.next_step, self.where)

    def __str__(self) -> str:
        parts = [self.what]
        for label, text in self.details():
            parts.append(f"  {label}: {text}")
        return "\n".join(parts)

    def details(self) -> list[tuple[str, str]]:
        """The parts that are present, labelled, in the order in which they are shown."""
        rows = [("where", self.where), ("got", self.got), ("expected", self.expected), ("next", self.next_step)]
        return [(label, text) for label, text in rows if text is not None]


def _rebuild(
    cls: type[AttnDeployError],
    what: str,
    got: str | None,
    expected: str | None,
    next_step: str | None,
    where: str | None,
) -> AttnDeployError:
    return cls(what, got=got, expected=expected, next_step=next_step, where=where)


class StorageError(AttnDeployError):
    """The disk is full, or a file cannot be written or read for a reason that is not the user's input."""

    exit_code = 1


class UsageError(AttnDeployError):
    """An argument, source, input file or feed is wrong."""

    exit_code = 2


class CaptureError(UsageError):
    """The model could not be captured by torch.export."""


class BundleError(UsageError):
    """A bundle is damaged, too new, or not a bundle."""


class FeedError(UsageError):
    """A feed has the wrong name, dtype or shape."""


class ParityError(AttnDeployError):
    """A candidate is not the same model: outputs or accuracy left the tolerance."""

    exit_code = 3


class NotAsAskedError(AttnDeployError):
    """The result is not what was asked: fusion, dtype share or provider."""

    exit_code = 4


class TooSlowError(AttnDeployError):
    """The chosen candidate is slower than `--max-latency-ms`."""

    exit_code = 5


class UnavailableError(AttnDeployError):
    """Something is not installed, or there is no such device."""

    exit_code = 6
