"""Write small files in each format, as its own library does, and the codes and reconstructions that it would give."""

from __future__ import annotations

import gzip
import json
import pickle
import sys
import types

import torch
from safetensors.torch import save_file

D, F, K = 16, 40, 5


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def rounded(values, step):
    """Multiples of ``step``: sums of their products are exact in any order, and so are ties and thresholds."""
    return (values / step).round() * step


COMMON = rounded(
    0.5 * draw(D, 1, seed=7), 1 / 32
)  # what all columns of the encoder share: a token against it activates none


def weights(dtype=torch.float64):
    """``W_enc``, ``b_enc``, ``W_dec`` and ``b_dec`` in which features 3 and 4 are the same, so that they tie."""
    W_enc, b_enc = rounded(draw(D, F, seed=1) / D**0.5, 1 / 32) + COMMON, rounded(0.1 * draw(F, seed=2), 1 / 32)
    W_enc[:, 4], b_enc[4] = W_enc[:, 3], b_enc[3]
    named = {
        "W_enc": W_enc,
        "b_enc": b_enc,
        "W_dec": draw(F, D, seed=3),
        "b_dec": rounded(0.2 * draw(D, seed=4), 1 / 8),
    }
    return {name: tensor.to(dtype) for name, tensor in named.items()}


def tokens(w, subtract=True):
    """Tokens [T, D]: random ones, a zero token, a large one, and one without a positive pre-activation."""
    x = rounded(draw(9, D, seed=5), 1 / 8)
    x[1] = 0
    x[2] *= 16
    x[3] = (w["b_dec"] if subtract else 0) - 16 * COMMON[:, 0]
    assert (x[3].double() @ w["W_enc"].double()).max() < -1
    return x.to(w["W_enc"].dtype)


def layer_norm(x):
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    return (x - mean) / (std + 1e-5), std, mean


def topk(z, k, by=None):
    """The k largest of each row, one row and one feature at a time; of equals, the one with the lowest index."""
    rank = z if by is None else by
    out = torch.zeros_like(z)
    for t in range(len(z)):
        order = sorted(range(z.shape[1]), key=lambda i, t=t: (-float(rank[t, i]), i))
        for i in order[:k]:
            out[t, i] = z[t, i]
    return out


def above(z, threshold, strict=True):
    z = z.clone()
    z[(z <= threshold) if strict else (z < threshold)] = 0
    return z


def write_json(folder, name, value):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value))


def save_safetensors(folder, name, state):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous().clone() for key, value in state.items()}, folder / name)


def save_torch(folder, name, value, **options):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(value, folder / name, **options)


def save_saev(folder, header, state):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "sae.pt").open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        torch.save(state, file)


def pickled_config(module, name, fields):
    """An object of a class that only the writer of a file has; ``forget`` it after the file is written."""
    cls = type(name, (), {"__module__": module})
    for parent in (module.split(".")[0], module):
        sys.modules.setdefault(parent, types.ModuleType(parent))
    setattr(sys.modules[module], name, cls)
    config = cls()
    config.__dict__.update(fields)
    return config


def forget(config):
    module = type(config).__module__
    for name in (module, module.split(".")[0]):
        if getattr(sys.modules.get(name), "__file__", None) is None:
            sys.modules.pop(name, None)


def dump(file, value, packed):
    data = pickle.dumps(value)
    file.write_bytes(gzip.compress(data) if packed else data)
