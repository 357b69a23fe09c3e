"""One push: what is there already, what is missing, the commit, and the comparison after it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sketchconv.errors import HubError
from sketchconv.hub import attributes, card_file
from sketchconv.hub.contents import find_model
from sketchconv.hub.facts import Facts, check_digests, facts_of
from sketchconv.hub.outgoing import Outgoing
from sketchconv.hub.readme import CardOptions, make_card
from sketchconv.hub.remote import Commit, Remote, RemoteState
from sketchconv.hub.report import PushedFile, PushReport

Progress = Callable[[str, str, int, int], None]


@dataclass(frozen=True, slots=True)
class Target:
    """Where a push goes: branch, pull request, visibility of a new repository, message."""

    revision: str | None = None
    create_pr: bool = False
    private: bool = True
    message: str | None = None


class Push:
    """The models that were named, checked; and how to send them."""

    def __init__(
        self,
        models: Sequence[str | os.PathLike[str]],
        repo: str,
        card: CardOptions,
        verify: bool,
        progress: Progress,
    ) -> None:
        if not models:
            raise HubError("name at least one model to push")
        self.remote = Remote(repo)
        found = [find_model(Path(path).expanduser(), self.remote.token) for path in models]
        self.facts: list[Facts] = [facts_of(model) for model in found]
        self.files = _without_collisions(self.facts)
        self.left = tuple(name for model in found for name in model.left)
        self.card = card
        self.progress = progress
        self.digests: dict[str, str] = {}
        if verify:
            progress("verify", repo, 0, 0)
            check_digests(found)

    def dry_run(self, target: Target) -> PushReport:
        """Say what `run` would send; nothing is changed anywhere."""
        notes: list[str] = []
        try:
            state = self.remote.state(target.revision)
        except HubError as error:
            state = RemoteState()
            notes.append(f"what is there already is not known: {error}")
        self._check_request(state, target)
        self._hash()
        files = self._with_own(state)
        waiting = {f.name for f in self._missing(files, state)}
        return self._report(target, files, waiting, state, notes)

    def run(self, target: Target) -> PushReport:
        """Send what is missing in one commit. Raises as `pushing.push`."""
        self.remote.require_token()
        before = self.remote.state(target.revision)
        self._check_request(before, target)
        state = self._made(before, target)
        self._hash()
        files = self._with_own(state)
        missing = self._missing(files, state)
        commit = self._send(files, missing, state, target)
        notes = [] if missing else ["nothing to send: the repository holds all of it"]
        if before.exists and before.private is not None and before.private != target.private:
            kind = "private" if before.private else "public"
            notes.append(f"the repository was there already, and stays {kind}")
        sent = {file.name for file in missing}
        return self._report(target, files, sent, before, notes, commit)

    def _check_request(self, state: RemoteState, target: Target) -> None:
        if target.create_pr and not state.exists:
            raise HubError(
                f"{self.remote.repo}: a pull request needs a repository, and there is none (or the "
                "token may not see it); push without --create-pr to make one"
            )

    def _made(self, state: RemoteState, target: Target) -> RemoteState:
        """The repository, and the branch, made where they are missing."""
        revision = target.revision
        if not state.exists:
            self.remote.create(private=target.private)
            state = self.remote.state(revision)
            if not state.exists:
                raise HubError(
                    f"{self.remote.repo}: the Hub says that it is there (409), but does not show "
                    "it; the token may not see it"
                )
        if state.commit is None and revision is not None:
            self.remote.branch(revision)
            state = self.remote.state(revision)
        return state

    def _hash(self) -> None:
        total, done = sum(file.size for file in self.files), 0
        for file in self.files:

            def tick(nbytes: int, name: str = file.name) -> None:
                nonlocal done
                done += nbytes
                self.progress("hash", name, done, total)

            self.digests[file.name] = file.sha256(tick)

    def _with_own(self, state: RemoteState) -> list[Outgoing]:
        """All files with the two that are merged with those of the repository."""
        old = self.remote.read(attributes.NAME, state)
        rules = attributes.with_lfs(old or b"", [file.name for file in self.files])
        own = [Outgoing.of_bytes(attributes.NAME, rules)]
        if self.card.write:
            own.append(make_card(self.remote, state, self.facts, self.digests, self.card))
        for file in own:
            self.digests[file.name] = file.sha256()
        return [*self.files, *own]

    def _missing(self, files: Sequence[Outgoing], state: RemoteState) -> list[Outgoing]:
        there = state.files
        return [
            file
            for file in files
            if file.name not in there or not there[file.name].holds(file, self.digests[file.name])
        ]

    def _send(
        self,
        files: Sequence[Outgoing],
        missing: Sequence[Outgoing],
        state: RemoteState,
        target: Target,
    ) -> Commit:
        """Send what is missing, commit it, and compare everything with the remote."""

        def landed() -> Commit | None:
            now = self.remote.state(target.revision)
            return None if self._missing(files, now) else Commit(str(now.commit))

        commit = Commit(str(state.commit))
        if missing:
            total, done = sum(file.size for file in missing), 0
            additions = [self.remote.addition(f, self.digests[f.name]) for f in missing]
            for file, added in zip(missing, additions, strict=True):
                self.progress("send", file.name, done, total)
                self.remote.upload(added, target.revision, target.create_pr)
                file.check_unchanged()
                done += file.size
            self.progress("commit", self.remote.repo, total, total)
            commit = self.remote.commit(
                additions,
                target.message or self._message(),
                revision=target.revision,
                parent=state.commit,
                create_pr=target.create_pr,
                landed=landed,
            )
        self.progress("check", self.remote.repo, 0, 0)
        self._compare(files, self.remote.state(commit.oid))
        return commit

    def _compare(self, files: Sequence[Outgoing], state: RemoteState) -> None:
        bad = self._missing(files, state)
        if bad:
            name = bad[0].name
            what = (
                "is not what was sent: its digest in the repository differs"
                if name in state.files
                else "is not in the repository after the commit; does its .gitignore leave it out?"
            )
            raise HubError(f"{self.remote.repo}: {name} {what} ({len(bad)} such files); push again")

    def _message(self) -> str:
        from sketchconv import __version__

        names = ", ".join(facts.model.name for facts in self.facts[:3])
        return f"Upload {names} with sketchconv {__version__}"

    def _report(
        self,
        target: Target,
        files: Sequence[Outgoing],
        sent: set[str],
        before: RemoteState,
        notes: Sequence[str],
        commit: Commit | None = None,
    ) -> PushReport:
        from huggingface_hub import constants

        verb: Any = "to send" if commit is None else "sent"
        card = next((f.data for f in files if f.name == card_file.NAME), None)
        return PushReport(
            repo=self.remote.repo,
            url=f"{constants.ENDPOINT}/{self.remote.repo}",
            revision=target.revision,
            commit=commit.oid if commit else None,
            pull_request=commit.pull_request if commit else None,
            created=not before.exists,
            private=before.private if before.exists else target.private,
            files=tuple(
                PushedFile(
                    f.name,
                    f.size,
                    self.digests[f.name],
                    verb if f.name in sent else "there already",
                )
                for f in files
            ),
            left=self.left,
            notes=tuple(notes),
            card=card.decode() if isinstance(card, bytes) else None,
        )


def _without_collisions(facts: Sequence[Facts]) -> list[Outgoing]:
    files: dict[str, Outgoing] = {}
    for fact in facts:
        for file in fact.model.files:
            if file.name in files:
                raise HubError(
                    f"{fact.model.path}: {file.name} comes from another of the models, too; push "
                    "them to repositories of their own, or rename the file"
                )
            files[file.name] = file
    return list(files.values())
