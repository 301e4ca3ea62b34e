"""Find the block that an SAE belongs to, from its config or else from its folder's name. Nothing is guessed."""

from __future__ import annotations

import re
from pathlib import Path

# "layer_9", "layers.9", "blocks.9", "block9": before "l9", which could also be the size of a model or an L1 penalty
WORD = re.compile(r"(?<![a-z0-9])(?:layers?|blocks?)[._-]?(\d+)(?![a-z0-9])")
LETTER = re.compile(r"(?<![a-z0-9])l(?![012][-_=.]\d)(\d+)(?![a-z0-9])")
MODEL = re.compile(r"(?:vit|clip|siglip|dino(?:v\d)?|deit\d?|eva\d*|mae|beit)[-_.]?[tsblhg][-_.]?(?:8|14|16|32)(?!\d)")


def block_of(told: int | None, folder: Path) -> int | None:
    """The 0-based block of the SAE in ``folder``; None if neither its files nor the name contain it.

    ``told``: what its files say. Raises ValueError if it is not the name's, or if the name contains several blocks and
    the files none.
    """
    named = blocks_in_name(folder.name)
    if told is not None:
        if len(named) == 1 and told not in named:
            raise ValueError(
                f"source: expected one block for {folder}, got {told} in its files and {named.pop()} in its name "
                "(pass a mapping {block: path} instead)"
            )
        return told
    if len(named) > 1:
        raise ValueError(
            f"source: expected one block in the name of {folder}, got {sorted(named)} (pass a mapping "
            "{block: path} instead)"
        )
    return named.pop() if named else None


def blocks_in_name(name: str) -> set[int]:
    """The blocks in a name: ``layer_9``, ``layers.9``, ``blocks.9``, ``l9``, or a number alone."""
    name = name.lower()
    if name.isdecimal():
        return {int(name)}
    words = WORD.findall(name) or LETTER.findall(MODEL.sub(" ", name))
    return {int(number) for number in words}
