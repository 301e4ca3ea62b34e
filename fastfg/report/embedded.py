"""The data of the gallery, as the page's script reads it: pictures as WebP, numbers as little-endian arrays in base64.

Contributions are whole multiples of one quantum per image and block, so that their sums are exact: the parts of a
patch's score add up to its score, digit for digit.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastfg.report.contents import Array, Crop, FeatureEvidence, ImageEntry, PatchEvidence
from fastfg.report.names import Names

if TYPE_CHECKING:
    import pandas as pd

LARGEST = 2**28  # of a number of quanta: sums of several stay within 32 bits
TOLERANCE = 1e-5  # of the parts of a score, relative to the sum of their sizes: float32
LEVELS = 65535  # of a map
SIDES = ((100, 288, 82), (400, 224, 75), (2000, 160, 65), (math.inf, 96, 55))  # up to n images: pixels, quality


def gallery(names: Names) -> dict[str, Any]:
    """Everything that the script needs: images, scores, features, names. It can be written as JSON."""
    contents = names.contents
    side, quality = next((side, quality) for most, side, quality in SIDES if len(contents.images) <= most)
    judged = [name for name in names.variants if names.variants[name].role != "seed"]
    shown = [name for name in names.variants if any(name in image.maps for image in contents.images)] or judged
    table = _scores(names, shown)
    return {
        "images": [_image(image, shown, side, quality) for image in contents.images],
        "variants": [{"name": name, "role": names.variants[name].role} for name in shown],
        "metrics": [
            {"name": metric, "title": names.title(metric), "higher": names.higher_is_better(metric)}
            for metric in names.metrics
        ],
        "scores": table,
        "pair": list(names.pair or ()),
        "evidence_of": contents.evidence_of,
        "features": {f"{block}/{feature}": _feature(one) for (block, feature), one in contents.features.items()},
        "ablations": _ablations(contents.ablations),
        "colours": colour_tables(),
    }


def _scores(names: Names, shown: Sequence[str]) -> list[list[list[float | None]]]:
    """Scores [image][variant][metric]; None where there is none. An image counts once by its key."""
    contents = names.contents
    kept = contents.scores.loc[contents.scores["variant"].isin(shown)]
    kept = kept.drop_duplicates([contents.key, "variant"]).set_index([contents.key, "variant"])[names.metrics]
    found = dict(zip(kept.index, kept.to_numpy(float), strict=True))
    nothing = np.full(len(names.metrics), np.nan)
    return [
        [[_number(value) for value in found.get((image.key, name), nothing)] for name in shown]
        for image in contents.images
    ]


def _image(image: ImageEntry, shown: Sequence[str], side: int, quality: int) -> dict[str, Any]:
    grids = [one.shape for one in image.maps.values()]
    return {
        "key": image.key,
        "name": image.name,
        "picture": picture_url(image.picture, side, quality),
        "size": [image.picture.shape[1], image.picture.shape[0]],
        "grid": list(grids[0]) if grids else [],
        "maps": [_map(image.maps[name]) if name in image.maps else None for name in shown],
        **{name: getattr(image, name) for name in ("label", "predicted", "explained", "group", "path")},
        "probability": _number(image.probability),
        "evidence": {str(block): _evidence(one, image.key, block) for block, one in sorted(image.evidence.items())},
    }


def _map(values: Array) -> dict[str, Any] | None:
    """A map between its smallest and its largest value; None if it can't be shown, as it is not finite."""
    if not np.isfinite(values).all():
        return None
    low, high = float(values.min()), float(values.max())
    scaled = np.zeros(values.shape) if low == high else (values.astype(float) - low) / (high - low)
    return {"low": low, "high": high, "values": packed(np.rint(scaled * LEVELS), "<u2")}


