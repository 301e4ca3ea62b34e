"""Turn the results of the everyday commands, a folder with ``scores.parquet``, into what a report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastfg.files import read_json
from fastfg.metrics import METRICS
from fastfg.report.contents import Array, Contents, ImageEntry, Variant
from fastfg.report.table import differences
from fastfg.report.versions import versions
from fastfg.study.answer import answer, undecided
from fastfg.study.paired import paired
from fastfg.study.statistics import summarize

if TYPE_CHECKING:
    import pandas as pd

SCORES, MAPS, MARKER, CONFIG = "scores.parquet", "attributions.csv", "fastfg.json", "config.json"
ERRORS = ("score_errors.csv", "errors.csv")
PICTURES = "Pictures: the map that fastfg attribute wrote, over the image as the model sees it."
ABOUT = {
    "vanilla": "TransMM (Chefer et al. 2021), without a gate.",
    "gated": "Feature-Gradient Attribution with the gate of the settings.",
    "random": "Uniform noise.",
    "centre": "A Gaussian in the middle of the image.",
    "edges": "The magnitude of the picture's edges.",
}
METHOD, CONTROLS = "gated", ("random", "centre", "edges")


def folder_contents(
    folder: str | Path,
    *,
    maps: str | Path | None = None,
    method: str = METHOD,
    controls: Sequence[str] | None = None,
    seed: int = 0,
) -> Contents:
    """What the report of a folder shows.

    Args:
        folder: with ``scores.parquet``, one row per image and variant, as ``fastfg evaluate`` writes it, or
            ``fastfg.compare(...).to_parquet(...)``.
        maps: a folder of ``fastfg attribute`` for the same files, whose overlays the gallery shows; None: ``folder``
            itself, if it has some.
        method: the variant that the answer is about. It is compared with ``vanilla``.
        controls: variants that the method must beat, too; None: those of ``random``, ``centre`` and ``edges`` that are
            there. Of all others, the answer says which are better than the method.
        seed: of the tests.

    Raises FileNotFoundError without ``scores.parquet``, and ValueError if it can't be read as scores, for a method or
    control that is not there, and for the folder of a demo, whose own page says more.
    """
    import pandas as pd

    folder = Path(folder)
    file, written = folder / SCORES, _written(folder)
    if written.get("command") == "demo":
        raise ValueError(f"folder: expected one of fastfg evaluate, got that of a demo, {folder}, which has its page")
    if not file.is_file():
        raise FileNotFoundError(f"folder: expected a folder with {SCORES}, as fastfg evaluate writes it, got {folder}")
    try:
        scores = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"folder: expected a table in {file}, got {error}") from None
    if "variant" not in scores or not {"image", "key"} & set(scores):
        raise ValueError(f"folder: expected the columns variant and key in {file}, got {list(scores.columns)}")
    names = list(dict.fromkeys(scores["variant"]))
    against = "vanilla" if "vanilla" in names else str(names[0])
    if controls is None:
        controls = [name for name in CONTROLS if name in names and name not in (against, method)]
    _check_roles(names, against, method, controls)
    roles = dict.fromkeys(controls, "control") | {method: "method", against: "baseline"}
    variants = [Variant(name, roles.get(name, "other"), ABOUT.get(name, "")) for name in names]
    tables = {against: paired(scores, against, seed=seed)} if len(names) > 1 else {}
    more: dict[str, pd.DataFrame] = {}
    claim = undecided(scores, differences(tables[against], against) if tables else [])
    if method in names and against == "vanilla":
        others = [one.name for one in variants if one.role == "other"]
        claim, more = answer(scores, tables[against], method, controls=controls, others=others, seed=seed)
    images = _images(folder if maps is None else Path(maps), scores)
    return Contents(
        title=f"Scores of {scores['path' if 'path' in scores else 'image'].nunique()} images",
        subtitle=f"fastfg {written.get('fastfg', '')}: {folder.resolve().name}".replace("fastfg : ", ""),
        claims=[claim],
        scores=scores,
        metrics=[name for name in scores.columns if name in METRICS] or None,
        variants=variants,
        summary=summarize(scores, against),
        paired=tables | more,
        images=images,
        settings={name.replace("_", " "): value for name, value in written.get("arguments", {}).items()},
        versions=written.get("versions") or versions(),
        command=f"fastfg {written['command']}" if "command" in written else "",
        notes=[PICTURES] if images else [],
        errors=_errors(folder),
    )


def _check_roles(names: Sequence[str], against: str, method: str, controls: Sequence[str]) -> None:
    if method not in names and method != METHOD:
        raise ValueError(f"method: expected a variant, one of {names}, got {method!r}")
    for name in controls:
        if name not in names or name in (against, method):
            known = [one for one in names if one not in (against, method)]
            raise ValueError(f"controls: expected variants among {known}, got {name!r}")
    if len(set(controls)) < len(controls):
        raise ValueError(f"controls: expected different variants, got {list(controls)}")


def _written(folder: Path) -> Mapping[str, Any]:
    """What the command wrote of itself: ``command``, ``fastfg`` (the version), ``arguments`` and ``versions``."""
    found = _object(folder / MARKER)
    arguments = found.get("settings", {})
    return {**found, "arguments": arguments, **_object(folder / CONFIG).get("evaluate", {})}


def _object(file: Path) -> Mapping[str, Any]:
    """A JSON object, empty without the file."""
    return read_json(file) if file.is_file() else {}


def _errors(folder: Path) -> pd.DataFrame | None:
    import pandas as pd

    tables = [pd.read_csv(folder / name) for name in ERRORS if (folder / name).is_file()]
    return pd.concat(tables, ignore_index=True).astype(object) if tables else None


def _images(folder: Path, scores: pd.DataFrame) -> list[ImageEntry]:
    """The images whose overlays ``fastfg attribute`` wrote to ``folder``, in the order of the scores."""
    import pandas as pd

    file = folder / MAPS
    if not file.is_file():
        return []
    table = pd.read_csv(file, dtype={"key": str, "path": str, "overlay": str})
    missing = [name for name in ("path", "key", "overlay", "target", "predicted", "probability") if name not in table]
    if missing:
        raise ValueError(f"maps: expected a table of fastfg attribute in {file}, got one without {missing}")
    there = table[table["overlay"].notna()].drop_duplicates("key")
    rows = {row["key"]: row for row in there.to_dict("records")}
    keys = dict.fromkeys(map(str, scores["key" if "key" in scores else "image"]))
    return [_entry(folder, rows[key]) for key in keys if key in rows]


def _entry(folder: Path, row: Mapping[Any, Any]) -> ImageEntry:
    from PIL import Image

    with Image.open(folder / Path(row["overlay"]).name) as overlay:  # a table can't name files elsewhere
        picture: Array = np.asarray(overlay.convert("RGB"), dtype=np.uint8)
    explained = f"class {row['target']} with probability {float(row['probability']):.3g}"
    return ImageEntry(
        row["key"], picture, {}, predicted=f"class {row['predicted']}", explained=explained, path=row["path"]
    )
