"""What `save_pretrained` writes for a sketched model: its tensors, a sentinel, a new document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from sketchconv import __version__
from sketchconv.adapters.tables import PREFIX
from sketchconv.errors import LoadError
from sketchconv.formats.digest import tensor_digest
from sketchconv.formats.grids import FREE
from sketchconv.formats.manifest import Manifest
from sketchconv.formats.rules import DOCUMENT_KEY, INDEX_SUFFIX
from sketchconv.formats.sentinel import sentinel_name
from sketchconv.formats.sketches import SketchRecord
from sketchconv.formats.tensors import TensorInfo
from sketchconv.kernels.packed import LUT_DTYPES
from sketchconv.runtime.modules import SketchModule
from sketchconv.runtime.replace import WEIGHT
from sketchconv.runtime.shaped import ShapedLinear
from sketchconv.runtime.tied import Tied

TORCH_DTYPES = {
    **LUT_DTYPES,
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def state_and_metadata(
    model: PreTrainedModel, manifest: Manifest, records: Mapping[str, SketchRecord]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state to save, under the names of the model, and the file metadata.

    Args:
        model: a sketched model.
        manifest: the document that the model was loaded with.
        records: the record of each sketched module when it was loaded, by the module's path.

    Errors are carried over for sketches whose bytes did not change, and unknown for others.

    Raises:
        LoadError: transformers would store a sketch in another form, or a dtype has no name in the
            format.
    """
    # The base, whatever adapter is active: adapters are saved as deltas.
    state = {name: t for name, t in model.state_dict().items() if f".{PREFIX}" not in name}
    paths = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, SketchModule) and not isinstance(module, Tied)
    }
    names = _final_names(model, state, paths)
    if names:
        chosen = sentinel_name(names.values(), manifest.source)
        first = next(path for path, name in names.items() if name == chosen)
        state[first + WEIGHT] = torch.zeros(1, dtype=torch.uint8)
    final = _final(model, state)
    digests = {name: _digest(name, tensor) for name, tensor in final.items()}
    sketches, errors = {}, {}
    for path, module in paths.items():
        record = _record(names[path], module, records.get(path), model.dtype)
        sketches[record.name] = record
        errors[record.name] = _known_error(manifest, records.get(path), record, digests)
    document = replace(
        manifest,
        sketches=sketches,
        digests=digests,
        errors=errors,
        aliases=_aliases(model, names, final),
        files={},
        sentinel=sentinel_name(sketches, manifest.source),
        tool=f"sketchconv {__version__}",
    )
    document.check("save_pretrained")
    return state, {DOCUMENT_KEY: document.to_json()}


def _final(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as transformers stores them: ties, ignored keys and renamings applied."""
    ignored = model._keys_to_ignore_on_save or ()
    kept = {key: tensor for key, tensor in state.items() if key not in ignored}
    kept = remove_tied_weights_from_state_dict(kept, model)
    return dict(revert_weight_conversion(model, kept))


def _final_names(
    model: PreTrainedModel, state: Mapping[str, Tensor], paths: Mapping[str, SketchModule]
) -> dict[str, str]:
    """The stored weight name of each sketched module."""
    stored = {id(tensor): name for name, tensor in _final(model, state).items()}
    names = {}
    for path in paths:
        name = stored.get(id(state[path + INDEX_SUFFIX]), "")
        stem = name.removesuffix(INDEX_SUFFIX)
        table = f".{paths[path].TABLE}"
        if stem == name or stored.get(id(state[path + table])) != stem + table:
            raise LoadError(f"the sketch {path} cannot be saved under its original name")
        names[path] = stem + WEIGHT
    return names


def _record(
    name: str, module: SketchModule, loaded: SketchRecord | None, dtype: torch.dtype
) -> SketchRecord:
    source = TORCH_DTYPES[dtype] if loaded is None else loaded.dtype
    lut = LUT_DTYPES[module._tensors()[1].dtype]
    shape = (module.rows, module.columns)
    grid = module.grid if isinstance(module, ShapedLinear) else FREE
    return SketchRecord(name, shape, source, module.bits, module.groups, lut, grid)


def _known_error(
    manifest: Manifest,
    loaded: SketchRecord | None,
    record: SketchRecord,
    digests: Mapping[str, str],
) -> float | None:
    if loaded is None or loaded.name not in manifest.errors:
        return None
    pairs = ((loaded.index_name, record.index_name), (loaded.lut_name, record.lut_name))
    same = all(manifest.digests[old] == digests[new] for old, new in pairs)
    return manifest.errors[loaded.name] if same else None


def _aliases(
    model: PreTrainedModel, names: Mapping[str, str], final: Mapping[str, Tensor]
) -> dict[str, str]:
    """Tied weights: absent name -> stored name."""
    stored = set(names.values()) | set(final)
    owners = {id(model.get_submodule(path)): name for path, name in names.items()}
    found = {
        target: source
        for target, source in model.all_tied_weights_keys.items()
        if source in stored and target not in stored
    }
    for path, module in model.named_modules():
        if isinstance(module, Tied):
            found[path + WEIGHT] = owners[id(module.owner)]
    return found


def _digest(name: str, tensor: Tensor) -> str:
    if tensor.dtype not in TORCH_DTYPES:
        raise LoadError(f"{name} is {tensor.dtype}, which a sketch cannot store")
    info = TensorInfo(name, TORCH_DTYPES[tensor.dtype], tuple(tensor.shape))
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return tensor_digest(info, flat.numpy().data)
