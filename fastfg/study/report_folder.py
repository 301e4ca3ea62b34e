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
from fastfg.study.statistics import metric_columns, summarize

if TYPE_CHECKING:
    import pandas as pd

SCORES, MAPS, MARKER, CONFIG = "scores.parquet", "attributions.csv", "fastfg.json", "config.json"
TEXTS = ("path", "key", "overlay")  # columns of MAPS
ERRORS = ("score_errors.csv", "errors.csv")
PICTURES = "Pictures: the map that fastfg attribute wrote, over the image as the model sees it."
ABOUT = {
    "vanilla": "TransMM (Chefer et al. 2021), without a gate.",
    "gated": "Feature-Gradient Attribution with the gate of the settings.",
    "random": "Uniform noise.",
    "centre": "A Gaussian in the middle of the image.",
    "edges": "The magnitude of the picture's edges.",
}
TITLE = ("path", "image", "index")  # the first of these columns that is there says how many images there are
VANILLA, METHOD, CONTROLS = "vanilla", "gated", ("random", "centre", "edges")


def folder_contents(
    folder: str | Path,
    *,
    maps: str | Path | None = None,
    method: str | None = None,
    controls: Sequence[str] | None = None,
    seed: int = 0,
) -> Contents:
    """What the report of a folder shows.

    Args:
        folder: with ``scores.parquet``, one row per image and variant, as ``fastfg evaluate`` writes it, or
            ``fastfg.compare(...).to_parquet(...)``.
        maps: a folder of ``fastfg attribute`` for the same files, with ``attributions.csv``, whose overlays the gallery
            shows; None: ``folder`` itself, if it has some.
        method: the variant that the answer is about. It is compared with ``vanilla``. None: ``gated``, if both are
            there; without them, the answer is about no method.
        controls: variants that the method must beat, too; None: those of ``random``, ``centre`` and ``edges`` that are
            there. Of all others, the answer says which are better than the method.
        seed: of the tests.

    An image whose entry in the column ``group`` is empty (``""`` or missing) is a group by itself.

    Raises FileNotFoundError without ``scores.parquet``, and for ``maps`` without maps; ValueError for tables that can't
    be read, for a method or control that is not there, and for the folder of a demo, whose own page says more.
    """
    folder = Path(folder)
    written = _written(folder)
    if written.get("command") == "demo":
        raise ValueError(f"folder: expected one of fastfg evaluate, got that of a demo, {folder}, which has its page")
    scores = _scores(folder / SCORES)
    names = list(dict.fromkeys(scores["variant"]))
    _check_roles(names, method, controls)
    if maps is not None and not (Path(maps) / MAPS).is_file():
        raise FileNotFoundError(f"maps: expected a folder with {MAPS}, as fastfg attribute writes it, got {maps}")
    about = method or (METHOD if {METHOD, VANILLA} <= set(names) else None)
    against = VANILLA if VANILLA in names else names[0]
    if controls is None:
        controls = [name for name in CONTROLS if name in names and name not in (against, about)]
    roles = dict.fromkeys(controls, "control") | {about: "method", against: "baseline"}
    variants = [Variant(name, roles.get(name, "other"), ABOUT.get(name, "")) for name in names]
    tables = {against: paired(scores, against, seed=seed)} if len(names) > 1 else {}
    more: dict[str, pd.DataFrame] = {}
    claim = undecided(scores, differences(tables[against], against) if tables else [])
    if about is not None:
        others = [one.name for one in variants if one.role == "other"]
        claim, more = answer(scores, tables[against], about, controls=controls, others=others, seed=seed)
    images = _images(folder if maps is None else Path(maps), scores)
    return Contents(
        title=f"Scores of {scores[next(name for name in TITLE if name in scores)].nunique()} images",
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


def _scores(file: Path) -> pd.DataFrame:
    """The table of scores. Raises ValueError for one without rows, variants, images or metrics."""
    import pandas as pd

    if not file.is_file():
        raise FileNotFoundError(
            f"folder: expected a folder with {SCORES}, as fastfg evaluate writes it, got {file.parent}"
        )
    try:
        scores = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"folder: expected a table in {file}, got {error}") from None
    if "variant" not in scores or not {"image", "key"} & set(scores) or not set(TITLE) & set(scores):
        raise ValueError(
            f"folder: expected the columns variant, and key and path (or image), in {file}, got {list(scores.columns)}"
        )
    if not len(scores):
        raise ValueError(f"folder: expected scores in {file}, got a table without rows")
    if wrong := [name for name in scores["variant"].unique() if not isinstance(name, str)]:
        raise ValueError(f"folder: expected names of variants in {file}, got {wrong[0]!r}")
    try:
        metrics = metric_columns(scores)
    except ValueError as error:
        raise ValueError(f"folder: expected columns of metrics alone in {file} ({error})") from None
    if not metrics:
        raise ValueError(f"folder: expected a column of a metric in {file}, got {list(scores.columns)}")
    return scores


