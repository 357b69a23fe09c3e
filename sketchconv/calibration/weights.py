"""Fill the modules of a model without weights from a source, and empty them again."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sketchconv.errors import CalibrationError
from sketchconv.sources.forms import Forms
from sketchconv.sources.matrices import Matrices

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sketchconv.architecture import ModelMap
    from sketchconv.sources.base import Source

_META = torch.device("meta")
# Bytes of float32 values that are read at a time.
_PIECE = 16 << 20


class Weights:
    """The weights of one source, put into modules of a skeleton when they are needed.

    Args:
        model: on the meta device; its buffers that no checkpoint stores are computed at once.
        mapping: which tensor of the source is which of the model.
        source: read whole tensors at a time.
        dtype: of every parameter that is filled in.
        device: where they go.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mapping: ModelMap,
        source: Source,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.model, self.source = model, source
        # Modules hold experts one by one, and a `Conv1D` its weight as the source has it.
        self._tensors = Matrices(source, Forms(stacked=mapping.stacked))
        transposed = frozenset(mapping.transposed)
        self._matrices = Matrices(source, Forms(transposed, mapping.stacked))
        self.dtype, self.device = dtype, device
        self._stored = {name: stored for stored, name in mapping.modules.items()}
        self._stored.update(_tied(model, self._stored))
        model.eval()  # type: ignore[no-untyped-call]
        _compute_buffers(model, device)

    def stored_name(self, name: str) -> str | None:
        """The source's name of one of the model's tensors, or None if the source lacks it."""
        return self._stored.get(name)

    def fill(self, prefix: str, *, without: frozenset[str] = frozenset()) -> str:
        """Give a module, with all inside it, its weights.

        Args:
            prefix: the module's path in the model; empty for the whole model.
            without: paths of modules that are left out, with all inside them.

        Returns:
            SHA-256 over the names and bytes that were read.

        Raises:
            CalibrationError: a weight that transformers would compute from several tensors.
        """
        digest = hashlib.sha256()
        for name, owner, key in _tensors(self.model.get_submodule(prefix), prefix, without):
            tensor = self._value(name, owner, key, digest)
            _put(owner, key, tensor)
        return digest.hexdigest()

    def _may_be_missing(self, name: str) -> bool:
        """Whether the model runs without this weight; the map has refused all other gaps."""
        patterns = self.model._keys_to_ignore_on_load_missing or ()
        return any(re.search(pattern, name) for pattern in patterns)

    def empty(self, prefix: str) -> None:
        """Give back the memory of every tensor that `fill` fills."""
        for _, owner, key in _tensors(self.model.get_submodule(prefix), prefix, frozenset()):
            _put(owner, key, _get(owner, key).to(_META))

    def float32(self, stored: str) -> Tensor:
        """A whole tensor as float32 in CPU memory, exactly; linear weights as ``[out, in]``."""
        out = torch.empty(self._matrices.infos[stored].shape)
        self._read_into(self._matrices, stored, out, None)
        return out

    def _value(self, name: str, owner: nn.Module, key: str, digest: hashlib._Hash) -> Tensor:
        old = _get(owner, key)
        stored = self._stored.get(name)
        if stored is None:
            if not isinstance(old, nn.Parameter) or self._may_be_missing(name):
                # The map allowed it to be missing: transformers would initialise it.
                return torch.zeros(old.shape, dtype=self._dtype_of(old), device=self.device)
            raise CalibrationError(
                f"{name}: made of several tensors of the checkpoint, which cannot be calibrated "
                "yet; convert this model without --calibration"
            )
        out = torch.empty(old.shape, dtype=self._dtype_of(old), device=self.device)
        self._read_into(self._tensors, stored, out, digest)
        return out

    def _dtype_of(self, old: Tensor) -> torch.dtype:
        return self.dtype if old.is_floating_point() else old.dtype

    def _read_into(
        self, source: Matrices, stored: str, out: Tensor, digest: hashlib._Hash | None
    ) -> None:
        """Read a tensor piece by piece, so that its float32 values are never held as a whole."""
        info = source.infos[stored]
        rows = info.shape[0] if info.shape else 1
        step = max(1, _PIECE * rows // max(1, 4 * out.numel()))
        flat = out.view(rows, -1)
        if digest is not None:
            digest.update(stored.encode() + b"\0")
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            raw = source.rows(stored, begin, end)
            if digest is not None:
                digest.update(raw)
            values = np.require(source.float32(stored, raw), requirements=["C", "W"])
            flat[begin:end] = torch.from_numpy(values).view(end - begin, -1)


def _tensors(
    module: nn.Module, prefix: str, without: frozenset[str]
) -> Iterator[tuple[str, nn.Module, str]]:
    """(full name, owner, key) of every parameter and stored buffer."""
    for path, owner in module.named_modules(remove_duplicate=False):
        full = ".".join(part for part in (prefix, path) if part)
        if any(full == w or full.startswith(f"{w}.") for w in without):
            continue
        kept = set(owner._buffers) - owner._non_persistent_buffers_set
        for key in (*owner._parameters, *sorted(kept)):
            if _held(owner, key) is not None:
                yield f"{full}.{key}" if full else key, owner, key


def _held(owner: nn.Module, key: str) -> Any:
    return owner._parameters.get(key, owner._buffers.get(key))


def _get(owner: nn.Module, key: str) -> Tensor:
    tensor: Tensor = _held(owner, key)
    return tensor


def _put(owner: nn.Module, key: str, tensor: Tensor) -> None:
    if key in owner._parameters:
        owner._parameters[key] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[key] = tensor


def _tied(model: PreTrainedModel, stored: dict[str, str]) -> dict[str, str]:
    """Stored names of weights that the model ties to one that is stored."""
    groups: dict[str, set[str]] = {}
    for target, source in (model.all_tied_weights_keys or {}).items():
        groups.setdefault(source, {source}).add(target)
    found = {}
    for members in groups.values():
        owner = next((stored[name] for name in sorted(members) if name in stored), None)
        if owner is not None:
            found.update({name: owner for name in members if name not in stored})
    return found


def _compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers that no checkpoint stores, as transformers does when it loads one."""
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, key = name.rpartition(".")
        model.get_submodule(path)._buffers[key] = torch.empty_like(buffer, device=device)
    # Parameters are on the meta device still, where initialising them costs nothing.
    model.initialize_weights()  # type: ignore[no-untyped-call]
