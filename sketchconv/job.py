"""A conversion that has been checked from metadata and can start: source, plan, sizes, target."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sketchconv.chunks import row_memory
from sketchconv.document import make_draft, output_sizes, with_config, with_dtype
from sketchconv.errors import OutputError, RecipeError, SourceError
from sketchconv.memory import chunk_budget, left_beside
from sketchconv.parallel.checks import check_jobs, check_shareable
from sketchconv.plan import Plan
from sketchconv.ready import check_ready, most_common_spec, ready_records
from sketchconv.recipe import Recipe

if TYPE_CHECKING:
    from sketchconv.architecture import ModelMap
    from sketchconv.calibration.options import Calibration
    from sketchconv.formats.writer import BundleWriter, Draft, FolderWriter
    from sketchconv.importers.base import ImportOptions
    from sketchconv.moments import Moments
    from sketchconv.sources.base import Source

DEFAULT_SHARD_BYTES = 5_000_000_000
_OTHER_FORMATS = (".safetensors", ".bin", ".pt", ".pth", ".ggml", ".onnx")


@dataclass(frozen=True, slots=True)
class Job:
    """All that is known of a conversion before the first weight is read."""

    source: Source
    output: Path
    recipe: Recipe
    plan: Plan
    moments: Moments
    draft: Draft
    files: Mapping[str, bytes]
    sizes: Mapping[str, int]
    budget: int
    max_shard_size: int
    overwrite: bool
    calibration: Calibration | None = None
    max_memory: int | None = None
    place: Path = Path()  # where the source lies on this machine
    imports: ImportOptions | None = None
    jobs: int = 1

    @property
    def bundle(self) -> bool:
        """Whether the output is one self-contained file rather than a folder."""
        return self.output.suffix == ".sktch"

    @property
    def output_bytes(self) -> int:
        """Exact bytes on disk of the finished output."""
        return sum(self.sizes.values())

    @property
    def memory_bytes(self) -> int:
        """Working memory for the largest chunk: bounded by the budget, but never below one row."""
        steps = [s for s in self.plan.steps if s.action in ("sketch", "copy")]
        whole = [row_memory(s) * (s.info.shape[0] if s.info.shape else 1) for s in steps]
        one_row = [row_memory(s) for s in steps]
        return max(min(self.budget, max(whole, default=0)), max(one_row, default=0))

    def renewed(self) -> Job:
        """The same job for another pass over the weights: moments have a state."""
        moments = _moments(self.source, self.source.config(), self.recipe, self.calibration)
        return dataclasses.replace(self, moments=moments)

    def draft_writer(self, path: Path) -> BundleWriter:
        """Open a bundle with the same content for writing, somewhere else."""
        from sketchconv.formats.writer import BundleWriter

        return BundleWriter(path, self.draft, self.files, overwrite=True)

    def writer(self, *, resume: bool = False) -> BundleWriter | FolderWriter:
        """Open the output for writing, as a temporary beside it; keep what is there to resume."""
        from sketchconv.formats.writer import BundleWriter, FolderWriter

        how = {"overwrite": self.overwrite, "resume": resume}
        if self.bundle:
            return BundleWriter(self.output, self.draft, self.files, **how)
        return FolderWriter(self.output, self.draft, self.files, self.max_shard_size, **how)


def prepare(
    src: str | Path,
    out: str | Path,
    recipe: Recipe,
    *,
    revision: str | None = None,
    max_memory: int | None = None,
    max_shard_size: int = DEFAULT_SHARD_BYTES,
    force: bool = False,
    calibration: Calibration | None = None,
    imports: ImportOptions | None = None,
    jobs: int = 1,
) -> Job:
    """Open the source and decide everything that can be decided from metadata.

    Raises:
        SketchconvError: the source, the recipe and the output do not fit together; nothing
            has been written.
    """
    from sketchconv.architecture import map_model
    from sketchconv.planner import make_plan
    from sketchconv.sources.open import open_source

    if not str(src) or not str(out):
        raise SourceError("the source and the output must not be empty")
    output = Path(out)
    check_jobs(jobs)
    _check_suffix(output)
    if calibration is not None:
        _check_calibration(calibration, recipe)
    source = open_source(str(src), revision=revision, imports=imports)
    try:
        _check_output(output, source, force=force)
        config = source.config()
        model = map_model(config, source.infos)
        calibration = calibration and calibration.within(model.longest)
        ready = ready_records(source)
        check_ready(source, model, recipe, calibration)
        ties = equal_ties(source, model)
        plan = make_plan(source.infos, model, recipe, equal_tensors=ties, ready=ready)
        _check_shaped(plan, calibration)
        moments = _moments(source, config, recipe, calibration)
        check_shareable(jobs, recipe, moments, calibration)
        draft = make_draft(source, plan, recipe, moments, calibration)
        spec = most_common_spec(ready) or recipe.default
        files = with_config(source.files(), with_dtype(config, source), spec)
        sizes = output_sizes(output, draft, files, max_shard_size)
        way_out = f"{moments.description} (--weighting equal takes none)"
        budget = chunk_budget(left_beside(max_memory, moments.nbytes, way_out))
    except BaseException:
        source.close()
        raise
    return Job(
        source,
        output,
        recipe,
        plan,
        moments,
        draft,
        files,
        sizes,
        budget,
        max_shard_size,
        force,
        calibration,
        max_memory,
        # What was downloaded is opened by other processes from its folder.
        Path(src).expanduser().absolute() if source.revision is None else source.paths[0],
        imports,
        jobs,
    )


def equal_ties(source: Source, model: ModelMap) -> dict[str, str]:
    """Tied weights that the source stores twice with equal bytes: name -> the one to keep."""
    return {name: kept for name, kept in model.ties.items() if same_bytes(source, name, kept)}


def same_bytes(source: Source, first: str, second: str) -> bool:
    """Whether two tensors of a source have the same dtype, shape and bytes; read in pieces."""
    a, b = source.infos[first], source.infos[second]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    rows = a.shape[0] if a.shape else 1
    step = max(1, (16 << 20) * rows // max(1, a.nbytes))
    return all(
        source.rows(first, r, min(r + step, rows)) == source.rows(second, r, min(r + step, rows))
        for r in range(0, rows, step)
    )


def _check_suffix(output: Path) -> None:
    if output.suffix.lower() == ".gguf":
        raise OutputError(
            f"{output}: a sketch is a .sktch file or a folder; export that as GGUF afterwards"
            " (`sketchconv convert MODEL.sktch OUT.gguf`)"
        )
    if output.suffix.lower() in _OTHER_FORMATS:
        raise OutputError(
            f"{output}: writing {output.suffix} is not supported; "
            "name a .sktch file or a folder without that suffix"
        )


def _check_output(output: Path, source: Source, *, force: bool) -> None:
    target = output.resolve()
    for path in source.paths:
        origin = path.resolve()
        if target == origin or origin in target.parents or target in origin.parents:
            raise OutputError(
                f"{output}: the output would overwrite the source {path}; choose another place"
            )
    empty = output.is_dir() and output.suffix != ".sktch" and not any(output.iterdir())
    if output.exists() and not empty and not force:
        raise OutputError(f"{output}: exists already; pass --force to replace it")
    if not output.absolute().parent.is_dir():
        raise OutputError(f"{output.absolute().parent}: no such folder; create it first")


def _moments(
    source: Source, config: Mapping[str, Any], recipe: Recipe, calibration: Calibration | None
) -> Moments:
    from sketchconv.moments import equal_weights, make_moments

    if ready_records(source):
        return equal_weights("none are needed, indices and tables are the source's own")
    if calibration is not None and not calibration.texts:
        return equal_weights(f"method {calibration.method} has none")
    weighting = recipe.weighting_for(calibrated=calibration is not None)
    return make_moments(config, source.infos, weighting)


def _check_shaped(plan: Plan, calibration: Calibration | None) -> None:
    """Refuse what fits or trains LUTs that a shaped sketch has not."""
    shaped = next((record for record in plan.sketches if record.shaped), None)
    if calibration is None or shaped is None:
        return
    if calibration.method in ("kmeans", "leanquant"):
        raise RecipeError(
            f"method {calibration.method} makes free LUTs, and {shaped.name} has grid "
            f"{shaped.grid}; choose --method sketch, gptq or rtn, or --grid free"
        )
    if calibration.recovery_tokens(plan.steps):
        raise RecipeError(
            f"--recover trains LUTs, and {shaped.name} has scales of grid {shaped.grid}; pass "
            "--recover 0, or --grid free"
        )


def _check_calibration(calibration: Calibration, recipe: Recipe) -> None:
    """Refuse an unknown method, one that needs a text and has none, and a text that is missing."""
    from sketchconv.calibration.methods import method_named, needs_statistics
    from sketchconv.calibration.texts import check_texts

    if needs_statistics(method_named(calibration.method)) and not calibration.texts:
        raise RecipeError(
            f"method {calibration.method} needs a text: --calibration FILE.txt, FILE.jsonl or self"
        )
    if recipe.exact:
        raise RecipeError(
            "exact is about k-means alone, and a calibration or a method has a solver of its own: "
            "drop --exact, or --calibration and --method"
        )
    check_texts(calibration.texts)