def _check_roles(names: Sequence[str], method: str | None, controls: Sequence[str] | None) -> None:
    """Refuse a method or controls that the answer can't be about."""
    if method is None and controls is None:
        return
    if VANILLA not in names:
        which = "method" if method is not None else "controls"
        raise ValueError(f"{which}: expected a table with {VANILLA!r}, which a method is compared with, got {names}")
    known = [name for name in names if name != VANILLA]
    if method is None and METHOD not in names:
        raise ValueError(f"controls: expected a method that must beat them, one of {known}, got none")
    if method is not None and method not in known:
        raise ValueError(f"method: expected a variant, one of {known}, got {method!r}")
    possible = [name for name in known if name != (method or METHOD)]
    for name in controls or ():
        if name not in possible:
            raise ValueError(f"controls: expected variants among {possible}, got {name!r}")
    if controls and len(set(controls)) < len(controls):
        raise ValueError(f"controls: expected different variants, got {list(controls)}")


def _written(folder: Path) -> Mapping[str, Any]:
    """What the command wrote of itself: ``command``, ``fastfg`` (the version), ``arguments`` and ``versions``."""
    found, more = _object(folder / MARKER), _object(folder / CONFIG)
    _check_objects(folder / MARKER, found, "settings", "versions")
    _check_objects(folder / CONFIG, more, "evaluate")
    evaluated = more.get("evaluate", {})
    _check_objects(folder / CONFIG, evaluated, "arguments", "versions")
    return {**found, "arguments": found.get("settings", {}), **evaluated}


def _check_objects(file: Path, found: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if not isinstance(found.get(name, {}), Mapping):
            raise ValueError(f"{file}: expected a JSON object as {name}, got {found[name]!r:.80}")


def _object(file: Path) -> Mapping[str, Any]:
    """A JSON object, empty without the file."""
    return read_json(file) if file.is_file() else {}


def _errors(folder: Path) -> pd.DataFrame | None:
    import pandas as pd

    tables = [_table("folder: expected a table", folder / name) for name in ERRORS if (folder / name).is_file()]
    return pd.concat(tables, ignore_index=True).astype(object) if tables else None


def _table(expected: str, file: Path, **options: Any) -> pd.DataFrame:
    """A CSV file. ``expected``: how the message starts if it is none."""
    import pandas as pd

    try:
        return pd.read_csv(file, **options)
    except ValueError as error:
        raise ValueError(f"{expected} in {file}, got {error}") from None


def _images(folder: Path, scores: pd.DataFrame) -> list[ImageEntry]:
    """The images whose overlays ``fastfg attribute`` wrote to ``folder``, in the order of the scores."""
    file = folder / MAPS
    if not file.is_file():
        return []
    table = _table("maps: expected a table of fastfg attribute", file, dtype=dict.fromkeys(TEXTS, str))
    missing = [name for name in (*TEXTS, "target", "predicted", "probability") if name not in table]
    if missing:
        raise ValueError(f"maps: expected a table of fastfg attribute in {file}, got one without {missing}")
    there = table[table["overlay"].notna()].drop_duplicates("key")
    rows = {row["key"]: row for row in there.to_dict("records")}
    names = scores["key" if "key" in scores else "image"].map(str)
    keys = [key for key in dict.fromkeys(names) if key in rows]
    _check_explained(file, {key: rows[key]["target"] for key in keys}, scores, names)
    return [_entry(file, rows[key]) for key in keys]


def _check_explained(file: Path, drawn: Mapping[str, Any], scores: pd.DataFrame, names: pd.Series) -> None:
    """Refuse maps of other classes than those that the scores are about. ``names``: the keys of the scores."""
    from pandas.api.types import is_numeric_dtype

    if "target" not in scores or not is_numeric_dtype(scores["target"]):
        return
    there = scores["target"].notna()
    judged = scores.loc[there, "target"].groupby(names[there]).agg(set)
    for key, target in drawn.items():
        if key in judged and target not in judged[key]:
            got = f"class {target} for image {key!r}, and {', '.join(f'{one:g}' for one in sorted(judged[key]))}"
            raise ValueError(f"maps: expected maps of the classes that were judged, got {got} in {SCORES} ({file})")


def _entry(file: Path, row: Mapping[Any, Any]) -> ImageEntry:
    """What the page shows of one ``row`` of the table ``file``."""
    try:
        probability = float(row["probability"])
    except ValueError:
        raise ValueError(f"maps: expected probabilities in {file}, got {row['probability']!r}") from None
    picture = _picture(file.parent / Path(row["overlay"]).name, file)  # a table can't name files elsewhere
    explained = f"class {row['target']} with probability {probability:.3g}"
    return ImageEntry(
        row["key"], picture, {}, predicted=f"class {row['predicted']}", explained=explained, path=row["path"]
    )


def _picture(overlay: Path, file: Path) -> Array:
    from PIL import Image

    if not overlay.is_file():
        raise FileNotFoundError(f"maps: expected the picture {overlay}, as {file} says, got no such file")
    try:
        with Image.open(overlay) as opened:
            return np.asarray(opened.convert("RGB"), dtype=np.uint8)
    except (OSError, ValueError) as error:  # PIL's own is an OSError
        raise ValueError(f"maps: expected a picture in {overlay}, got {error}") from None