def _evidence(one: PatchEvidence, key: str, block: int) -> dict[str, Any]:
    """The parts of the scores in whole quanta. Raises ValueError for parts that do not add up to the scores."""
    parts = [np.asarray(one.contributions, float), *(np.asarray(p, float)[:, None] for p in (one.remaining,))]
    size = sum(np.abs(part).sum(1) for part in parts) + np.abs(one.scores)
    off = np.abs(sum(part.sum(1) for part in parts) - one.scores)
    beyond = np.abs(one.scores + one.bias + one.sae_error - one.g_dot_x)
    wide = size + np.abs(one.bias) + np.abs(one.sae_error) + np.abs(one.g_dot_x)
    if not (off <= TOLERANCE * size).all() or not (beyond <= TOLERANCE * wide).all():
        raise ValueError(
            f"evidence: expected parts that add up to the scores, got others at block {block} of image {key!r}"
        )
    largest = max(float(np.abs(part).max(initial=0)) for part in (*parts, one.scores, one.g_dot_x, one.sae_error))
    quantum = 2.0 ** (math.frexp(largest)[1] - math.frexp(LARGEST)[1] + 1) if largest else 1.0
    contributions, scores, error, g_dot_x = (
        np.rint(np.asarray(values, float) / quantum).astype(np.int64)
        for values in (one.contributions, one.scores, one.sae_error, one.g_dot_x)
    )
    return {
        "n": one.features.shape[1],
        "quantum": quantum,
        "features": packed(one.features, "<i4"),
        "contributions": packed(contributions, "<i4"),
        "remaining": packed(scores - contributions.sum(1), "<i4"),
        "active": packed(one.active, "<i4"),
        "scores": packed(scores, "<i4"),
        "error": packed(error, "<i4"),
        "bias": packed(g_dot_x - scores - error, "<i4"),
        "total": packed(g_dot_x, "<i4"),
        "z": packed(one.z, "<f4"),
        "gates": packed(one.gates, "<f4"),
    }


def _feature(one: FeatureEvidence) -> dict[str, Any]:
    return {
        "density": one.density,
        "patches": one.n_patches,
        "images": one.n_images,
        "counts": [int(count) for count in one.counts],
        "edges": [float(edge) for edge in one.edges],
        "lift": [[name, _number(value)] for name, value in one.lift.items()],
        "crops": [_crop(crop) for crop in one.crops],
    }


def _crop(crop: Crop) -> dict[str, Any]:
    height, width = crop.picture.shape[:2]
    return {
        "picture": picture_url(crop.picture, 96, 70),
        "size": [width, height],
        "box": list(crop.box),
        "key": crop.key,
        "name": crop.name or crop.key,
        "label": crop.label,
        "activation": float(crop.activation),
    }


def _ablations(table: pd.DataFrame | None) -> list[dict[str, Any]]:
    if table is None:
        return []
    columns = ("patch", "gate", "predicted_gate", "actual_gate", "predicted_logit", "actual_logit")
    return [
        {"image": str(row["image"]), "block": int(row["block"]), "feature": int(row["feature"])}
        | {name: _number(row[name]) for name in columns}
        for row in table.to_dict("records")
    ]


def colour_tables() -> Mapping[str, str]:
    """256 colours (RGB) of the heatmaps, of the differences and of the gates, in base64."""
    import matplotlib

    tables = {"heat": "inferno", "difference": "RdBu_r"}
    return {
        name: packed(np.rint(matplotlib.colormaps[of](np.arange(256))[:, :3] * 255), "<u1")
        for name, of in tables.items()
    }


def picture_url(picture: Array, side: int, quality: int) -> str:
    """``picture`` [H, W, 3] uint8 as the URL of a WebP file whose longer side has at most ``side`` pixels."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(picture))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=quality, method=4)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def packed(values: Array, dtype: str) -> str:
    """``values`` as little-endian numbers in base64, in reading order."""
    return base64.b64encode(np.ascontiguousarray(values).astype(dtype).tobytes()).decode()


def _number(value: Any) -> float | None:
    """A float for JSON, which has no NaN: None."""
    return None if value is None or not math.isfinite(value) else float(value)
