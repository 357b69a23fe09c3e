"""Document against tensors: every record has its tensors, every tensor its place."""

from __future__ import annotations

from collections.abc import Mapping

from sketchconv.formats import rules
from sketchconv.formats.errors import refuse, shown
from sketchconv.formats.manifest import Manifest
from sketchconv.formats.tensors import TensorInfo


def check_tensors(
    manifest: Manifest, stored: Mapping[str, TensorInfo], where: str, *, partial: bool = False
) -> None:
    """Check a document against the tensors of its file, or of all shards of a folder.

    Args:
        manifest: a checked document.
        stored: the stored tensors.
        where: the file, for the error.
        partial: the file is one shard; the document may describe tensors of other shards.

    Raises:
        FormatError: SKT-067 to SKT-070, SKT-075, SKT-080, SKT-085, SKT-086, SKT-091, SKT-092.
    """
    _check_sketches(manifest, stored, where, partial)
    _check_orphans(manifest, stored, where)
    _check_digests(manifest, stored, where, partial)
    _check_sentinel(manifest, stored, where, partial)
    _check_aliases(manifest, stored, where, partial)
    _check_files(manifest, stored, where)


def _check_sketches(
    manifest: Manifest, stored: Mapping[str, TensorInfo], where: str, partial: bool
) -> None:
    for record in manifest.sketches.values():
        for requirement, info in (("SKT-067", record.index_info), ("SKT-068", record.lut_info)):
            found = stored.get(info.name)
            if found is None and partial:
                continue
            if found != info:
                got = f"{found.dtype} {list(found.shape)}" if found else "nothing"
                refuse(
                    requirement,
                    f"{where}: {info.name}",
                    f"expected {info.dtype} {list(info.shape)}, got {got}",
                )


def _check_orphans(manifest: Manifest, stored: Mapping[str, TensorInfo], where: str) -> None:
    files = {tensor for tensor in manifest.files.values() if tensor}
    records = manifest.sketches.values()
    parts = {part for r in records for part in (r.index_name, r.lut_name)}
    for name, info in stored.items():
        if name.endswith(suffixes(manifest.version)) and name not in parts:
            refuse("SKT-069", f"{where}: {name}", "no sketch record of this name")
        if name in manifest.sketches and (info.dtype, info.shape) != ("U8", (1,)):
            refuse("SKT-070", f"{where}: {name}", "stored densely, but also recorded as a sketch")
        if name.startswith(rules.RESERVED_PREFIX) and name not in files:
            refuse("SKT-092", f"{where}: {name}", "reserved name that no file uses")


def _check_digests(
    manifest: Manifest, stored: Mapping[str, TensorInfo], where: str, partial: bool
) -> None:
    for name in stored:
        if name not in manifest.digests:
            refuse("SKT-080", f"{where}: {name}", "the tensor has no digest")
    if not partial and len(manifest.digests) != len(stored):
        odd = min(manifest.digests.keys() - stored.keys())
        refuse("SKT-080", f"{where}: {shown(odd)}", "a digest of a tensor that is not stored")


def _check_sentinel(
    manifest: Manifest, stored: Mapping[str, TensorInfo], where: str, partial: bool
) -> None:
    name = manifest.sentinel
    if name is None or (partial and name not in stored):
        return
    if name not in stored:
        refuse("SKT-075", f"{where}: {name}", "the sentinel tensor is not stored")


def _check_aliases(
    manifest: Manifest, stored: Mapping[str, TensorInfo], where: str, partial: bool
) -> None:
    for name, target in manifest.aliases.items():
        if name in stored or name in manifest.sketches:
            refuse("SKT-085", f"{where}: alias {name}", "the name is also stored or sketched")
        if target in manifest.sketches:
            continue
        plain = target in stored or (partial and target in manifest.digests)
        if not plain or _internal(target, manifest):
            refuse("SKT-086", f"{where}: alias {name}", f"no weight {shown(target)}")


def _internal(name: str, manifest: Manifest) -> bool:
    """Whether a name is that of an index, a LUT, scales or a file; not of a tensor of the model."""
    return name.startswith(rules.RESERVED_PREFIX) or name.endswith(suffixes(manifest.version))


def suffixes(version: str) -> tuple[str, ...]:
    """How the tensors of sketches end in a document of that version."""
    own = (rules.INDEX_SUFFIX, rules.LUT_SUFFIX)
    return own if version == rules.FORMAT_VERSION else (*own, rules.SCALE_SUFFIX)


def _check_files(manifest: Manifest, stored: Mapping[str, TensorInfo], where: str) -> None:
    for path, tensor in manifest.files.items():
        if not tensor:
            continue
        info = stored.get(tensor)
        if info is None or info.dtype != "U8" or len(info.shape) != 1:
            refuse("SKT-091", f"{where}: file {path}", f"no U8 tensor {tensor} of rank 1")
