"""A small study: synthetic photographs of two classes, a tiny ViT and random SAEs."""

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from fastfg.data.manifest import write_manifest
from fastfg.data.splits import from_folder
from fastfg.models.timm import import_timm
from tests.tools import random_sae

TOML = """\
title = "Tiny"
[data]
manifest = "m.parquet"
[model]
name = "vit_tiny_patch16_224"
img_size = 64
weights = "w.safetensors"
probe = true
[saes.folders]
trained = "saes/trained"
frozen-decoder = "saes/frozen"
random = "saes/random"
[protocol]
layers = [1, 2]
layer_images = 4
kappa = [0.5, 1.0]
c_max = [10.0]
[test]
steps = 3
shuffled = 2
[run]
out = "out"
unit = 4
"""


def photographs(folder, n, size=64):
    """``n`` pictures with a bright or a dark square, in a folder per class."""
    random = np.random.default_rng(0)
    for i in range(n):
        bright = i % 2 == 0
        pixels = random.integers(90, 160, (size, size, 3))
        x, y = random.integers(0, size // 2, 2)
        pixels[y : y + size // 2, x : x + size // 2] = 250 if bright else 5
        file = folder / ("bright" if bright else "dark") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(file)


def make_study(folder, n=26):
    """Write everything that the study of ``TOML`` reads. Returns the file."""
    photographs(folder / "photos", n)
    table = from_folder(folder / "photos", validation=0.3, test=0.3).table
    write_manifest(table, folder / "m.parquet")
    torch.manual_seed(0)
    model = import_timm().create_model("vit_tiny_patch16_224", img_size=64, num_classes=0)
    save_file(model.state_dict(), folder / "w.safetensors")
    for number, kind in enumerate(("trained", "frozen", "random")):
        for layer in (1, 2):
            sae = random_sae(192, 256, "topk", k=9, seed=10 * number + layer, dtype=torch.float32)
            sae.save(folder / f"saes/{kind}/layer_{layer}")
    file = folder / "study.toml"
    file.write_text(TOML)
    return file
