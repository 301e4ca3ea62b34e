"""What ``fastfg.evaluate`` and ``fastfg.compare`` cost, relative to the model alone.

    python -m bench.engine [--model vit_base_patch16_224] [--images 1] [--gates 1 3 10] [--results DIR]
    python -m bench.engine --loop              compare the scores with a loop over single perturbed images
    python -m bench.engine --srg 3             the three default metrics with SRG beside them, relative to the three
    python -m bench.engine --quantus 9         compare with Quantus: one map, and nine gates
    python -m bench.engine --removed 3         one curve with removed tokens, relative to the filled one
    python -m bench.engine --memory 200        resident memory over that many images, three variants each

Work is counted in multiply-adds of matrix products. Time is compared with the model's own forwards at the same batch
size, run alternately, in the precision that ``evaluate`` chooses (bfloat16 on a CUDA device). The weights are random.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastfg
from bench.bench_evaluate import FILL, METRICS, TARGET, evaluate, keys, one_at_a_time, quantus
from bench.ceilings import measure
from bench.photographs import photographs
from bench.results import append
from fastfg import metrics
from fastfg.models import adapt
from fastfg.models.hold import hold
from fastfg.models.timm import import_timm
from fastfg.perturb import Precision
from fastfg.perturb.batches import default_size
from fastfg.perturb.removal import Removal
from fastfg.perturb.tokens import Tokens


def gates_of(n: int) -> dict[str, fastfg.Gate | None]:
    """Vanilla and n - 1 gates of different strengths."""
    gates = {f"gate {c}": fastfg.Gate((2, 3, 4), c_max=c, score="gradient_x_residual") for c in range(10, 10 * n, 10)}
    return {"vanilla": None, **gates}


def flops(run: Any, *arguments: Any) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused attention is not counted
        run(*arguments)
    return counter.get_total_flops()


def counted(model: nn.Module, images: Tensor) -> tuple[float, float, int]:
    """Work in forwards of the model, per perturbed forward and per view; and the operations of one model forward."""
    adapter = adapt(model)
    P = torch.Size(adapter.grid(tuple(images.shape[-2:]))).numel()
    with hold(model, adapter.flags):
        tokens, fill = Tokens(adapter), images.mean().reshape(1, 1, 1)
        once = flops(tokens.prepare, images[:1], [fill])
        prepared = tokens.prepare(images[:1], [fill])
        n = 16
        masks = torch.zeros(n, P, dtype=torch.bool, device=images.device)
        inputs = tokens.inputs(prepared, torch.zeros(n, dtype=torch.long, device=images.device), masks)
        one = flops(model, images[:1])
        return flops(tokens.run, inputs) / n / one, once / one, one


class Pace:
    """The time of the model's own forward per image, measured between other work."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        n = default_size(images.device, math.prod(adapt(model).patches(images)))
        self.model, self.batch = model, images[:1].repeat(n, 1, 1, 1)
        self.precision = Precision("bfloat16" if images.is_cuda else "float32", images.device)
        self.seconds: list[float] = []
        self.spent = 0.0  # seconds spent on measuring
        self()
        self.seconds, self.spent = [], 0.0

    def __call__(self) -> None:
        start = now(self.batch)
        with self.precision():
            self.model(self.batch)
        self.spent += now(self.batch) - start
        self.seconds.append((now(self.batch) - start) / len(self.batch))


