"""The limits and the numbered requirements of `spec/sktch.md`, one line each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

FORMAT_VERSION: Final = "1.0"
FORMAT_MAJOR: Final = 1
KIND_MODEL: Final = "model"
PACKING: Final = "planes-le"
DOCUMENT_KEY: Final = "sktch"
RESERVED_PREFIX: Final = "sktch."
FILE_PREFIX: Final = "sktch.file."
INDEX_SUFFIX: Final = ".sketch_index"
LUT_SUFFIX: Final = ".sketch_lut"
WEIGHT_SUFFIX: Final = ".weight"

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

REQUIREMENTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "SKT-001": "a file is a regular file",
        "SKT-002": "a file holds at least 10 bytes",
        "SKT-003": "the header length is within its limits",
        "SKT-004": "the header ends inside the file",
        "SKT-005": "the header starts with an opening brace",
        "SKT-006": "the header is UTF-8",
        "SKT-007": "white space is only the padding with spaces after the header",
        "SKT-008": "the text is one JSON object",
        "SKT-009": "no JSON object has the same key twice",
        "SKT-010": "numbers are plain digits",
        "SKT-011": "strings hold Unicode scalar values only",
        "SKT-012": "nesting and number of values are within their limits",
        "SKT-013": "a file does not change while it is read",
        "SKT-020": "the number of tensors is within its limit",
        "SKT-021": "a tensor name has the right form",
        "SKT-022": "a tensor entry has exactly dtype, shape and data_offsets",
        "SKT-023": "a dtype is in the closed list",
        "SKT-024": "a shape is an array of at most 8 integers",
        "SKT-025": "a dimension is at least 1",
        "SKT-026": "data_offsets are two integers, begin not after end",
        "SKT-027": "offsets span exactly the bytes of dtype and shape",
        "SKT-028": "tensors leave no hole and do not overlap",
        "SKT-029": "the last tensor ends where the file ends",
        "SKT-030": "tensors are ordered by element size, then name",
        "SKT-031": "the header has its canonical form and length",
        "SKT-040": "the metadata is an object of strings",
        "SKT-041": "the metadata holds format pt",
        "SKT-042": "the metadata holds the sktch document",
        "SKT-043": "the metadata holds nothing else",
        "SKT-050": "the document has its canonical form",
        "SKT-051": "the document has exactly its members",
        "SKT-052": "the version is known",
        "SKT-053": "the kind is known",
        "SKT-054": "the packing is known",
        "SKT-055": "the seal matches the document",
        "SKT-056": "tool, recipe and source have the right types",
        "SKT-057": "extensions are namespaced",
        "SKT-060": "a sketch is named after a weight",
        "SKT-061": "a sketch record has exactly its members",
        "SKT-062": "a sketched weight has two dimensions",
        "SKT-063": "bits are 1 to 8",
        "SKT-064": "groups divide the columns",
        "SKT-065": "the LUT's dtype is F16, BF16 or F32",
        "SKT-066": "the dense dtype is a floating-point dtype",
        "SKT-067": "the index tensor is stored as the record says",
        "SKT-068": "the LUT tensor is stored as the record says",
        "SKT-069": "no index or LUT is stored without its record",
        "SKT-070": "a sketched weight is not stored densely as well",
        "SKT-071": "unused bits of a plane are zero",
        "SKT-072": "LUT entries are finite",
        "SKT-075": "the sentinel stands for a sketched weight",
        "SKT-076": "the sentinel is one zero byte",
        "SKT-080": "every stored tensor has a digest, and nothing else has",
        "SKT-081": "a digest matches its tensor",
        "SKT-082": "every sketch has an error, and nothing else has",
        "SKT-085": "an alias is an absent tensor name",
        "SKT-086": "an alias points at a weight that is there",
        "SKT-090": "a file path is relative, plain and portable",
        "SKT-091": "a file is stored as one U8 tensor under the reserved prefix",
        "SKT-092": "a name under the reserved prefix belongs to a file",
        "SKT-093": "file paths do not collide",
        "SKT-100": "a folder holds one model.safetensors or one index",
        "SKT-101": "the index is a JSON object with a weight_map of strings",
        "SKT-102": "a shard name is a plain file name ending in .safetensors",
        "SKT-103": "a shard lies inside the folder",
        "SKT-104": "every shard of the index is there",
        "SKT-105": "index and shards list the same tensors, each once",
        "SKT-106": "the documents of all shards agree",
        "SKT-107": "a folder's documents hold no files",
        "SKT-108": "config.json is a JSON object that names the format",
    }
)
