"""The limits, names and patterns of `spec/sktch.md`."""

from __future__ import annotations

from typing import Final

FORMAT_VERSION: Final = "1.0"
SHAPED_VERSION: Final = "1.1"
KNOWN_VERSIONS: Final = (FORMAT_VERSION, SHAPED_VERSION)
FORMAT_MAJOR: Final = 1
KIND_MODEL: Final = "model"
KIND_DELTA: Final = "delta"
DELTA_VERSION: Final = "1.0"
PACKING: Final = "planes-le"
DOCUMENT_KEY: Final = "sktch"
RESERVED_PREFIX: Final = "sktch."
FILE_PREFIX: Final = "sktch.file."
INDEX_SUFFIX: Final = ".sketch_index"
LUT_SUFFIX: Final = ".sketch_lut"
SCALE_SUFFIX: Final = ".sketch_scale"
WEIGHT_SUFFIX: Final = ".weight"
ADAPTER_NAME: Final = "sketch_adapter.safetensors"
ADAPTER_CONFIG: Final = "sketch_adapter_config.json"
DELTA_LUT_SUFFIX: Final = ".delta_lut"
DELTA_SCALE_SUFFIX: Final = ".delta_scale"
DELTA_GROUPS_SUFFIX: Final = ".delta_groups"

LENGTH_BYTES: Final = 8
MIN_HEADER: Final = 2
MAX_HEADER: Final = 64 * 1024 * 1024
MAX_TENSORS: Final = 200_000
MAX_RANK: Final = 8
MAX_INTEGER: Final = 2**63 - 1
MAX_HEADER_DEPTH: Final = 3
MAX_DOCUMENT_DEPTH: Final = 16
MAX_VALUES: Final = 4_000_000
MAX_NAME: Final = 512
MAX_BITS: Final = 8
ALIGNMENT: Final = 64
MAX_SHARDS: Final = 99_999

NAME_PATTERN: Final = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,511}"
PATH_PART_PATTERN: Final = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}"
MAX_PATH_PARTS: Final = 8
EXTENSION_PATTERN: Final = r"[a-z0-9-]+(\.[a-z0-9-]+)+"
