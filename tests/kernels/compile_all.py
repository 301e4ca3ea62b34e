"""Compiles every Triton kernel for sm_80, sm_90 and sm_100 without a GPU, and prints what each one takes.

The ops run on CPU tensors with the launches recorded in place of run, so what is compiled is what a card would be
given: the same tiles, strides and specialisations. Exits with 1 where a kernel spills or outgrows shared memory, or
where a product of matrices did not become tensor-core instructions.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from fastfg.kernels import encode_project, encode_topk, gate, project, relevancy
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fastfg.reference import Activation

SHARED = {80: 160 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have
MATRIX_UNIT = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b")
MEANT_FOR_IT = re.compile(r"tt\.dot .*(inputPrecision = \w+x3|xb?f16>)")  # exact float32 products are not
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
launches: dict[tuple, tuple] = {}


def record(fn, *args, grid, warmup, **options):
    """In place of JITFunction.run: keeps a launch unless one like it is there."""
    launches.setdefault((source(fn, args, options).hash(), options["num_warps"]), (fn, args, options))


def source(fn, args, options) -> ASTSource:
    """What Triton's launcher would compile for these arguments."""
    values = dict(zip(fn.arg_names, args, strict=False)) | {n: v for n, v in options.items() if n in fn.arg_names}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(fn.arg_names):
        value = values[name]
        aligned = False
        if fn.params[i].is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], aligned = "*" + TYPES[value.dtype], True
        elif isinstance(value, int):
            signature[name], aligned = "i32" if value < 2**31 else "i64", value % 16 == 0
        else:
            signature[name] = "fp32"
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn, signature, constants, attributes)


def registers_and_spills(ptx: str, arch: str) -> tuple[int, int]:
    """From ptxas: registers a thread, bytes spilled."""
    tool = knobs.nvidia.ptxas_blackwell if arch.startswith("sm_10") else knobs.nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [tool.path, "-v", f"-arch={arch}", str(path), "-o", str(path.with_suffix(".cubin"))]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))
    return int(re.search(r"Used (\d+) registers", log)[1]), spilled


def compile_one(fn, args, options, sm: int) -> str | None:
    """Prints one line of the table; returns what is wrong."""
    settings = {k: v for k, v in options.items() if k in ("num_warps", "num_stages")}
    compiled = triton.compile(source(fn, args, options), target=GPUTarget("cuda", sm, 32), options=settings)
    ptx = compiled.asm["ptx"]
    registers, spilled = registers_and_spills(ptx, re.search(r"\.target (\w+)", ptx)[1])
    units = sorted(set(MATRIX_UNIT.findall(ptx)))
    dtype = next(TYPES[a.dtype] for a in args if isinstance(a, torch.Tensor))
    shared = compiled.metadata.shared
    label = f"{fn.__name__:16} sm_{sm:<4} {dtype:5}"
    print(f"{label} registers {registers:3}  spills {spilled:4}  shared {shared:6}  {' '.join(units)}", flush=True)
    if spilled or shared > SHARED[sm]:
        return f"{label}: spills {spilled} bytes, shared memory {shared} of {SHARED[sm]}"
    if MEANT_FOR_IT.search(compiled.asm["ttir"]) and not units:
        return f"{label}: no tensor-core instruction"
    return None


def run_the_ops(dtype: torch.dtype) -> None:
    """Each op on small inputs of a real model's strides: enough to see every launch."""
    T, d, F, K, B, H, N, dh = 64, 768, 4096, 128, 2, 12, 197, 64
    x, W_enc, W_dec = torch.zeros(T, d, dtype=dtype), torch.zeros(d, F, dtype=dtype), torch.zeros(F, d, dtype=dtype)
    b_enc, b_dec, indices = W_enc[0], W_dec[0], torch.zeros(T, K, dtype=torch.int64)
    q, k, v = torch.zeros(B, N, 3, H, dh, dtype=dtype).permute(2, 0, 3, 1, 4)
    for C in (1, 3):
        relevancy.relevancy(torch.zeros(C, B, N), q, k, v, q, dh**-0.5)
    for width in (32, 80, 128):
        wide = torch.zeros(B, H, N, width, dtype=dtype)
        relevancy.relevancy(torch.zeros(3, B, N), wide, wide, wide, wide, 1.0)
    project.project(x, W_dec, W_dec[:T, :K], indices)
    for P in (49, 196, 1369, 4096):
        gate.gate(torch.zeros(B, P, dtype=dtype), 1.0, 5.0)
    for k in (K, F):
        encode_topk.encode_topk(x, W_enc, b_enc, b_dec, k)
    for name in ("relu", "tanh_relu", "jumprelu", "batch_topk", "gated"):
        activation = Activation(name, None, b_enc, b_enc, b_enc, b_enc)
        encode_project.encode_project(x, x, W_enc, b_enc, W_dec, activation)


def main() -> int:
    JITFunction.run = record
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        run_the_ops(dtype)
    wrong = [error for sm in SHARED for launch in launches.values() if (error := compile_one(*launch, sm))]
    print("\n".join(wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
