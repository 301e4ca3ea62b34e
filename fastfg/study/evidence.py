"""Where the scores of patches come from: contributions per patch, what features respond to, and features taken out.

The functions are used in this order: :func:`patch_evidence` for the images that are shown,
:func:`strongest_features` and :func:`fastfg.study.feature_evidence.feature_evidence` for the features that occur in
them, over many images, and :func:`ablate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastfg.attribution.attribute import attribute
from fastfg.attribution.patch_scores import z_score
from fastfg.attribution.residuals import residuals
from fastfg.checks import check_saes
from fastfg.models import Adapter, adapt
from fastfg.models.adapter import resid_post
from fastfg.report.contents import COLUMNS, PatchEvidence
from fastfg.sae.model import SparseAutoencoder
from fastfg.targets import Target
from fastfg.types import Gate

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray[Any, Any]
SAEs = Mapping[int, SparseAutoencoder]
LARGEST_BATCH = 16  # copies of an image that run at once, each without one feature


@dataclass(frozen=True)
class Terms:
    """All terms of the scores of one image at one block, as arrays.

    Attributes:
        features, values: [P, K], every active feature of each patch and its contribution; -1 and 0 where there are
            fewer. The order is by size.
        scale: [P], what turns a contribution into a change of the residual stream's ``g . x``.
        evidence: what the report shows of it.
    """

    features: Array
    values: Array
    scale: Array
    evidence: PatchEvidence


class ImageTerms(NamedTuple):
    """One image: its class, the logit of this class, and {block: Terms}."""

    target: int
    logit: float
    blocks: dict[int, Terms]


def patch_evidence(
    model: nn.Module | Adapter,
    images: Tensor,
    gate: Gate,
    saes: SAEs,
    *,
    target: int | Sequence[int] | Tensor | None = None,
    n: int = 8,
) -> list[ImageTerms]:
    """Where the scores of each patch come from, at each block of ``gate``: one entry per image.

    Args:
        model, images, saes, target: as in :func:`fastfg.attribute`; the target is a class.
        gate: a gate with ``combined`` scores, without a shuffled decoder, permuted patches or a blur.
        n: the contributions to show per patch. The others are one number, their sum.

    Raises ValueError for another gate.

    >>> import torch, fastfg
    >>> model = fastfg.models.timm.import_timm().create_model("vit_tiny_patch16_224", img_size=32, num_classes=5).eval()
    >>> W_dec = torch.nn.functional.normalize(torch.randn(64, 192), dim=1)
    >>> sae = fastfg.SparseAutoencoder(W_dec.T, torch.zeros(64), W_dec, torch.zeros(192), k=8)
    >>> (found,) = patch_evidence(model, torch.randn(1, 3, 32, 32), fastfg.Gate((1,)), {1: sae}, n=3)
    >>> one = found.blocks[1].evidence
    >>> bool(abs(one.contributions.sum(1) + one.remaining - one.scores).max() < 1e-5)
    True
    """
    if gate.score != "combined" or gate.shuffle_seed is not None or gate.permute_seed is not None or gate.blurred:
        raise ValueError(f"gate: expected one with combined scores and without a control, got {gate}")
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    adapter = adapt(model)
    check_saes(saes, gate.layers, adapter.parameter.device)
    streams = residuals(adapter, images, gate.layers)
    most = max(_most_active(saes[block], x) for block, x in streams.items())
    plain = replace(gate, rescale=False)
    kinds = [gate, *(replace(plain, score=score) for score in ("gradient_x_residual", "sae_error"))]
    found = attribute(adapter, images, saes=saes, gate=kinds, target=target, features=most)
    logits = Target(found.target).of(found.logits).value(found.logits, len(images))
    parts = [
        {block: _terms(found, saes[block], block, streams[block], i, n, gate.rescale) for block in gate.layers}
        for i in range(len(images))
    ]
    return [ImageTerms(int(found.target[i]), float(logits[i]), blocks) for i, blocks in enumerate(parts)]


def _most_active(sae: SparseAutoencoder, x: Tensor) -> int:
    """The largest number of active features of any patch."""
    if sae.k is not None:
        return sae.k
    return max(max(int((sae.encode(one) != 0).sum(-1).max()) for one in x), 1)


def _terms(found: Any, sae: SparseAutoencoder, block: int, x: Tensor, i: int, n: int, rescale: bool) -> Terms:
    scale = sae.normalize(x[i]).scale.expand(len(x[i]), 1)[:, 0]
    scores, g_dot_x, error = (_array(found.scores[block][c, i]) for c in range(3))
    features = found.features[block].indices[0, i].cpu().numpy()
    values = _array(found.features[block].values[0, i]) * (_array(scale)[:, None] if rescale else 1)
    evidence = PatchEvidence(
        features=features[:, :n],
        contributions=values[:, :n],
        remaining=scores - values[:, :n].sum(1),
        active=(features >= 0).sum(1),
        scores=scores,
        z=_z(scores),
        gates=_array(found.gates[block][0, i]),
        sae_error=error,
        bias=g_dot_x - scores - error,
        g_dot_x=g_dot_x,
    )
    return Terms(features, values, np.ones(len(scores)) if rescale else _array(scale), evidence)


def _array(t: Tensor) -> Array:
    return t.detach().double().cpu().numpy()


def _z(scores: Array) -> Array:
    """Eq. 4 for scores [P] in float64."""
    z: Array = z_score(torch.from_numpy(scores)).numpy()
    return z


def strongest_features(found: Iterable[ImageTerms], most: int) -> dict[int, list[int]]:
    """{block: features} of the ``most`` features whose shown contributions to the images are largest, in total."""
    totals: dict[tuple[int, int], float] = {}
    for image in found:
        for block, terms in image.blocks.items():
            one = terms.evidence
            for feature, value in zip(one.features.ravel().tolist(), np.abs(one.contributions).ravel(), strict=True):
                if feature >= 0:
                    totals[block, feature] = totals.get((block, feature), 0.0) + float(value)
    best = sorted(totals, key=lambda name: (-totals[name], name))[:most]
    chosen: dict[int, list[int]] = {}
    for block, feature in sorted(best):
        chosen.setdefault(block, []).append(feature)
    return chosen


# Features taken out -------------------------------------------------------------------------------------------------


def ablate(
    model: nn.Module | Adapter,
    images: Tensor,
    keys: Sequence[str],
    found: Sequence[ImageTerms],
    gate: Gate,
    saes: SAEs,
    *,
    per_block: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """Take single features out of images, and compare what happens with what their contributions predict.

    The ``per_block`` features with the largest total contribution to an image are taken out one at a time: the
    feature's part of the reconstruction is subtracted from the residual stream of the block at every patch, and the
    model runs on. One row per image, block and feature:

    - ``predicted_logit``: minus the sum of the contributions, at the scale of the residual stream (first order),
    - ``predicted_gate``: the change of the gate at ``patch``, where the feature contributes most, when its
      contributions are left out of the scores and nothing else changes,
    - ``actual_logit``, ``actual_gate``: of the run. The SAE then encodes other tokens, and all gradients are new.

    Args:
        images: [B, C, H, W]. keys: their names. found: :func:`patch_evidence` of them. gate, saes: as for it.
        progress: called with (images done, images).
    """
    import pandas as pd

    adapter, rows = adapt(model), []
    for i, (key, image) in enumerate(zip(keys, found, strict=True)):
        streams = residuals(adapter, images[i : i + 1], list(image.blocks))
        for block, terms in image.blocks.items():
            chosen, one = _largest(terms, per_block), replace(gate, layers=(block,))  # other gates change nothing here
            parts = _parts_of(saes[block], streams[block][0], chosen)
            for first in range(0, len(chosen), LARGEST_BATCH):
                part, removed = chosen[first : first + LARGEST_BATCH], parts[first : first + LARGEST_BATCH]
                many = images[i : i + 1].expand(len(part), -1, -1, -1)
                with _subtracted(adapter, block, removed):
                    run = attribute(adapter, many, saes=saes, gate=one, target=image.target)
                logits = Target(run.target).of(run.logits).value(run.logits, len(part))
                for j, feature in enumerate(part):
                    row = _predicted(terms, feature, gate)
                    row |= {"image": key, "block": block, "feature": feature}
                    row["actual_gate"] = float(run.gates[block][j, row["patch"]]) - row["gate"]
                    row["actual_logit"] = float(logits[j]) - image.logit
                    rows.append(row)
        if progress is not None:
            progress(i + 1, len(found))
    return pd.DataFrame(rows, columns=list(COLUMNS["ablations"]))


def _largest(terms: Terms, n: int) -> list[int]:
    """The features with the largest total contribution to an image, by absolute value per patch."""
    there = terms.features >= 0
    features, where = np.unique(terms.features[there], return_inverse=True)
    totals = np.bincount(where, weights=np.abs(terms.values[there]), minlength=len(features))
    return [int(features[k]) for k in np.lexsort((features, -totals))[:n]]


def _parts_of(sae: SparseAutoencoder, x: Tensor, features: Sequence[int]) -> Tensor:
    """What each feature adds to the reconstruction of tokens ``x`` [P, d], at the scale of the residual stream."""
    codes, scale = sae.encode(x), sae.normalize(x).scale
    return torch.stack([(codes[:, k : k + 1] * sae.W_dec[k] * scale).to(x.dtype) for k in features])


def _predicted(terms: Terms, feature: int, gate: Gate) -> dict[str, Any]:
    own = np.where(terms.features == feature, terms.values, 0.0).sum(1)
    patch, one = int(np.abs(own).argmax()), terms.evidence
    changed = float(gate.c_max ** np.tanh(gate.kappa * _z(one.scores - own)[patch]))
    now = float(one.gates[patch])
    return {
        "patch": patch,
        "gate": now,
        "predicted_gate": changed - now,
        "predicted_logit": -float((own * terms.scale).sum()),
    }


@contextmanager
def _subtracted(adapter: Adapter, block: int, removed: Tensor) -> Iterator[None]:
    """Inside, ``removed`` [B, P, d] is subtracted from the patches of a block's output."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        x = resid_post(output)
        prefix = x.new_zeros(len(removed), adapter.num_prefix_tokens, x.shape[-1])
        changed = x - torch.cat([prefix, removed], 1)
        return changed if isinstance(output, Tensor) else type(output)([changed, *output[1:]])

    with ExitStack() as stack:
        stack.callback(adapter.blocks[block].register_forward_hook(hook).remove)
        yield
