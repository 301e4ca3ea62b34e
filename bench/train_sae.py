"""A training step of a TopK SAE beside dense PyTorch with autograd, in one run and in turn.

    python -m bench.train_sae                      tokens per second, and the ratio of the two
    python -m bench.train_sae --peers overcomplete saelens sparsify   beside other libraries, too
    python -m bench.train_sae --losses 200         also train both for 200 steps and compare their losses
    python -m bench.train_sae --memory             also the peak memory of a step, beside its floor
    python -m bench.train_sae --results DIR        also append lines to DIR/<device>/train_sae.jsonl

The dense trainer keeps the codes in an array [T, F], so it has six dense products per step. With ``--precision
bfloat16`` it runs them under autocast. It has the same loss with
the same AuxK, whose dead features it compacts too, and PyTorch's fused Adam. Both start from the same weights and see
the same tokens. For the times, a tenth of the features are dead: their biases are low, so that they are active in AuxK
alone. Wall times depend on what else the machine runs; ratios of processor times depend on it less. Set
OMP_WAIT_POLICY=passive on a machine that runs other programs: else threads that wait count as work.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers import PEERS, version
from bench.results import append
from fastfg.sae.topk_step import AUX_COEFFICIENT, BETAS, EPS, TopKStep

DEAD_SHARE, DEAD_BIAS = 0.1, -2.0
RANK = 64  # of the tokens, beside noise


class Dense:
    """The same training with dense codes and autograd."""

    def __init__(self, like: TopKStep) -> None:
        self.k, self.k_aux, self.dead_after = like.k, like.k_aux, like.dead_after
        self.half = like.precision == torch.bfloat16
        weights = (like.W_enc.contiguous(), like.b_enc, like.W_dec, like.b_dec)
        self.weights = [w.clone().requires_grad_() for w in weights]
        self.adam = torch.optim.Adam(self.weights, betas=BETAS, eps=EPS, fused=True)
        self.unused = like.unused.clone()

    def step(self, x: Tensor, lr: float) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.half):
            return self._step(x, lr)

    def _step(self, x: Tensor, lr: float) -> Tensor:
        W_enc, b_enc, W_dec, b_dec = self.weights
        pre = torch.addmm(b_enc, x - b_dec, W_enc)
        f = self.sparse(pre, self.k)
        x_hat = torch.addmm(b_dec, f, W_dec)
        loss = (x_hat - x).square().sum(-1).mean()
        dead = (self.unused >= self.dead_after).nonzero().flatten()
        total = loss
        if self.k_aux and len(dead):
            codes = self.sparse(pre[:, dead], min(self.k_aux, len(dead)))
            residual = (x - x_hat).detach()
            total = loss + AUX_COEFFICIENT * (codes @ W_dec[dead] - residual).square().sum(-1).mean()
        self.adam.zero_grad()
        total.backward()
        with torch.no_grad():
            assert W_dec.grad is not None
            W_dec.grad.sub_((W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec)
            self.adam.param_groups[0]["lr"] = lr
            self.adam.step()
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
            self.unused.add_(len(x)).masked_fill_((f > 0).any(0), 0)
        return loss.detach()

    @staticmethod
    def sparse(pre: Tensor, k: int) -> Tensor:
        values, indices = pre.topk(k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, indices, values.relu())


def tokens(T: int, d: int, seed: int, device: str) -> Tensor:
    """Tokens with a mean square of about 1 per dimension. The directions are the same for every seed."""
    directions = torch.randn(RANK, d, generator=torch.Generator().manual_seed(-1)) / RANK**0.5
    random = torch.Generator().manual_seed(seed)
    noise = 0.1 * torch.randn(T, d, generator=random)
    return (torch.randn(T, RANK, generator=random) @ directions + noise).to(device)


def trainer(case: argparse.Namespace, dead: bool) -> TopKStep:
    W_dec = F.normalize(torch.randn(case.F, case.d, generator=torch.Generator().manual_seed(0)), dim=1)
    options = {"dead_after": case.dead_batches * case.T, "precision": getattr(torch, case.precision)}
    made = TopKStep(W_dec.to(case.device), case.k, case.k_aux, **options)
    if dead:
        n = round(DEAD_SHARE * case.F)
        made.b_enc[:n] = DEAD_BIAS
        made.unused[:n] = made.dead_after
    return made


def clocked(function: Any, device: str) -> tuple[float, float]:
    """Wall time and processor time in seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def speed(case: argparse.Namespace) -> dict[str, float]:
    """Seconds per step of both trainers (medians), and the medians of the ratios of the rounds."""
    ours = trainer(case, dead=True)
    dense = Dense(ours)
    peers = {name: PEERS[name](case.d, case.F, case.k, round(DEAD_SHARE * case.F)) for name in case.peers}
    steps = {"fastfg": partial(ours.step, lr=1e-4), "dense": partial(dense.step, lr=1e-4)}
    steps |= {name: peer.step for name, peer in peers.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for seed in range(case.rounds + 1):
        x = tokens(case.T if seed else min(case.T, 256), case.d, seed, case.device)  # the first round warms up
        for name, step in steps.items():
            wall, processor = clocked(partial(step, x), case.device)
            print(f"round {seed}, {name}: {wall:.2f} s, processor {processor:.2f} s", flush=True)
            if seed:
                seconds[name].append((wall, processor))
    own = [list(of) for of in zip(*seconds.pop("fastfg"), strict=True)]  # wall times and processor times
    found = {"median": statistics.median(own[0]), "processor": statistics.median(own[1]), "rounds": case.rounds}
    found["dead"] = int((ours.unused >= ours.dead_after).sum())
    for name, times in seconds.items():
        before = "" if name == "dense" else f"{name}_"
        for own_times, other, kind in zip(own, zip(*times, strict=True), ("", "processor_"), strict=True):
            found[f"{name}_{kind}".rstrip("_")] = statistics.median(other)
            ratios = (b / a for a, b in zip(own_times, other, strict=True))
            found[f"{before}{kind}ratio"] = statistics.median(ratios)
    return found


def losses(case: argparse.Namespace, steps: int) -> dict[str, float]:
    """The largest relative difference of the two losses in any step, with the first and the last loss."""
    ours = trainer(case, dead=False)
    dense, worst, seen, dead = Dense(ours), 0.0, [], 0
    for step in range(steps):
        x = tokens(case.T, case.d, step, case.device)
        dead += bool((ours.unused >= ours.dead_after).any())
        one, other = float(ours.step(x, case.lr)[0][0]), float(dense.step(x, case.lr))
        worst = max(worst, abs(one - other) / other)
        seen.append(one)
        if step % 20 == 0:
            print(f"step {step}: {one:.6f} and {other:.6f}", flush=True)
    return {"steps": steps, "difference": worst, "first": seen[0], "last": seen[-1], "steps_with_dead": dead}


def memory(case: argparse.Namespace) -> dict[str, float]:
    """Peak MiB above the tokens and the library: measured, and the floor of both."""
    if case.memory != "here":
        command = [sys.executable, "-m", "bench.train_sae", "--memory", "here", "--rounds", "0"]
        sizes = [f"--{name}={getattr(case, name)}" for name in ("T", "d", "F", "k", "k_aux", "threads")]
        peaks = [
            float(subprocess.run([*command, *sizes, *dense], check=True, capture_output=True, text=True).stdout)
            for dense in ([], ["--dense"])
        ]
        weights = 2 * case.F * case.d + case.F + case.d
        floor = 4 * (3 * weights + 2 * case.d + 2 * case.T * case.d) + 12 * case.T * case.k
        return {"peak": peaks[0], "dense_peak": peaks[1], "floor": floor / 2**20}
    x = tokens(case.T, case.d, 0, "cpu")
    TopKStep(torch.eye(32), 2).step(torch.randn(2048, 32), 1e-3)  # the libraries' own memory
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    training: Any = trainer(case, dead=True)
    training = Dense(training) if case.dense else training
    for _ in range(2):
        training.step(x, 1e-4)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    return {}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"T": 4096, "d": 384, "F": 24_576, "k": 128, "k_aux": 192, "rounds": 3, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dead-batches", type=int, default=8, help="batches after which an inactive feature is dead")
    parser.add_argument("--losses", type=int, default=0, metavar="STEPS")
    parser.add_argument("--lr", type=float, default=2e-4, help="of the comparison of losses; near that of Gao et al.")
    parser.add_argument("--memory", nargs="?", const="measured")
    parser.add_argument("--dense", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, default=[], help="other libraries; pip install fastfg[peers]"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"], help="of the encoder")
    parser.add_argument("--results", type=Path, metavar="DIR")
    return parser.parse_args()


def main() -> None:
    case = arguments()
    torch.set_num_threads(case.threads)
    found: dict[str, dict[str, float]] = {}
    if case.memory:
        found["memory"] = memory(case)
    if case.memory == "here":
        return
    if case.rounds:
        found["step"] = speed(case)
    if case.losses:
        found["losses"] = losses(case, case.losses)
    shape = {name: getattr(case, name) for name in ("T", "d", "F", "k", "k_aux")}
    for provider, numbers in found.items():
        print(provider, {name: round(number, 6) for name, number in numbers.items()})
        if case.results is not None:
            line = {"name": "train_sae", "provider": provider, "shape": shape, "dtype": case.precision, "median": None}
            peers = {"peers": {name: version(name) for name in case.peers}} if provider == "step" and case.peers else {}
            append(case.results, case.device, line | numbers | peers)


if __name__ == "__main__":
    main()
