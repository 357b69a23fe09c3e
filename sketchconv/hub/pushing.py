"""Send models to a repository: checked first, nothing twice, compared with the remote at last."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sketchconv.errors import HubError
from sketchconv.hub.readme import CardOptions

if TYPE_CHECKING:
    from sketchconv.hub.report import PushReport

# Called with the stage, what is at work, and how many bytes of how many are done.
Progress = Callable[[str, str, int, int], None]


def push(
    models: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    repo: str,
    *,
    revision: str | None = None,
    create_pr: bool = False,
    private: bool = True,
    message: str | None = None,
    card: CardOptions | None = None,
    verify: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PushReport:
    """Publish models in one commit.

    Headers are checked and texts searched for secrets before anything is sent. What the repository
    holds already, by SHA-256 or by git's own digest, is not sent again, so that a push that was
    interrupted goes on. After the commit the digests of all files are compared.

    Args:
        models: `.sktch` and `.gguf` files, and at most one folder of a sketch, a delta or a dense
            model.
        repo: `user/name`; made if it is not there.
        revision: a branch, made if it is not there, or `refs/pr/N`; the main branch by default.
        create_pr: open a pull request instead of committing to the branch.
        private: of a repository that is made; one that is there stays as it is.
        message: of the commit.
        card: what the model card says; None for the defaults.
        verify: check every digest of sketches and deltas first, not only their headers.
        dry_run: send nothing; say what would be sent.
        progress: called with stage, name, bytes done and bytes in all.

    Raises:
        HubError: one line that says what failed and what to do.
        SketchconvError: a model breaks a rule of its format.
    """
    from sketchconv.hub.sending import Push, Target

    _check_repo(repo)
    several = [models] if isinstance(models, str | os.PathLike) else list(models)
    job = Push(several, repo, card or CardOptions(), verify, progress or _silent)
    target = Target(revision, create_pr, private, message)
    with _quiet_hub():
        if dry_run:
            return job.dry_run(target)
        return job.run(target)


def check_target(repo: str) -> None:
    """Refuse a repository name that is none, or a missing or invalid token; for use before work.

    Raises:
        HubError: says which.
    """
    from sketchconv.hub.remote import Remote

    _check_repo(repo)
    with _quiet_hub():
        Remote(repo).check_token()


def _check_repo(repo: str) -> None:
    from sketchconv.sources.hub import is_hub_id

    if not is_hub_id(repo):
        raise HubError(f"{repo!r}: not a repository name; expected user/name or organisation/name")


def _silent(_stage: str, _name: str, _done: int, _total: int) -> None:
    pass


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """huggingface_hub's log names addresses that carry rights to write: not while pushing."""
    from huggingface_hub.utils import logging as hub_logging

    logging: Any = hub_logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
