"""The reader of pickles: what torch writes is read, and nothing is ever run."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import zipfile

import pytest
import torch

from sketchconv.errors import FormatError, SourceError
from sketchconv.importers.torch_files import TorchStore

TENSORS = {
    "half": torch.randn(3, 4).half(),
    "bf": torch.randn(5).bfloat16(),
    "wide": torch.randn(2, 3, 4),
    "bytes": torch.arange(300).to(torch.uint8),
    "words": torch.arange(6, dtype=torch.int32).view(2, 3),
    "scalar": torch.tensor(4.0),
    "view": torch.arange(12.0).view(3, 4)[1:],
}


def same(path, tensors, prefix=""):
    store = TorchStore(path)
    for name, tensor in tensors.items():
        info = store.infos[f"{prefix}{name}"]
        assert info.shape == tuple(tensor.shape)
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert store.read(info.name, 0, info.nbytes) == raw
        assert store.read(info.name, 2, 4) == raw[2:4]
    store.close()


def write(tmp_path, data, name="m.pkl"):
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


def refused(path, match=""):
    with pytest.raises((SourceError, FormatError), match=match):
        TorchStore(path)


def test_what_torch_saves(tmp_path):
    torch.save(TENSORS, tmp_path / "m.pt")
    same(tmp_path / "m.pt", TENSORS)


def test_a_state_dict(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5))
    torch.save(model.state_dict(), tmp_path / "m.pt")
    same(tmp_path / "m.pt", model.state_dict())
    torch.save(dict(model.named_parameters()), tmp_path / "p.pt")
    same(tmp_path / "p.pt", {n: p.detach() for n, p in model.named_parameters()})


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_plain_pickle_of_tensors(tmp_path, protocol):
    data = pickle.dumps({**TENSORS, "pair": (TENSORS["half"], TENSORS["bytes"])}, protocol)
    path = write(tmp_path, data)
    same(path, TENSORS)
    same(path, {"0": TENSORS["half"], "1": TENSORS["bytes"]}, "pair.")


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], tuple(self.call[1:])


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Evil(os.system, "touch {}"), "posix.system"),
        (Evil(eval, "open('{}', 'w')"), "builtins.eval"),
        (Evil(exec, "open('{}', 'w')"), "builtins.exec"),
        (Evil(open, "{}", "w"), "io.open"),
        (Evil(getattr, 3, "real"), "builtins.getattr"),
        (Evil(torch.load, "{}"), "torch.serialization.load"),
        (random.Random(3), "random.Random"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (io.BytesIO(b"x"), "_io.BytesIO"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("saved", [False, True])
def test_code_is_named_and_not_run(tmp_path, value, name, protocol, saved):
    marker = tmp_path / "marker"
    if isinstance(value, Evil):
        value = Evil(*(str(v).replace("{}", str(marker)) if isinstance(v, str) else v
                       for v in value.call))  # fmt: skip
    path = tmp_path / "m.pkl"
    if saved:
        torch.save({"w": TENSORS["half"], "x": value}, path, pickle_protocol=protocol)
    else:
        path.write_bytes(pickle.dumps({"w": TENSORS["half"], "x": value}, max(3, protocol)))
    module, _, leaf = name.rpartition(".")
    module = module.replace("builtins", "(builtins|__builtin__)").replace(".", "[.]")
    refused(path, rf"it names {module}[.]{leaf}, which no tensor needs")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "neither a file of torch.save nor a pickle"),
        (b"\x80\x02", "cut off"),
        (b"\x80\x02.", "a value is missing"),
        (b"\x80\x02}", "cut off"),
        (b"\x80\x02K\x01.", "holds no dict of tensors"),
        (b"\x80\x02ccollections\nOrderedDict\nK\x01R.", "a call of something that is not a name"),
        (b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.", "other arguments than torch writes"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "a tensor without a storage"),
        (b"\x80\x02ctorch.storage\n_load_from_bytes\nC\x03abc\x85R.", "a value is missing"),
        (b"\x80\x02ccollections\n" + b"a" * 70000, "too long"),
        (b"\x80\x02c\xff\n", "not ASCII|cut off"),
        (b"\x80\x02K\x01K\x02\x93.", "a name that is no text"),
        (b"\x80\x02h\x07.", "a reference to 7"),
        (b"\x80\x02u.", "a mark is missing"),
        (b"\x80\x02K\x01(u.", "no dict"),
        (b"\x80\x02}(K\x01u.", "no dict"),
        (b"\x80\x02}()K\x01u.", "a key of type tuple"),
        (b"\x80\x02K\x01K\x01a.", "no list"),
        (b"\x80\x02K\x01}b.", "attributes of something that is no dict"),
        (b"\x80\x02\x8a\xff" + bytes(255) + b".", "a number of 255 bytes"),
        (b"\x80\x02X\xff\xff\xff\x7f", "a text of 2147483647 bytes"),
        (b"\x80\x04\x8e" + b"\xff" * 8, "cut off"),
        (b"\x80\x02X\x02\0\0\0\xff\xfe.", "not UTF-8"),
        (b"\x80\x02K\x01Q.", "before version 1.6"),
        (b"\x80\x02i__main__\nX\n.", "opcode b'i'"),
        (b"\x80\x02P3\n.", "opcode b'P'"),
        (b"\x80\x02\x82\x01.", "opcode"),
        (b"\x80\x02)\x81.", "opcode"),
        (b"\x80\x02}X\x01\0\0\0a}s.", "'a': expected tensors by name"),
        (b"\x80\x02" + b"(" * 200_000, "more than 100000 open values"),
        (b"\x80\x02" + b"]0" * 3, "opcode b'0'"),
    ],
)
def test_bytes_that_no_torch_writes(tmp_path, data, match):
    refused(write(tmp_path, data), match)


def test_deep_nesting_ends_in_an_error_of_ours(tmp_path):
    refused(write(tmp_path, b"\x80\x02K\x01" + b"\x85" * 1_000_000 + b"."), "no dict")
    name = b"K\x01" + b"\x85" * 100_000
    refused(write(tmp_path, b"\x80\x02" + name + name + b"\x93."), "a name that is no text")
    inner = b"\x80\x03ctorch.storage\n_load_from_bytes\nB\x01\0\0\0x\x85R."
    for _ in range(300):
        size = struct.pack("<I", len(inner))
        inner = b"\x80\x03ctorch.storage\n_load_from_bytes\nB" + size + inner + b"\x85R."
    refused(write(tmp_path, inner), "in a form that torch does not write")


def pieces(tensors):
    """The members of what torch saves, by their name below the archive's folder."""
    file = io.BytesIO()
    torch.save(tensors, file)
    with zipfile.ZipFile(file) as archive:
        return {n.partition("/")[2]: archive.read(n) for n in archive.namelist()}


