"""Everything that decides the bytes of an export, but for the source's tensors, by what it is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sketchconv.journal import infos_digest, json_digest

if TYPE_CHECKING:
    from sketchconv.export.folder import FolderJob
    from sketchconv.export.job import GgufJob
    from sketchconv.formats.laid_file import FileLayout


def gguf_fingerprint(job: GgufJob) -> dict[str, Any]:
    """Of a GGUF export. A calibration's text is told by what it was measured to be, elsewhere."""
    steps = [
        (s.name, s.source, s.change, s.head_rows, s.verbatim, s.values, s.info.shape)
        for s in job.plan.steps
    ]
    return {
        "version": _version(),
        "options": {"types": json_digest([(s.name, s.info.type.name) for s in job.plan.steps])},
        "calibration": None if job.calibration is None else job.calibration.to_json(),
        "source": {"id": job.source, "format": job.source_format, "tensors": json_digest(steps)},
        "form": _form("gguf", job.layouts),
    }


def folder_fingerprint(job: FolderJob) -> dict[str, Any]:
    """Of an export to a folder; the headers of its files tell MLX's layout from a plain one."""
    source = job.source
    return {
        "version": _version(),
        "options": {"types": json_digest([(i.name, i.dtype) for i in job.infos])},
        "source": {
            "id": source.id,
            "revision": source.revision,
            "format": source.format,
            "tensors": infos_digest(source.infos),
        },
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in job.files.items()},
        "form": _form("folder", job.layouts),
    }


def _form(kind: str, layouts: Mapping[str, FileLayout]) -> dict[str, Any]:
    headers = {name: hashlib.sha256(x.header).hexdigest() for name, x in layouts.items()}
    return {"kind": kind, "headers": headers, "sizes": {n: x.size for n, x in layouts.items()}}


def _version() -> str:
    from sketchconv import __version__

    return f"sketchconv {__version__}"
