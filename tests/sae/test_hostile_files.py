"""Hostile and damaged files: none runs code, and each is refused by name, in bounded time and memory."""

import collections
import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

import fastfg
from fastfg.sae.files import open_weights
from fastfg.sae.files.containers import load
from fastfg.sae.formats.common import Contents

CONFIG = {"d_in": 4, "hook_point_layer": 1, "activation_fn_str": "relu", "normalize_activations": "none"}
MEMORY, SECONDS = 192 << 20, 60  # with the clock of a loaded machine, under tracemalloc


def state():
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (4, 6), "b_enc": (6,), "W_dec": (6, 4), "b_dec": (4,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


RAN = []


def ran(*_):
    RAN.append(1)
    return torch.zeros(1)


class Reduced:
    """An object whose pickle calls ``function(*arguments)``."""

    def __init__(self, function=ran, arguments=(1,), state=None, items=None):
        self.parts = (function, arguments, state, items)

    def __reduce__(self):
        return tuple(self.parts)


def saved(value, legacy=False):
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def pickled(value, protocol=4):
    return pickle.dumps(value, protocol)


def zipped(members, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def torch_zip(pickle_bytes, **storages):
    return zipped({"a/data.pkl": pickle_bytes, **{f"a/data/{key}": value for key, value in storages.items()}})


def tensor_pickle(numel=24, size=(4, 6), stride=(6, 1), offset=0, kind=b"FloatStorage", key=b"0"):
    """A pickle of {"W_enc": tensor} with any shape, for data/0."""

    def number(n):
        return b"\x8a\x08" + struct.pack("<q", n)  # LONG1

    numbers = [b"(" + b"".join(map(number, values)) + b"t" for values in (size, stride)]
    reference = b"(X\x07\x00\x00\x00storagectorch\n" + kind + b"\nX\x01\x00\x00\x00" + key + b"X\x03\x00\x00\x00cpu"
    reference += number(numel) + b"tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference + number(offset) + numbers[0] + numbers[1] + b"\x89N"
    return b"\x80\x02}X\x05\x00\x00\x00W_enc" + call + b"tRs."


def npy(header, data=b""):
    text = header.encode().ljust(118 - 0, b" ")[:117] + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def npz(**members):
    return zipped({f"{name}.npy": content for name, content in members.items()})


def object_array():
    buffer = io.BytesIO()
    np.savez(buffer, w_enc=np.array([Reduced(), Reduced()], dtype=object), w_dec=np.zeros(3))
    return buffer.getvalue()


def zip_bomb():
    return zipped({"a/data.pkl": tensor_pickle(), "a/data/0": bytes(200 << 20)}, zipfile.ZIP_DEFLATED)


def lying_zip():
    """A member whose directory says 96 bytes, and which unpacks to 50 MB."""
    content = bytearray(zipped({"a/data.pkl": tensor_pickle(), "a/data/0": bytes(50 << 20)}, zipfile.ZIP_DEFLATED))
    size = struct.pack("<I", 50 << 20)
    return bytes(content).replace(size, struct.pack("<I", 96))


def gzip_bomb():
    return gzip.compress(bytes(300 << 20))


def gzip_tower():
    return gzip.compress(gzip.compress(gzip.compress(saved(state()))))


def saev(header, rest):
    return header + b"\n" + rest


def safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def in_ordered_dict(hostile):
    return collections.OrderedDict(state() | {"W_dec": hostile})


def opcode(body):
    return b"\x80\x04" + body


SYSTEM = b"cos\nsystem\n"
SHELL = b"X\x13\x00\x00\x00touch /tmp/fastfg-xx"
HOSTILE = {
    # calls through __reduce__, at every place
    "a call in the place of the state": lambda: saved(Reduced()),
    "a call in the place of a tensor": lambda: saved(in_ordered_dict(Reduced())),
    "a call in a nested dict": lambda: saved({"cfg": {"a": [{"b": (Reduced(),)}]}, "state_dict": state()}),
    "a call as the config": lambda: saved({"cfg": Reduced(), "state_dict": state()}),
    "a call as a key": lambda: saved(state() | {Reduced(str, ("x",)): 1}),
    "a call in the arguments of a call": lambda: saved(Reduced(ran, (Reduced(),))),
    "a call in the state of an object": lambda: saved({"cfg": Reduced(Reduced, (), {"a": Reduced()})}),
    "a call that makes a list's items": lambda: saved(Reduced(list, (), None, iter([Reduced()]))),
    "a call in a legacy stream": lambda: saved(in_ordered_dict(Reduced()), legacy=True),
    "a call in a plain pickle": lambda: pickled({"cfg": 1, "state_dict": Reduced()}),
    "a call in a pickle of protocol 2": lambda: pickled(Reduced(), 2),
    "a call in a gzip file": lambda: gzip.compress(pickled({"state_dict": Reduced()})),
    "a call in a torch file in a gzip file": lambda: gzip.compress(saved(Reduced())),
    "a call behind saev's line": lambda: saev(b'{"schema": 2}', saved(in_ordered_dict(Reduced()))),
    "a call in a stream in a pickle": lambda: pickled(
        Reduced(torch.storage._load_from_bytes, (saved(Reduced(), legacy=True),))
    ),
    "os.system": lambda: opcode(SYSTEM + b"(" + SHELL + b"tR."),
    "os.system by INST": lambda: opcode(b"(" + SHELL + b"ios\nsystem\n."),
    "os.system by OBJ": lambda: opcode(b"(" + SYSTEM + SHELL + b"o."),
    "os.system by its name on the stack": lambda: opcode(
        b"\x8c\x02os\x8c\x06system\x93(" + SHELL + b"tR."
    ),
    "builtins.eval": lambda: opcode(b"cbuiltins\neval\n(X\x03\x00\x00\x001+1tR."),
    "getattr of torch": lambda: opcode(b"cbuiltins\ngetattr\n(ctorch\nload\nX\x04\x00\x00\x00loadtR."),
    "torch.load": lambda: opcode(b"ctorch\nload\n(X\x01\x00\x00\x00xtR."),
    "a dotted name": lambda: opcode(b"\x8c\x05torch\x8c\x0aos.system.x\x93)R."),
    "a registered extension": lambda: opcode(b"\x82\x01."),
    "state for a function": lambda: opcode(SYSTEM + b"}b)R."),
    "a call of a dict": lambda: opcode(b"})R."),
    "a stream of streams": lambda: pickled(tower(6)),
    # size
    "a zip bomb": zip_bomb,
    "a zip file that lies about its sizes": lying_zip,
    "a gzip bomb": gzip_bomb,
    "gzip in gzip in gzip": gzip_tower,
    "a memo of a billion entries": lambda: opcode(b"Nr" + struct.pack("<I", 2**31) + b"j\x07\x00\x00\x00."),
    "bytes that are not there": lambda: opcode(b"\x8e" + struct.pack("<Q", 2**40) + b"x."),
    "a text that is not there": lambda: opcode(b"\x8d" + struct.pack("<Q", 2**40) + b"x."),
    "a huge integer": lambda: opcode(b"\x8b" + struct.pack("<i", 1 << 20) + bytes(1 << 20) + b"."),
    "a text that doubles": lambda: opcode(doubling()),
    "a dict that is copied again and again": lambda: opcode(copying()),
    "lists nested 100,000 deep": lambda: opcode(b"]" * 100_000 + b"a" * 99_999 + b"."),
    "a million steps": lambda: opcode(b"N0" * 500_000 + b"N."),
    "a shape of 10^12": lambda: torch_zip(tensor_pickle(size=(2**20, 2**20), stride=(0, 0)), **{"0": bytes(96)}),
    "a shape beyond the storage": lambda: torch_zip(tensor_pickle(size=(400, 600)), **{"0": bytes(96)}),
    "a negative stride": lambda: torch_zip(tensor_pickle(stride=(-6, 1)), **{"0": bytes(96)}),
    "a negative offset": lambda: torch_zip(tensor_pickle(offset=-2), **{"0": bytes(96)}),
    "a storage larger than its member": lambda: torch_zip(tensor_pickle(numel=2**40), **{"0": bytes(96)}),
    "a storage that is missing": lambda: torch_zip(tensor_pickle(key=b"7"), **{"0": bytes(96)}),
    "a storage outside of the folder": lambda: torch_zip(
        tensor_pickle(key=b"7").replace(b"X\x01\x00\x00\x007", b"X\x09\x00\x00\x00../../etc"), **{"0": bytes(96)}
    ),
    "ten thousand members": lambda: zipped({f"a/{i}": b"" for i in range(10_001)} | {"a/data.pkl": b"\x80\x02N."}),
    "a zip file of something else": lambda: zipped({"../../etc/passwd": b"x"}),
    "an npz file of objects": object_array,
    "an array of 10^15 bytes": lambda: npz(
        w_enc=npy("{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999999,)}")
    ),
    "an array with a call in its header": lambda: npz(
        w_enc=npy("{'descr': __import__('os').system('x'), 'shape': ()}")
    ),
    "a safetensors header of 10^18 bytes": lambda: struct.pack("<Q", 10**18) + b"{}",
    "safetensors beyond the file": lambda: safetensors(
        {"W_enc": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}
    ),
    "safetensors that overlap": lambda: safetensors(
        {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in ("W_enc", "W_dec")}, bytes(8)
    ),
    "safetensors with a header nested deeply": lambda: safetensors(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "a JSON line nested deeply": lambda: saev(b'{"a":' * 50_000 + b"1" + b"}" * 50_000, saved(state())),
}  # fmt: skip


def tower(depth):
    value = Reduced()
    for _ in range(depth):
        value = Reduced(torch.storage._load_from_bytes, (pickled(value),))
    return value


def doubling():
    """PurePosixPath(s, s) of its own result, sixty times."""
    body = b"cpathlib\nPurePosixPath\nq\x00X\x08\x00\x00\x00abcdefghq\x01"
    for _ in range(60):
        body += b"0h\x00(h\x01h\x01tRq\x01"
    return body + b"."


def copying():
    """dict(pairs) of ten thousand pairs, ten thousand times."""
    body = b"ccollections\nOrderedDict\nq\x00]q\x01(" + b"K\x01K\x02\x86" * 10_000 + b"eq\x010"
    return body + b"h\x00(h\x01tR0" * 10_000 + b"N."


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path, name):
    content = HOSTILE[name]()
    file = tmp_path / "weights.pt"
    file.write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(ValueError, match="weights.pt|expected an SAE") as caught:
        fastfg.load_saes(file, layers=[1])
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not RAN
    assert not os.path.exists("/tmp/fastfg-xx")  # noqa: PTH110
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert seconds < SECONDS
    assert peak < MEMORY + 4 * len(content)


def test_there_are_many_hostile_files():
    assert len(HOSTILE) >= 40


def test_the_hostile_calls_do_run_elsewhere():
    """The pickles above are not harmless by mistake."""
    try:
        pickle.loads(pickled(Reduced()))
        assert RAN
    finally:
        RAN.clear()


def read_everything(file):
    weights = open_weights(file)
    content = weights.content.get("state_dict", weights.content)
    return {name: load(stored, file) for name, stored in content.items()}


def attempt(file):
    """The values of a file, or None and the reason why it is refused. Only ValueErrors that name it are expected."""
    try:
        contents = Contents(open_weights(file))
        inner = "state_dict" if "state_dict" in contents.keys else None
        return contents.pick(contents.mapping(inner), state()), None
    except ValueError as error:
        return None, str(error)


def good_files():
    arrays = {name: tensor.numpy() for name, tensor in state().items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    from safetensors.torch import save

    return {
        "torch zip": saved(state()),
        "legacy stream": saved(state(), legacy=True),
        "plain pickle": pickled({"cfg": {}, "state_dict": state()}),
        "gzip": gzip.compress(pickled({"cfg": {}, "state_dict": state()})),
        "saev": saev(b'{"schema": 2}', saved(state())),
        "npz": buffer.getvalue(),
        "safetensors": save(state()),
    }


@pytest.mark.parametrize("name", good_files())
def test_truncated_at_every_tenth_byte(tmp_path, name):
    """A shorter file is refused, or has all its values (the last bytes of a file may be padding)."""
    content, file = good_files()[name], tmp_path / "weights.pt"
    file.write_bytes(content)
    whole = read_everything(file)
    assert all(torch.equal(whole[key], value) for key, value in state().items())
    for length in range(0, len(content), 10):
        file.write_bytes(content[:length])
        values, reason = attempt(file)
        if values is None:
            assert str(file) in reason
            continue
        assert all(torch.equal(values[key], value) for key, value in state().items())
        assert length > 0.9 * len(content)


@pytest.mark.parametrize("name", ["torch zip", "legacy stream", "plain pickle"])
def test_files_with_flipped_bytes(tmp_path, name):
    """A changed file is refused with a ValueError, or read; nothing else is raised."""
    content, file = good_files()[name], tmp_path / "weights.pt"
    for position in range(0, len(content), 7):
        changed = bytearray(content)
        changed[position] ^= 0xFF
        file.write_bytes(changed)
        _, reason = attempt(file)
        assert reason is None or str(file) in reason


def test_configs_are_no_paths(tmp_path):
    """A path in a config is never followed."""
    torch.save(state(), tmp_path / "weights.pt")
    for field in ("hook_point", "layer_subtype", "activation_fn_str", "normalize_activations", "hook_point_layer"):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | {field: "../../../../etc/passwd"}))
        with pytest.raises(ValueError, match="config.json"):
            fastfg.load_saes(tmp_path)


def test_what_is_no_file_is_not_opened(tmp_path):
    """A pipe would block for ever."""
    os.mkfifo(tmp_path / "weights.pt")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ValueError, match="or the files of one SAE .*Prisma: .*, got config.json, weights.pt"):
        fastfg.load_saes(tmp_path)
    with pytest.raises(ValueError, match="something that is no file"):
        fastfg.load_saes(tmp_path / "weights.pt")


def test_reading_imports_nothing(tmp_path):
    """The classes that a pickle names are not imported, not even the modules that exist."""
    hostile = b"\x80\x04}(X\x03\x00\x00\x00cfgcantigravity\nFly\n)\x81X\x0a\x00\x00\x00state_dict}u."
    (tmp_path / "a.pt").write_bytes(hostile)
    code = (
        "import sys; from pathlib import Path; from fastfg.sae.files import open_weights; "
        f"record = open_weights(Path({str(tmp_path / 'a.pt')!r})).content['cfg']; "
        "print(record.name, 'antigravity' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["antigravity.Fly", "False"]
