"""A repository on the Hub as a push sees it: its files and digests, and ways to change it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sketchconv.errors import HubError
from sketchconv.hub.failures import explained, retried, status_of
from sketchconv.hub.outgoing import Outgoing

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

_T = TypeVar("_T")
_MAX_SMALL: Final = 4 << 20
_PULL: Final = re.compile(r"refs/pr/\d+")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file in a repository: its size, and the name that git or LFS has for its content."""

    size: int
    blob: str
    sha256: str | None

    def holds(self, file: Outgoing, sha256: str) -> bool:
        """Whether its content is that of a local file."""
        if self.size != file.size:
            return False
        return self.sha256 == sha256 if self.sha256 else self.blob == file.git_sha1()


@dataclass(frozen=True, slots=True)
class RemoteState:
    """A repository at one commit.

    Args:
        exists: whether the repository is there.
        commit: None where the revision is not there.
        private: None if not known.
        files: by path.
    """

    exists: bool = False
    commit: str | None = None
    private: bool | None = None
    files: Mapping[str, RemoteFile] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit that was made, and the pull request that it opened."""

    oid: str
    pull_request: str | None = None


class Remote:
    """One repository. Every method raises `HubError`, one line; short failures are tried again."""

    def __init__(self, repo: str) -> None:
        from huggingface_hub import HfApi, get_token

        from sketchconv import __version__

        self.repo = repo
        self.token = get_token()
        self._api: Any = HfApi(library_name="sketchconv", library_version=__version__)

    def require_token(self) -> None:
        """Refuse to go on without a token."""
        if self.token is None:
            raise HubError(
                f"{self.repo}: no access token; run `hf auth login`, or set HF_TOKEN, with a token "
                "that may write"
            )

    def check_token(self) -> None:
        """Ask the Hub who the token belongs to, before long work."""
        self.require_token()
        self._call("checking the token", lambda: self._api.whoami())

    def state(self, revision: str | None = None) -> RemoteState:
        """What the repository holds at a revision."""
        return self._call("reading its files", lambda: self._state(revision))

    def _state(self, revision: str | None) -> RemoteState:
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
        from huggingface_hub.hf_api import RepoFile

        try:
            info = self._api.repo_info(self.repo, revision=revision)
        except RevisionNotFoundError:
            info = self._api.repo_info(self.repo)
            return RemoteState(True, None, info.private)
        except RepositoryNotFoundError as error:
            code = error.response.status_code
            if code == 404 or (code == 401 and self.token is None):
                return RemoteState()
            raise
        tree = self._api.list_repo_tree(self.repo, recursive=True, revision=info.sha)
        files = {
            item.path: RemoteFile(item.size, item.blob_id, item.lfs.sha256 if item.lfs else None)
            for item in tree
            if isinstance(item, RepoFile)
        }
        return RemoteState(True, info.sha, info.private, files)

    def read(self, name: str, state: RemoteState) -> bytes | None:
        """A small file of a commit; None if it is not there."""
        file = state.files.get(name)
        if file is None:
            return None
        if file.size > _MAX_SMALL:
            raise HubError(f"{self.repo}: {name} has {file.size:,} bytes, too many to merge with")
        return self._call(f"reading {name}", lambda: self._read(name, state.commit))

    def _read(self, name: str, commit: str | None) -> bytes:
        with tempfile.TemporaryDirectory(prefix="sketchconv-") as folder:
            path = self._api.hf_hub_download(self.repo, name, revision=commit, cache_dir=folder)
            return Path(path).read_bytes()

    def create(self, *, private: bool) -> None:
        """Make the repository; it may be there by now."""
        self._call("creating the repository", lambda: self._create(private))

    def _create(self, private: bool) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        try:
            self._api.create_repo(self.repo, private=private)
        except HfHubHTTPError as error:
            if status_of(error) != 409:  # made by someone else, or by an attempt without answer
                raise

    def branch(self, name: str) -> None:
        """Make a branch from the main one; it may be there by now."""
        if _PULL.fullmatch(name):
            raise HubError(f"{self.repo}: there is no pull request {name}")
        self._call(
            f"creating the branch {name}",
            lambda: self._api.create_branch(self.repo, branch=name, exist_ok=True),
        )

    def addition(self, file: Outgoing, sha256: str) -> CommitOperationAdd:
        """A file as huggingface_hub takes it, hashed once and for all."""
        from huggingface_hub import CommitOperationAdd

        added = CommitOperationAdd(file.name, file.data)
        added.upload_info.sha256 = bytes.fromhex(sha256)
        return added

    def upload(self, added: CommitOperationAdd, revision: str | None, create_pr: bool) -> None:
        """Send one file's content where LFS wants it; nothing where it has it, or is small.

        huggingface_hub itself tries each request again.
        """
        with explained(self.repo, f"sending {added.path_in_repo}", self.token):
            self._api.preupload_lfs_files(
                self.repo,
                [added],
                revision=revision,
                create_pr=create_pr,
                free_memory=False,
            )

    def commit(
        self,
        additions: Sequence[CommitOperationAdd],
        message: str,
        *,
        revision: str | None,
        parent: str | None,
        create_pr: bool,
        landed: Callable[[], Commit | None],
    ) -> Commit:
        """Make one commit of files that were sent, on top of `parent` and nothing else.

        Args:
            landed: tells whether a commit whose answer was lost has been made.
        """

        def call() -> Commit:
            info = self._api.create_commit(
                self.repo,
                list(additions),
                commit_message=message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=parent,
            )
            return Commit(info.oid, info.pr_url)

        with explained(self.repo, "committing", self.token):
            # A second pull request would be worse than a clear error.
            return call() if create_pr else retried(call, landed)

    def _call(self, doing: str, call: Callable[[], _T]) -> _T:
        with explained(self.repo, doing, self.token):
            return retried(call)
