"""A GGUF export that has been checked from metadata and can start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sketchconv.errors import OutputError, SourceError
from sketchconv.export.content import GgufContent
from sketchconv.export.gguf_model import from_model
from sketchconv.export.importance import calibration_keys, check_weighted
from sketchconv.export.plan import ExportPlan
from sketchconv.export.recall import half_published
from sketchconv.export.recipe import ExportRecipe
from sketchconv.export.reexport import from_gguf
from sketchconv.export.rows import KEPT_BYTES, RowReader, SourceRows
from sketchconv.formats.gguf_layout import part_layouts
from sketchconv.formats.gguf_writer import GgufWriter
from sketchconv.formats.laid_file import FileLayout
from sketchconv.kernels.threads import available_threads
from sketchconv.memory import chunk_budget
from sketchconv.sources.base import Source
from sketchconv.sources.open import is_gguf, open_source

if TYPE_CHECKING:
    from sketchconv.calibration.options import Calibration


@dataclass(frozen=True, slots=True)
class GgufJob:
    """All that is known of an export before the first weight is read.

    Attributes:
        source: name of what is exported; `source_format` and `source_bytes` go with it.
        output: the path that was asked for; with parts, the files are named after it.
        plan: every tensor of the output.
        reader: gives the tensors' rows; `run` closes it.
        layouts: of each file by name.
        tokenizer: in words.
        budget: bytes of working memory for all chunks of rows together.
        threads: that encode.
        overwrite: replace what is there.
        calibration: the text that the importance of columns is measured on.
        max_memory: limit on the process's anonymous memory in bytes.
    """

    source: str
    source_format: str
    source_bytes: int
    output: Path
    plan: ExportPlan
    reader: RowReader
    layouts: Mapping[str, FileLayout]
    tokenizer: str
    budget: int
    threads: int
    overwrite: bool
    calibration: Calibration | None = None
    max_memory: int | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Exact bytes of every file."""
        return {name: layout.size for name, layout in self.layouts.items()}

    @property
    def output_bytes(self) -> int:
        """Exact bytes on disk of the finished output."""
        return sum(self.sizes.values())

    def writer(self, *, resume: bool = False) -> GgufWriter:
        """Open the output for writing, as temporaries beside it; keep what is there to resume."""
        folder = self.output.absolute().parent
        return GgufWriter(folder, self.layouts, self.overwrite, resume)


def prepare_gguf(
    src: str | Path | Source,
    out: str | Path,
    recipe: ExportRecipe | None = None,
    *,
    revision: str | None = None,
    max_memory: int | None = None,
    max_shard_size: int | None = None,
    threads: int | None = None,
    force: bool = False,
    calibration: Calibration | None = None,
) -> GgufJob:
    """Open the source and decide everything that can be decided from metadata.

    Args:
        src: a `.sktch` file, a sketch folder, a Hugging Face folder, a hub id or a `.gguf` file; or
            a source that is open, which is closed with the job.
        out: a path that ends in `.gguf`.
        recipe: the types of the tensors; exact ones by default.
        revision: branch, tag or commit on the Hub.
        max_memory: limit on the process's anonymous memory in bytes.
        max_shard_size: bytes of tensor data per part; one file by default.
        threads: that encode; all cores by default. The bytes do not depend on it.
        force: replace existing files.
        calibration: weigh columns in quantized types by the mean squares of their inputs on a
            text; the bytes then depend on `threads` as torch's sums do.

    Raises:
        SketchconvError: source, recipe and output do not fit together, or the architecture or
            the tokenizer is not supported; nothing has been written.
    """
    if src == "" or not str(out):
        raise SourceError("the source and the output must not be empty")
    recipe, output = recipe or ExportRecipe(), Path(out)
    if not output.absolute().parent.is_dir():
        raise OutputError(f"{output.absolute().parent}: no such folder; create it first")
    reader, content = _opened(src, recipe, revision)
    try:
        infos = [step.info for step in content.plan.steps]
        values = dict(content.values)
        if calibration is not None:
            check_weighted(content.plan, calibration)
            values.update(calibration_keys(calibration))
        layouts = part_layouts(output.name, values, infos, max_shard_size, content.alignment)
        replaced = force or half_published(output, layouts)  # `recall` looks at what is there
        check_outputs(output.absolute().parent, layouts, reader.paths, force=replaced)
        # After planning: what the libraries take is in use by now.
        budget = chunk_budget(max_memory)
        if isinstance(reader, SourceRows):
            kept = _kept_whole(content.plan, min(KEPT_BYTES, budget // 2))
            reader.keep_bytes, budget = kept, budget - kept
    except BaseException:
        reader.close()
        raise
    return GgufJob(
        reader.id,
        reader.format,
        reader.nbytes,
        output,
        content.plan,
        reader,
        layouts,
        content.tokenizer,
        budget,
        threads or available_threads(),
        force,
        calibration,
        max_memory,
    )


def _opened(
    src: str | Path | Source, recipe: ExportRecipe, revision: str | None
) -> tuple[RowReader, GgufContent]:
    if isinstance(src, str | Path):
        if is_gguf(str(src)) and revision is None:
            return from_gguf(Path(src).expanduser(), recipe)
        src = open_source(str(src), revision=revision, sketches=True)
    try:
        return from_model(src, recipe)
    except BaseException:
        src.close()
        raise


def _kept_whole(plan: ExportPlan, most: int) -> int:
    """Bytes of the largest transposed tensor that may be kept as a whole."""
    sizes = [4 * step.parameters for step in plan.steps if step.change == "transpose"]
    return max((size for size in sizes if size <= most), default=0)


def check_outputs(
    folder: Path, names: Mapping[str, object], sources: tuple[Path, ...], *, force: bool
) -> None:
    """Refuse an output that is the source or lies in it, or that is there already.

    Raises:
        OutputError: says which, and what to do.
    """
    if not folder.is_dir():
        raise OutputError(f"{folder}: no such folder; create it first")
    for name in names:
        target = (folder / name).resolve()
        for source in sources:
            origin = source.resolve()
            if target == origin or origin in target.parents or target in origin.parents:
                raise OutputError(
                    f"{folder / name}: the output would overwrite the source {source}; choose"
                    " another place"
                )
        if target.exists() and not force:
            raise OutputError(f"{folder / name}: exists already; pass --force to replace it")
