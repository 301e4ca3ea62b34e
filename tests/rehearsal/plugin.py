"""``pytest -p tests.rehearsal.plugin`` installs the card before torch is imported: torch looks for one early."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import tempfile
from pathlib import Path


def compiled() -> Path:
    """The library built from ``card.cpp`` for this torch, stored in the folder ``$FASTFG_CARD`` if that is set."""
    spec, source = importlib.util.find_spec("torch"), Path(__file__).with_name("card.cpp")
    assert spec is not None and spec.origin is not None
    home, version = Path(spec.origin).parent, importlib.metadata.version("torch")
    folder = Path(os.environ.get("FASTFG_CARD") or tempfile.mkdtemp())
    kept = folder / f"card-{version}-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}.so"
    if not kept.exists():
        paths = [f"-I{home / 'include'}", f"-L{home / 'lib'}", f"-Wl,-rpath,{home / 'lib'}"]
        made = kept.with_suffix(f".{os.getpid()}")
        compiler = [os.environ.get("CXX", "c++"), "-shared", "-fPIC", "-std=c++20", "-O0"]
        subprocess.run([*compiler, *paths, str(source), "-o", str(made), "-lc10", "-ltorch_cpu"], check=True)
        made.replace(kept)
    return kept


ctypes.CDLL(str(compiled()))

import torch  # noqa: E402

from fastfg.models.timm import import_timm  # noqa: E402
from tests.rehearsal.card import insert_card  # noqa: E402

insert_card()
import_timm()
torch.set_num_threads(1)  # small work gains nothing from more threads