def now(like: Tensor) -> float:
    if like.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def evaluate_cost(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """One map under all three metrics: work and time, relative to the model."""
    maps, pace = fastfg.attribute(model, images, target=1).maps, Pace(model, images)
    fastfg.evaluate(model, images[:1], maps[:1], target=1, metrics=["saco"])  # warm
    run = Tokens.run

    def in_turn(tokens: Tokens, inputs: tuple[Tensor, ...]) -> Tensor:
        pace()
        return run(tokens, inputs)

    def evaluate_all() -> fastfg.Scores:
        return fastfg.evaluate(model, images, maps, target=1, keys=range(len(images)))

    with patch.object(Tokens, "run", in_turn):
        start = now(images)
        scores = evaluate_all()
        seconds = now(images) - start - pace.spent
    one, once, operations = counted(model, images)
    B = len(images)
    work = (scores.forwards["run"] - B) * one + B * (1 + once)  # the unperturbed images run through the whole model
    rate = statistics.mean(pace.seconds)  # not the median: a disturbance of the machine affects both times
    found = {
        "path": scores.path,
        **scores.forwards,
        "work": work / scores.forwards["asked"],
        "seconds_an_image": seconds / B,
        "model_seconds": rate,
        "time_over_work": seconds / (work * rate),
    }
    if images.is_cuda:  # again without the timing in between, which makes the device wait for the CPU
        found["flops_per_second"] = work * operations / seconds_of(evaluate_all, images)
        found["ceiling"] = measure("cuda").flops_per_second
    return found


def compare_cost(model: nn.Module, images: Tensor, n: int) -> dict[str, Any]:
    """A comparison of n variants, with attribution and table."""
    start = now(images)
    table = fastfg.compare(model, images, gates=gates_of(n), target=1, keys=range(len(images)))
    assert table["error"].isna().all()
    return {"gates": n, "seconds_an_image": (now(images) - start) / len(images)}


def quantus_cost(model: nn.Module, images: Tensor, n: int) -> dict[str, Any]:
    """The times of Quantus and fastfg: one map under each of two metrics, and n gates under both.

    Quantus judges one map after another, so its time for n maps is computed: n times that of one.
    """
    maps = fastfg.attribute(model, images, gate=list(gates_of(n).values()), target=1).maps
    found: dict[str, Any] = {"gates": n}
    theirs = 0.0
    for name, metric, options in (
        ("fc", "fc", {}),
        ("pf", "pf", {}),
        ("pf, whole patches", "pf", {"whole_patches": True}),
    ):
        given = (model, images, maps[:1], METRICS[metric])
        fast, slow = evaluate("tokens")(*given), quantus(*given, **options)
        seconds = [seconds_of(run, images) for run in (fast, slow, fast)]
        theirs += 0 if options else seconds[1]
        found[name] = {"theirs": seconds[1], "ours": seconds[::2], "times_as_fast": 2 * seconds[1] / sum(seconds[::2])}
    ours = seconds_of(evaluate("tokens")(model, images, maps, METRICS["fc"] + METRICS["pf"]), images)
    return found | {"theirs": n * theirs, "ours": ours, "times_as_fast": n * theirs / ours}


def loop_difference(model: nn.Module, images: Tensor) -> dict[str, Any]:
    """The largest relative difference between fastfg's scores and those of a loop over single perturbed images."""
    maps = fastfg.attribute(model, images, target=TARGET).maps
    options = {"target": TARGET, "baseline": FILL, "precision": "float32"}  # as in the loop, on any device
    scores = fastfg.evaluate(model, images, maps, keys=keys(images), **options)
    impact, drop, curve = one_at_a_time(model, images, maps[None], list(scores))
    details = scores.details
    subsets = details["faithfulness_correlation"]["subsets"].flatten(1)
    summed = maps.double().flatten(1).cpu().gather(1, subsets).unflatten(1, (*drop.shape[-2:], -1)).sum(-1)
    loop = {
        "saco": metrics.saco_score(details["saco"]["group_attribution"], impact[0]),
        "faithfulness_correlation": metrics.correlation(summed, drop[0]).mean(-1),
        "pixel_flipping": metrics.area(curve[0]),
    }
    return {name: float(((scores[name] - loop[name]) / loop[name]).abs().max()) for name in loop}


def srg_cost(model: nn.Module, images: Tensor, rounds: int) -> dict[str, Any]:
    """The three default metrics with and without SRG in steps of 4, run in turn."""
    maps = fastfg.attribute(model, images, target=TARGET).maps
    common = {"target": TARGET, "keys": range(len(images)), "path": "tokens"}  # without the check of the path
    three = partial(fastfg.evaluate, model, images, maps, metrics=METRICS["all"], **common)
    four = partial(
        fastfg.evaluate, model, images, maps, metrics=[*METRICS["all"], "srg"], srg={"patches_per_step": 4}, **common
    )
    run = [evaluated().forwards["run"] for evaluated in (three, four)]  # warm
    times = [[timed(three, images), timed(four, images)] for _ in range(rounds)]
    (wall, wall_with), (busy, busy_with) = by_run(times)
    return {
        "forwards": run,
        "forwards_ratio": run[1] / run[0],
        "seconds_an_image": statistics.median(wall_with) / len(images),
        "time_ratio": median_ratio(wall_with, wall),
        "processor_time": median_ratio(busy_with, busy),
    }


def removed_cost(model: nn.Module, images: Tensor, rounds: int) -> dict[str, Any]:
    """A Pixel Flipping curve with removed tokens and one with filled patches, run alternately: time and work."""
    adapter = adapt(model)
    grid = adapter.grid(tuple(images.shape[-2:]))
    P = torch.Size(grid).numel()
    maps = torch.rand(len(images), *grid, generator=torch.Generator().manual_seed(0))

    def curve(baseline: str) -> None:
        fastfg.evaluate(model, images, maps, target=1, metrics=["pixel_flipping"], baseline=baseline)

    times = [[timed(partial(curve, baseline), images) for baseline in ("mean", "removed")] for _ in range(rounds)]
    (wall, wall_removed), (busy, busy_removed) = by_run(times)
    filled, _, operations = counted(model, images)
    with hold(model, adapter.flags):
        removal = Removal(adapter)
        prepared = removal.prepare(images[:1], [])
        view, masks = torch.zeros(1, dtype=torch.long, device=images.device), torch.arange(P, device=images.device)
        left = range(P, 0, -max(1, P // 7))  # a quadratic in the length: a few are enough
        work = [flops(removal.run, removal.inputs(prepared, view, (masks >= n)[None], n)) for n in left]
    return {
        "filled": statistics.median(wall),
        "ours": statistics.median(wall_removed),
        "time": median_ratio(wall_removed, wall),
        "processor_time": median_ratio(busy_removed, busy),
        "work": statistics.mean(work) / (filled * operations),
    }


def timed(run: Any, like: Tensor) -> tuple[float, float]:
    """Seconds, and seconds of the processor, which other programs change less."""
    busy = time.process_time()
    return seconds_of(run, like), time.process_time() - busy


def by_run(times: list[list[tuple[float, float]]]) -> tuple[list[list[float]], list[list[float]]]:
    """The seconds of each run over all rounds, and those of the processor."""
    wall, busy = ([[times_of[i] for times_of in run] for run in zip(*times, strict=True)] for i in (0, 1))
    return wall, busy


def median_ratio(some: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(some, others, strict=True))


def seconds_of(run: Any, like: Tensor) -> float:
    start = now(like)
    run()
    return now(like) - start


def memory(n: int) -> dict[str, Any]:
    """The peak of resident memory so far, after each tenth of n images under three variants."""
    torch.manual_seed(0)
    name = "vit_tiny_patch16_224"
    model = import_timm().create_model(name, img_size=64, num_classes=10).eval()
    highest = []
    for tenth in range(10):
        stream = (photographs(1, 64) + 0.01 * torch.randn(8, 3, 64, 64) for _ in range(n // 80))
        table = fastfg.compare(model, stream, gates=gates_of(3))
        assert len(table) == n // 80 * 8 * 3
        highest.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        print(f"{(tenth + 1) * (n // 80) * 8} images: {highest[-1]} MiB", flush=True)
    return {"model": name, "images": n // 80 * 80, "variants": 3, "highest_mib": highest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--gates", type=int, nargs="*", default=[1, 3, 10])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--loop", action="store_true", help="compare the scores with a loop over single images")
    parser.add_argument("--quantus", type=int, metavar="GATES", help="compare with Quantus, with this number of gates")
    parser.add_argument("--srg", type=int, metavar="ROUNDS", help="the cost of SRG beside the default metrics")
    parser.add_argument("--removed", type=int, metavar="ROUNDS", help="compare removed with filled, alternately")
    parser.add_argument("--memory", type=int, metavar="IMAGES")
    parser.add_argument("--results", type=Path, metavar="DIR", help="append lines to DIR/<device>/engine.jsonl")
    arguments = parser.parse_args()

    def tell(name: str, found: dict[str, Any]) -> None:
        print(name, json.dumps(found), flush=True)
        if arguments.results is not None:
            shape = {"model": arguments.model, "images": arguments.images}
            shape |= {key: found[key] for key in ("model", "images", "gates") if key in found}
            line = {"name": "engine", "provider": name, "shape": shape, "dtype": "float32"}
            line["median"] = found.get("seconds_an_image", found.get("ours"))
            append(arguments.results, arguments.device, line | found)

    if arguments.memory:
        tell("memory", memory(arguments.memory))
        return
    torch.manual_seed(0)
    model = import_timm().create_model(arguments.model).eval().requires_grad_(False).to(arguments.device)
    images = photographs(arguments.images, model.patch_embed.img_size[0]).to(arguments.device)
    with torch.no_grad():
        if arguments.loop:
            tell("loop", loop_difference(model, images))
            return
        if arguments.srg:
            tell("srg", srg_cost(model, images, arguments.srg))
            return
        if arguments.quantus:
            tell("quantus", quantus_cost(model, images, arguments.quantus))
            return
        if arguments.removed:
            tell("removed", removed_cost(model, images, arguments.removed))
            return
        tell("evaluate", evaluate_cost(model, images))
        for n in arguments.gates:
            tell("compare", compare_cost(model, images, n))


if __name__ == "__main__":
    main()
