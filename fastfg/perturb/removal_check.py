"""Check that a model can lose tokens, before anything is scored with ``baseline="removed"``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastfg.models import Adapter
from fastfg.perturb.batches import CHECKED_ON_CPU, Batches, checked_size
from fastfg.perturb.masks import PatchGrid, halves, other_orders
from fastfg.perturb.precision import grown_rounding
from fastfg.perturb.removal import Removal
from fastfg.targets import Target

OTHER_ORDER = "its tokens are not in the order of the image's patches (does it mirror or turn its input?)"
TRIALS = 4  # pairs of halves
CLEARLY = 0.3  # by so much another order has to fit better: a wide stem on a small grid fits all orders loosely


def check_removal(adapter: Adapter, grid: PatchGrid, images: Tensor, target: Target) -> bool:
    """Raise ValueError where tokens of ``images`` [B, C, H, W] can't leave the sequence.

    For every image, the model must give the same with no patch removed as it gives for the image itself. For the first
    ones, a batch with patches removed must agree with one image at a time. The order of the kept tokens must not
    matter: it does where a block knows a token's position by its place in the sequence (windows, convolutions, relative
    positions). And each token must be that of its patch: a model may mirror its input.

    Returns whether the model has an output with all patches removed.
    """
    path = Removal(adapter, all_rows=target.may_read_patches)

    def work(rows: slice) -> None:
        some = images[rows]
        whole = target.source(path.whole(some.clone()), len(some))
        prepared = path.prepare(some.clone(), [])
        nothing = torch.zeros(len(some), path.n_patches, dtype=torch.bool, device=some.device)
        of = torch.arange(len(some), device=some.device)
        found = target.source(path.run(path.inputs(prepared, of, nothing)), len(some))
        size = float(whole.double().abs().max())
        _same(found, whole, size, "with no patch removed its tokens give another output than the image")
        if rows.start == 0:
            _check_order(path, grid, some[:1])
            _check_kept(path, prepared, some[:CHECKED_ON_CPU], target, size)

    try:
        Batches(checked_size(images.device, path.n_patches)).run(len(images), work)
        return path.reads_prefix_alone(images[:1])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"baseline: expected a fill for this model, got 'removed': {error}") from error


def _check_order(path: Removal, grid: PatchGrid, image: Tensor) -> None:
    """Replace half of the patches of ``image`` [1, C, H, W] by noise, several times: their tokens must change.

    The stem may mix neighbours, so others may change too, and by how much tells whose tokens they are. Refused is what
    fits the patches of a mirrored, turned or transposed grid clearly better.
    """
    if path.n_patches != grid.n_patches:
        raise ValueError(f"it has {path.n_patches} tokens beside its prefix, in place of one for each patch")
    random = torch.Generator(device="cpu").manual_seed(0)
    low, high = float(image.min()) - 1, float(image.max()) + 1  # no patch of the image is all noise of this range
    tokens, orders = path.stream(image.clone())[0, -grid.n_patches :], other_orders(grid.gh, grid.gw)
    fit = torch.zeros(1 + len(orders), dtype=torch.float64, device="cpu")
    masks = torch.cat([halves(grid.n_patches, seed) for seed in range(TRIALS)])
    for mask in masks:
        noise = low + (high - low) * torch.rand(image.shape, generator=random, dtype=torch.float64, device="cpu")
        replaced = torch.where(grid.to_pixels(mask).to(image.device), noise.to(image), image)
        changed = path.stream(replaced)[0, -grid.n_patches :]
        if not bool((changed != tokens).any(-1).cpu()[mask].all()):
            raise ValueError(OTHER_ORDER)
        change = (changed.double() - tokens.double()).norm(dim=-1).cpu()
        fit += torch.stack([_correlation(change, mask), *(_correlation(change, mask[order]) for order in orders)])
    if bool(((fit[1:] - fit[0]) / len(masks) > CLEARLY).any()):
        raise ValueError(OTHER_ORDER)


def _correlation(change: Tensor, mask: Tensor) -> Tensor:
    """The correlation of ``change`` [P] with being in ``mask``."""
    both = torch.stack([change, mask.double()])
    both = both - both.mean(1, keepdim=True)
    return both.prod(0).sum() / both.square().sum(1).prod().sqrt().clamp(min=1e-30)


def _check_kept(path: Removal, prepared: list[Tensor], images: Tensor, target: Target, size: float) -> None:
    """Compare a batch of ``images`` that lose patches with one image at a time, and with tokens in another order.

    ``size``: how large outputs of the model are.
    """
    P, n = path.n_patches, len(images)
    random = torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(P, generator=random) for _ in range(n)]).to(images.device)
    kept = orders[:, : max(1, P // 2)]
    masks = torch.ones(n, P, dtype=torch.bool, device=images.device).scatter_(1, kept, False)
    of = torch.arange(n, device=images.device)
    batch = target.source(path.run(path.inputs(prepared, of, masks)), n)
    one = target.for_one_image()
    for i in range(n):
        ordered, shuffled = (one.source(path.one(images[i : i + 1], k), 1) for k in (kept[i].sort().values, kept[i]))
        _same(shuffled, ordered, size, "a token's place in the sequence changes its output")
        _same(batch[i : i + 1], ordered, size, "a batch of images that lose tokens differs from one image at a time")


def _same(found: Tensor, expected: Tensor, size: float, otherwise: str) -> None:
    """Raise ValueError where the outputs differ by more than rounding.

    Rounding grows with the ``size`` of the model's outputs, or of these if they are larger. That of one image alone is
    no measure: all its logits may be near 0, as those of two classes are where the model can't tell them apart.
    """
    largest = max(size, float(expected.double().abs().max()), 1e-30)
    error = float((found.double() - expected.double()).abs().max()) / largest
    if not error <= grown_rounding(expected.dtype):
        raise ValueError(f"{otherwise}, by {error:.1e}")
