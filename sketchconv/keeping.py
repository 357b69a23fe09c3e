"""What becomes of an unfinished output: kept with its journal, unless its weights are to blame."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Protocol, TypeVar

from sketchconv.errors import OutputError, Suspended, WeightError
from sketchconv.journal import Journal


class Keeper(Protocol):
    """A writer whose temporary may outlive it."""

    keep: bool

    def abort(self) -> None:
        """Give up what has not been committed."""


W = TypeVar("W", bound=Keeper)


@contextmanager
def keeping(journal: Journal, total: int, open_writer: Callable[[bool], W]) -> Iterator[W]:
    """A writer for as long as the block runs, and afterwards what its end asks for.

    A block that ends well has committed, and the journal goes. Otherwise what is finished stays, if
    anything is, for the next run to go on with; but not after a `WeightError`, which would only
    come again.

    Args:
        journal: of the job; closed in every case.
        total: tensors of the job.
        open_writer: opens the output, given whether a former run is gone on with.

    Raises:
        Suspended: in place of `KeyboardInterrupt`, where finished work was kept.
        OutputError: the disk failed; it says what was kept.
    """
    with closing(journal):
        writer = open_writer(journal.resumes)
        try:
            yield writer
        except WeightError:
            writer.keep = False
            journal.remove()
            raise
        except KeyboardInterrupt:
            writer.keep = journal.reread()
            if not writer.keep:
                raise
            raise Suspended(journal.kept(total)) from None
        except OutputError as error:
            if not writer.keep:
                raise
            raise OutputError(f"{error}; {journal.kept(total)}") from error
        finally:
            if not writer.keep:
                with suppress(OSError):  # nothing is left that it could tell of
                    journal.remove()
            writer.abort()
        journal.remove()
