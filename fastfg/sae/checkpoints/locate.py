"""Find the one SAE at a path, and its format. Files are told apart by content, never by name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastfg.sae.files import UnreadableError, is_weights, open_weights
from fastfg.sae.formats import FORMATS
from fastfg.sae.formats.common import Config, Contents
from fastfg.sae.formats.own import CONFIG

CONFIGS = (CONFIG, "cfg.json")
MAX_CONFIG = 1 << 24  # bytes
MAX_FILES = 200  # weights files looked at in one folder


@dataclass
class Found:
    """An SAE: its files and its format."""

    contents: Contents
    form: Any  # a module of fastfg.sae.formats

    def block(self) -> int | None:
        block: int | None = self.form.block(self.contents)
        return block


def read_config(file: Path) -> Config:
    """The object in a JSON file. Raises ValueError that names the file."""
    try:
        if file.stat().st_size > MAX_CONFIG:
            raise ValueError(f"{file.stat().st_size} bytes")
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: also text that is not UTF-8
        raise ValueError(f"path: expected JSON in {file}, got {type(error).__name__}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"path: expected a JSON object in {file}, got {type(config).__name__}")
    return Config(config, file)


def weights_in(folder: Path) -> list[Path]:
    """The files of a folder that begin like weights, whatever their names are."""
    return [path for path in sorted(folder.iterdir()) if is_weights(path)][:MAX_FILES]


def locate(path: Path) -> Found:
    """The SAE at ``path``: a weights file, a config beside one, or a folder with one SAE.

    Raises FileNotFoundError for a path that does not exist, and ValueError that says what was looked for and found.
    """
    if not path.exists():
        raise FileNotFoundError(f"path: expected an SAE file or folder, got {path}, which does not exist")
    if not path.is_dir() and path.name not in CONFIGS:
        found = _formats(Contents(open_weights(path), _configs(path.parent)))
        if not found:
            raise ValueError(f"path: expected an SAE of a known format ({known()}), got {path}, which is of none")
        return _only(found, path)
    folder = path if path.is_dir() else path.parent
    configs, found, damaged = _configs(folder), [], []
    for file in weights_in(folder):
        try:
            found += _formats(Contents(open_weights(file), configs))
        except UnreadableError as error:
            damaged.append(error)
    if not found and damaged:
        raise damaged[0]
    if not found:
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"path: expected an SAE folder ({known()}) or one of these files, got {path}; its folder has {names}"
        )
    return _only(found, path)


def holds_one(folder: Path) -> bool:
    """Whether ``folder`` itself is an SAE's folder, which may be damaged, and not one of several SAEs' folders."""
    configs = {name for name in CONFIGS if (folder / name).is_file()}
    for file in weights_in(folder):
        try:
            if _formats(Contents(open_weights(file), _configs(folder))):
                return True
        except UnreadableError:
            if configs:
                return True
    return False


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` has an SAE that can be read."""
    try:
        return bool(locate(folder))
    except ValueError:
        return False


def known() -> str:
    """The files of all formats, for messages."""
    return "; ".join(form.FILES for form in FORMATS if form.FILES)


def _formats(contents: Contents) -> list[Found]:
    return [Found(contents, form) for form in FORMATS if form.matches(contents)]


def _only(found: list[Found], path: Path) -> Found:
    if len(found) > 1:
        files = sorted({f"{one.contents.file.name} ({one.form.NAME})" for one in found})
        raise ValueError(f"path: expected one SAE in {path}, got {files[:8]} (name the file)")
    return found[0]


def _configs(folder: Path) -> dict[str, Config]:
    return {name: read_config(folder / name) for name in CONFIGS if (folder / name).is_file()}
