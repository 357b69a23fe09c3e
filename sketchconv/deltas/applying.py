"""Apply a delta to its base, and take it back: the base's own bytes again."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sketchconv.deltas import rewriting
from sketchconv.deltas.applied import Applied, Entry
from sketchconv.deltas.binding import check_fit
from sketchconv.deltas.editing import Edit, odd_headers
from sketchconv.deltas.resolving import tuned_table
from sketchconv.deltas.rewriting import Progress
from sketchconv.deltas.tables import refuse_sources, stored_table
from sketchconv.errors import DeltaError
from sketchconv.formats.delta import DeltaFile
from sketchconv.formats.delta_coding import Table
from sketchconv.formats.reader import SktchModel

AnyPath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A sketch that was written with other tables.

    Args:
        output: its path.
        nbytes: its bytes on disk.
        weights: how many tables changed.
        delta: the seal of the delta.
        applied: the seals of all deltas that are applied to it now, in order.
        written: False after a dry run.
    """

    output: str
    nbytes: int
    weights: int
    delta: str
    applied: tuple[str, ...]
    written: bool

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "output": self.output,
            "bytes": self.nbytes,
            "weights": self.weights,
            "delta": self.delta,
            "applied": list(self.applied),
            "written": self.written,
        }


def apply(
    base: AnyPath,
    delta: AnyPath,
    out: AnyPath,
    *,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Rewritten:
    """Write the sketch that a delta makes of its base, in the base's own form.

    Tensors are copied in pieces and checked against their digests on the way; one table is in
    memory at a time. Error metrics of changed weights become unknown; what was applied, and those
    metrics, are kept in the document, so that `revert` gives the base's bytes back.

    Args:
        base: a sketch, bundle or folder.
        delta: a delta, file or folder.
        out: a file that ends in `.sktch` if `base` is a bundle, else a folder to make.
        force: replace a sketch that is there.
        dry_run: check everything that can be checked without the data; write nothing.
        progress: called with the bytes written and the bytes in all.

    Raises:
        DeltaError: the delta was not made for this base.
        FormatError: one of them breaks a rule, or is damaged.
        OutputError: `out` exists or cannot be written; nothing is left behind.
    """
    refuse_sources(out, base, delta)
    with SktchModel.open(base) as model, DeltaFile.open(delta) as file:
        check_fit(file, model)
        document, errors = file.document, model.manifest.errors
        known = Applied.of(model.manifest.extensions, model.path.name)
        name = document.task.get("name")
        entry = Entry(
            file.seal,
            name if isinstance(name, str) else None,
            {weight: errors[weight] for weight in document.weights},
        )
        headers = known.headers if known.entries else odd_headers(model)
        now = Applied((*known.entries, entry), headers)
        edit = Edit(
            tables={n: r.tuned for n, r in document.weights.items()},
            errors=dict.fromkeys(document.weights),
            extensions=now.into(model.manifest.extensions),
            headers={},
            table=lambda weight: tuned_table(file, weight, stored_table(model, weight)),
        )
        return _rewrite(model, Path(out), edit, file.seal, now, force, dry_run, progress)


def revert(
    tuned: AnyPath,
    delta: AnyPath,
    out: AnyPath,
    *,
    base: AnyPath | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Rewritten:
    """Take an applied delta back; without any other applied, `out` is the base, byte by byte.

    Args:
        tuned: a sketch that the delta was applied to, bundle or folder.
        delta: that delta.
        out: where to write, in the same form.
        base: the base, needed for a delta of mode replace or add: of those only xor is its own
            inverse. Only its tables are taken.
        force, dry_run, progress: as `apply`.

    Raises:
        DeltaError: the delta is not applied or a later one changed the same weights (DLT-060), or
            the base is needed and not given.
        FormatError, OutputError: as `apply`.
    """
    refuse_sources(out, tuned, delta, *([] if base is None else [base]))
    with SktchModel.open(tuned) as model, DeltaFile.open(delta) as file:
        known = Applied.of(model.manifest.extensions, model.path.name)
        at = known.position(file.seal)
        if at is None:
            raise DeltaError(_not_applied(model, file, known))
        _check_state(model, file, known, at)
        if not file.document.coding.invertible and base is None:
            mode = file.document.coding.mode
            raise DeltaError(
                f"{file.path.name}: mode {mode} cannot be undone without the base; name the base"
            )
        left = known.entries[:at] + known.entries[at + 1 :]
        now = Applied(left, known.headers)
        tables = {n: r.bound.base for n, r in file.document.weights.items()}
        errors, headers = known.entries[at].errors, {} if left else known.headers
        extensions = now.into(model.manifest.extensions)

        def run(table: Callable[[str], Table]) -> Rewritten:
            edit = Edit(tables, errors, extensions, headers, table)
            return _rewrite(model, Path(out), edit, file.seal, now, force, dry_run, progress)

        if file.document.coding.invertible:
            return run(lambda weight: file.reverted(weight, stored_table(model, weight)))
        with SktchModel.open(base or "") as origin:
            check_fit(file, origin)
            return run(lambda weight: stored_table(origin, weight))


def _rewrite(
    model: SktchModel,
    out: Path,
    edit: Edit,
    seal: str,
    now: Applied,
    force: bool,
    dry_run: bool,
    progress: Progress | None,
) -> Rewritten:
    if dry_run:
        rewriting.check_target(model, out, force=force)
        nbytes = rewriting.size(model, edit)
    else:
        nbytes = rewriting.write(model, out, edit, force=force, progress=progress)
    seals = tuple(entry.delta for entry in now.entries)
    return Rewritten(str(out), nbytes, len(edit.tables), seal, seals, not dry_run)


def _not_applied(model: SktchModel, file: DeltaFile, known: Applied) -> str:
    names = [e.name or e.delta[:12] for e in known.entries]
    there = f"applied are: {', '.join(names)}" if names else "none is applied"
    return f"{file.path.name} is not applied to {model.path.name}; {there}"


def _check_state(model: SktchModel, file: DeltaFile, known: Applied, at: int) -> None:
    """Every table must be the one that the delta made."""
    sketches: Mapping[str, Any] = model.manifest.sketches
    for name, record in sorted(file.document.weights.items()):
        digest = model.manifest.digests[sketches[name].lut_name] if name in sketches else None
        if digest == record.tuned and name in known.entries[at].errors:
            continue
        later = [e for e in known.entries[at + 1 :] if name in e.errors]
        why = (
            f"a later delta changed it: revert {later[-1].name or later[-1].delta[:12]} first"
            if later
            else "it was changed since"
        )
        raise DeltaError(f"{file.path.name} cannot be reverted: {name}: {why}")