def rezipped(path, members, *, method=zipfile.ZIP_STORED, root="m/"):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(root + name, data)
    return path


def test_archives_that_no_torch_writes(tmp_path):
    good, path = pieces(TENSORS), tmp_path / "m.pt"
    same(rezipped(path, good), TENSORS)
    refused(rezipped(path, good, method=zipfile.ZIP_DEFLATED), "compressed or encrypted")
    refused(rezipped(path, {**good, "byteorder": b"big"}), "not little-endian")
    refused(rezipped(path, {n: d for n, d in good.items() if n != "data.pkl"}), "no data.pkl")
    refused(rezipped(path, {n: d for n, d in good.items() if n != "data/0"}), "storage '0' is")
    refused(rezipped(path, {**good, "data/0": good["data/0"][:-1]}), "storage '0' is missing or")
    refused(rezipped(path, {**good, "data.pkl": good["data.pkl"][:-9]}), "cut off|opcode")


def test_a_tensor_beyond_its_storage(tmp_path):
    """The same shape with a storage of one element less."""
    from collections import OrderedDict

    class Fake:
        def __init__(self, offset, shape, strides):
            self.arguments = TENSORS["wide"].untyped_storage(), offset, shape, strides

        def __reduce__(self):
            storage = torch.storage.TypedStorage(
                wrap_storage=self.arguments[0], dtype=torch.float32, _internal=True
            )
            rest = (*self.arguments[1:], False, OrderedDict())
            return torch._utils._rebuild_tensor_v2, (storage, *rest)

    def write_one(*arguments):
        return write(tmp_path, pickle.dumps({"w": Fake(*arguments)}, 4))

    same(write_one(0, (2, 3, 4), (12, 4, 1)), {"w": TENSORS["wide"]})
    refused(write_one(1, (2, 3, 4), (12, 4, 1)), "beyond its storage")
    refused(write_one(0, (2, 3, 5), (15, 5, 1)), "beyond its storage")
    refused(write_one(0, (1 << 62, 1 << 62), (0, 0)), "not stored row by row")
    refused(write_one(0, (4, 6), (1, 4)), "not stored row by row")
    refused(write_one(-1, (2,), (1,)), "with strides")
    refused(write_one(0, (-2,), (1,)), "with strides")
    refused(write_one(0, (2,), (1, 1)), "with strides")
    refused(write_one(0, [2], (1,)), "no tuple")
    refused(write_one(0, (2.0,), (1,)), "not made of integers")


def test_every_cut_and_many_flips_end_in_an_error_of_ours_or_in_tensors(tmp_path):
    generator = random.Random(7)
    small = {"a": torch.arange(4.0), "b": (torch.arange(3), torch.ones(2).half())}
    file = io.BytesIO()
    torch.save(small, file)
    for data in (pickle.dumps(small, 4), file.getvalue()):
        cuts = [data[:size] for size in range(0, len(data) - 1, max(1, len(data) // 150))]
        flips = []
        for _ in range(300):
            changed = bytearray(data)
            for _ in range(generator.randrange(1, 4)):
                changed[generator.randrange(len(data))] = generator.randrange(256)
            flips.append(bytes(changed))
        for number, changed in enumerate((*cuts, *flips)):
            try:
                TorchStore(write(tmp_path, changed)).close()
            except (SourceError, FormatError):
                continue
            assert number >= len(cuts), "a file that was cut was read"
