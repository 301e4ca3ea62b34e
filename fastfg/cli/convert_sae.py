"""``fastfg convert-sae``: read an SAE of any format and write it in fastfg's own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastfg.cli.console import add_command, file_or_folder, say

NOTES = """What the files do not say must be given, for example --site resid_post (the
block's output). What they say can't be changed. No pickled code is run.
docs/saes.md has the formats, and what each of them needs.

Example:
  fastfg convert-sae downloaded out/saes/layer_4 --layer 4 --site resid_post
"""


def add(commands: Any) -> None:
    command = add_command(
        commands,
        "convert-sae",
        run,
        "Read an SAE of any known format and write config.json and sae.safetensors.",
        NOTES,
    )
    command.add_argument("source", metavar="IN", type=file_or_folder, help="the file or folder of one SAE")
    command.add_argument("out", metavar="OUT", type=file_or_folder, help="the folder to write: new or empty")
    command.add_argument("--layer", type=int, help="the 0-based block, if the files do not say it")
    add_overrides(command)


def add_overrides(command: argparse.ArgumentParser) -> None:
    """One option for each override of ``load_saes`` that is no tensor."""
    group = command.add_argument_group("what the files do not say")
    for name in ("site", "model", "tokens", "activation", "post", "normalize", "row-norm"):
        group.add_argument(f"--{name}", metavar="NAME")
    group.add_argument("--k", type=int)
    for name in ("threshold", "input-mean", "input-scale", "delta"):
        group.add_argument(f"--{name}", type=float, metavar="NUMBER")
    for name in ("subtract-b-dec", "decoder-norm"):
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction)


def overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastfg.sae.formats.common import OVERRIDES

    return {name: value for name in OVERRIDES if (value := getattr(arguments, name)) is not None}


def run(arguments: argparse.Namespace) -> None:
    from fastfg.sae.checkpoints import load_sae, load_saes

    _check_out(arguments.out)
    given = overrides(arguments)
    if arguments.layer is None:
        sae = load_sae(arguments.source, **given)
    else:
        sae = load_saes(arguments.source, layers=arguments.layer, **given)[arguments.layer]
    sae.save(arguments.out)
    say(f"{sae.provenance.get('format', 'fastfg')}: {arguments.source} -> {arguments.out}")
    for line in describe(sae):
        say(line)


def _check_out(out: Path) -> None:
    """Require a new or an empty folder: two SAEs in one folder can't be told apart."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder, got {out}, which is a file")
    if out.exists() and (names := sorted(path.name for path in out.iterdir())):
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise ValueError(f"out: expected a new or an empty folder, got {out}, which has {', '.join(names[:8])}{more}")


def describe(sae: Any) -> list[str]:
    """What an SAE is, where it plugs in, and its norms and thresholds."""
    provenance = sae.provenance
    lines = [
        f"SAE: d={sae.d}, F={sae.n_features}, {sae.activation_name}"
        + "".join(f", {name}={value}" for name, value in (("k", sae.k), ("post", sae.post), ("ranking", sae.ranking)))
        + f", {str(sae.W_enc.dtype).removeprefix('torch.')}",
        f"input: normalize={sae.normalization}, subtract_b_dec={sae.subtract_b_dec}, "
        f"mean {'norm ' + format(float(sae.input_mean.norm()), '.4g') if sae.input_mean is not None else 'none'}, "
        f"scale {format(float(sae.input_scale), '.4g') if sae.input_scale is not None else 'none'}",
        f"plugs in: block {provenance.get('layer', 'not said')}, site {provenance.get('site', 'not said')}, "
        f"tokens {provenance.get('tokens', 'not said')}, model {provenance.get('model', 'not said')}",
    ]
    for name, tensor in (("W_enc columns", sae.W_enc.T), ("W_dec rows", sae.W_dec)):
        norms = tensor.double().norm(dim=1)
        lines.append(f"norms of {name}: {_range(norms)}")
    lines.append(f"norm of b_dec: {float(sae.b_dec.double().norm()):.4g}; b_enc: {_range(sae.b_enc.double())}")
    if sae.threshold is not None:
        sign = ">" if sae.strict else ">="
        lines.append(f"threshold ({sign}): {_range(sae.threshold.double().reshape(-1))}")
    if provenance.get("folded"):
        lines.append(f"folded: {', '.join(provenance['folded'])}")
    if provenance.get("given"):
        lines.append(f"given: {', '.join(provenance['given'])}")
    return lines


def _range(values: Any) -> str:
    return f"{float(values.min()):.4g} to {float(values.max()):.4g}, mean {float(values.mean()):.4g}"


def show(path: Path, given: dict[str, Any]) -> None:
    """Print :func:`describe` of the SAEs at ``path``."""
    from fastfg.sae.checkpoints import load_sae, load_saes
    from fastfg.sae.checkpoints.locate import holds_one

    one = not path.is_dir() or holds_one(path)
    saes: dict[Any, Any] = {None: load_sae(path, **given)} if one else {**load_saes(path, **given)}
    for block, sae in saes.items():
        say(f"{path}" + ("" if block is None else f", block {block}") + f" ({sae.provenance.get('format', 'fastfg')})")
        for line in describe(sae):
            say(f"  {line}")
