"""Compiles every Triton kernel for sm_80, sm_90 and sm_100 without a GPU, and prints the resources that each one needs.

    python -m tests.kernels.compile_all [--markdown FILE]

The ops run on CPU tensors, and launches are recorded instead of run. So the kernels are compiled as for a real GPU,
with the same tiles, strides and specialisations, in every configuration that tuning may choose. Exits with 1 if a
kernel spills registers or needs too much shared memory, or if a matrix product does not use tensor cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import struct
import subprocess
import sys
import tempfile
import unittest.mock
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from fastfg.kernels import (
    adam_topk,
    decode_topk,
    encode_project,
    encode_topk,
    gate,
    gated_relevancy,
    project,
    relevancy,
    tuning,
)
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

SHARED = {80: 160 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have
MATRIX_UNIT = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b")
MEANT_FOR_IT = re.compile(r"tt\.dot .*(inputPrecision = \w+x3|xb?f16>)")  # exact float32 products are not
EXECUTABLE = 4  # the flag of an ELF section
TYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TYPES |= {torch.int32: "i32", torch.int64: "i64"}
WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes
SETTINGS = ("num_warps", "num_stages", "maxnreg")
ALL = {8, 9, 10}
PROCESSES = 2


class Launch(NamedTuple):
    fn: JITFunction
    args: tuple
    options: dict
    cards: set  # the GPUs that its configuration is offered for
    untuned: set  # the GPUs where it is the default


class Line(NamedTuple):
    """One row of the table."""

    kernel: str
    config: str
    arch: str
    dtype: str
    registers: int
    spills: int
    shared: int
    instructions: int
    unit: str
    wrong: str | None
    untuned: bool

    def __str__(self) -> str:
        return (
            f"{self.kernel:22} {self.arch:6} {self.dtype:5} registers {self.registers:3}  spills {self.spills:4}  "
            f"shared {self.shared:6}  instructions {self.instructions:5}  {self.unit:16} {self.config}"
        )


launches: dict[tuple, Launch] = {}
now = {"cards": ALL, "untuned": ALL, "every": True}  # the state of the recording, and whether it covers all candidates


def record(fn, *args, grid, warmup, **options):
    """Replaces JITFunction.run: records a launch unless an equal one is already recorded."""
    given = dict(zip(fn.arg_names, args, strict=False))
    given |= {p.name: options.pop(p.name) for p in fn.params if p.name in options and not p.is_constexpr}
    args = tuple(given[name] for name in fn.arg_names if name in given)  # constexprs come last
    launch = Launch(fn, args, options, now["cards"], now["untuned"])
    settings = tuple(options.get(name) for name in SETTINGS)
    launches.setdefault((source(launch).hash(), settings), launch)


def choose(kernel, like, sizes, candidates, run):
    """Replaces tuning.choose: records the launches of all candidates, or of the default."""
    waiting = ALL
    for config in candidates:
        cards = ALL & set(config.get("cards", ALL))
        untuned, waiting = waiting & cards, waiting - cards
        now.update(cards=cards if now["every"] else untuned, untuned=untuned)
        if now["cards"]:
            run({name: value for name, value in config.items() if name != "cards"})
    now.update(cards=ALL, untuned=ALL)
    return tuning.offered(candidates)[0]


def source(launch: Launch) -> ASTSource:
    """The source that Triton's launcher would compile for these arguments."""
    fn, args, options = launch[:3]
    values = dict(zip(fn.arg_names, args, strict=False)) | {n: v for n, v in options.items() if n in fn.arg_names}
    signature, constants, attributes = {}, {}, {}

    def kind(value, path, constant=False, plain=False):
        """The signature's entry for a value, or one per element of a tuple. The value of a number doesn't matter."""
        if isinstance(value, tuple):
            return tuple(kind(part, (*path, i)) for i, part in enumerate(value))
        if plain:
            return "i32"
        if isinstance(value, TensorDescriptor):
            return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        if constant or value is None or (isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return "*" + TYPES[value.dtype]
        return "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"

    for i, name in enumerate(fn.arg_names):
        signature[name] = kind(values[name], (i,), fn.params[i].is_constexpr, fn.params[i].do_not_specialize)
    return ASTSource(fn, signature, constants, attributes)


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and the bytes of stack per thread, which hold spilled registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(re.search(r"\bREG:(\d+)", text)[1]), int(re.search(r"\bSTACK:(\d+)", text)[1])


def instructions_of(cubin: bytes) -> int:
    """The number of instructions: the size of the ELF file's executable sections, at 16 bytes per instruction."""
    (start,), (size, count) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, start + size * i) for i in range(count)]
    return sum(length for _, _, flags, _, _, length in sections if flags & EXECUTABLE) // 16


def described(options: dict) -> str:
    """The tiles, warps and stages of a launch, and its variant."""
    tiles = [f"{name.removeprefix('BLOCK_')}={value}" for name, value in options.items() if name.startswith("BLOCK")]
    variant = [str(v) for v in options.values() if isinstance(v, str)] + [n for n, v in options.items() if v is True]
    return " ".join([*tiles, f"warps={options['num_warps']} stages={options.get('num_stages', 3)}", *variant])


def dtype_of(launch: Launch) -> str:
    tensors = (a.base if isinstance(a, TensorDescriptor) else a for a in launch.args)
    return next(TYPES[a.dtype] for a in tensors if isinstance(a, torch.Tensor))


def wanted(launch: Launch, sm: int) -> bool:
    """float16 programs equal bfloat16 programs except for the type, so one of them is enough."""
    return sm // 10 in launch.cards and (sm == 90 or dtype_of(launch) != "fp16")


def buffers(launch: Launch) -> int:
    """Bytes of an encoder's tiles if their loads are pipelined; sm_80 keeps one stage in registers."""
    tiles = {"filter_kernel": 1, "bulk_filter_kernel": 1, "encode_project_kernel": 2}.get(launch.fn.__name__, 0)
    if not tiles:
        return 0
    D, T, F = (launch.options[f"BLOCK_{name}"] for name in "DTF")
    return tiles * D * (T + F) * WIDTHS[dtype_of(launch)] * (launch.options["num_stages"] - 1)


def compile_one(launch: Launch, sm: int) -> Line:
    settings = {k: v for k, v in launch.options.items() if k in SETTINGS}
    compiled = triton.compile(source(launch), target=GPUTarget("cuda", sm, 32), options=settings)
    cubin = compiled.asm["cubin"]
    registers, spills = registers_and_stack(cubin)
    unit = " ".join(sorted(set(MATRIX_UNIT.findall(compiled.asm["ptx"]))))
    shared, wrong = compiled.metadata.shared, None
    if spills or shared > SHARED[sm]:
        wrong = f"spills {spills} bytes, shared memory {shared} of {SHARED[sm]}"
    elif shared < buffers(launch):
        wrong = f"shared memory {shared}: loads are not pipelined, which takes {buffers(launch)}"
    elif MEANT_FOR_IT.search(compiled.asm["ttir"]) and not unit:
        wrong = "no tensor-core instruction"
    dtype = dtype_of(launch)
    name, config = launch.fn.__name__, described(launch.options)
    untuned = sm // 10 in launch.untuned
    return Line(
        name, config, f"sm_{sm}", dtype, registers, spills, shared, instructions_of(cubin), unit, wrong, untuned
    )


def compile_numbered(job: tuple[int, int]) -> Line:
    """Runs in its own process, which gets the recorded launches from its parent."""
    return compile_one(list(launches.values())[job[0]], job[1])


def run_relevancy(
    dtype: torch.dtype, C: int, N: int, dh: int, gated: bool = True, rows_dtype: torch.dtype = torch.float32
) -> None:
    B, H = 2, 12
    q, k, v = torch.zeros(B, N, 3, H, dh, dtype=dtype).permute(2, 0, 3, 1, 4)
    rows = torch.zeros(C, B, N, dtype=rows_dtype)
    relevancy.relevancy(rows, q, k, v, q, dh**-0.5, rows if gated else None, not gated)


def run_gated_relevancy(dtype: torch.dtype, C: int, P: int) -> None:
    B, H, d, F, K = 2, 12, 768, 4096, 128
    q, k, v = torch.zeros(B, P + 1, 3, H, 64, dtype=dtype).permute(2, 0, 3, 1, 4)
    g, W_dec, values = (torch.zeros(*shape, dtype=dtype) for shape in ((B, P + 1, d), (F, d), (B, P, K)))
    gated = (g[:, 1:], W_dec, values, values.long(), torch.ones(C), torch.ones(C))
    gated_relevancy.gated_relevancy(torch.zeros(C, B, P + 1), q, k, v, q, 0.125, *gated, False)


def run_adam_topk(x: torch.Tensor, W_dec: torch.Tensor, indices: torch.Tensor) -> None:
    codes = (W_dec[: len(x), : indices.shape[1]].contiguous(), indices)
    state = [W_dec.mT, W_dec[:, 0].contiguous(), W_dec]
    for aux in ((None, None, None), (x, *codes)):
        adam_topk.adam_topk(x, x, *codes, *aux, state, state, state, 1e-3, 0.9, 0.999, 1e-8, 2, True)


def run_the_ops(dtype: torch.dtype, every: bool = True) -> None:
    """Run each op on small inputs with the strides of a real model, with all candidates or only the first."""
    T, d, F, K = 64, 768, 49152, 128
    x, W_enc, W_dec = torch.zeros(T, d, dtype=dtype), torch.zeros(d, F, dtype=dtype), torch.zeros(F, d, dtype=dtype)
    b_enc, b_dec, indices = W_enc[0], W_dec[0], torch.zeros(T, K, dtype=torch.int64)
    now.update(every=every)
    for C in (1, 3):
        run_relevancy(dtype, C, 197, 64)
    project.project(x, W_dec, W_dec[:T, :K], indices)
    for layout in (W_enc, W_dec.T):
        encode_topk.encode_topk(x, layout, b_enc, b_dec, K)
    decode_topk.decode_topk(W_dec[:T, :K], indices, W_dec, b_dec)
    if dtype == torch.float32:
        run_adam_topk(x, W_dec[:4096], indices)
    run_encode_project = partial(encode_project.encode_project, x, x, W_enc, b_enc, W_dec)
    run_encode_project("relu", *[b_enc] * 4)
    if not every:
        return
    for C in (1, 3):
        run_gated_relevancy(dtype, C, 4096)
    now.update(every=False)
    others = ("gated", "tanh_relu", "jumprelu", "batch_topk")
    for activation in others[: 1 if dtype == torch.float32 else None]:
        run_encode_project(activation, *[b_enc] * 4)
    encode_topk.encode_topk(x, W_enc[:, :4096], b_enc[:4096], b_dec, 4096)
    for C, dh in ((1, 128), (3, 128), (3, 32)):
        run_relevancy(dtype, C, 197, dh, gated=False)
    for C in (1, 3):
        run_relevancy(dtype, C, 197, 64, rows_dtype=torch.float64)
    for P in (196, 4096):
        gate.gate(torch.zeros(2, P), torch.ones(2), torch.ones(2))
        run_gated_relevancy(dtype, 1, P)
    with unittest.mock.patch.object(relevancy, "PROGRAMS", 1):  # heads not split among programs
        run_relevancy(dtype, 1, 197, 64)


def markdown(lines: list[Line]) -> str:
    """One row per kernel and architecture: of the default's variants, the one that needs the most registers."""
    rows: dict[tuple, Line] = {}
    for line in sorted(lines, key=lambda line: line.registers):
        if line.untuned and line.dtype != "fp16":
            rows[line.kernel, line.dtype, line.arch] = line
    text = "| kernel | numbers | card | tiles, variant | registers | shared memory | instructions | matrix unit |\n"
    text += "| --- | --- | --- | --- | ---: | ---: | ---: | --- |\n"
    for (kernel, dtype, arch), line in sorted(rows.items()):
        sizes = f"{line.registers} | {line.shared:,} | {line.instructions:,} | {line.unit.replace(' ', ', ') or '-'}"
        text += f"| `{kernel}` | {dtype} | {arch} | {line.config} | {sizes} |\n"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table of untuned kernels there")
    options = parser.parse_args()
    JITFunction.run, tuning.choose = record, choose
    for dtype in (torch.float32, torch.bfloat16):
        run_the_ops(dtype)
    run_the_ops(torch.float16, every=False)
    jobs = [(n, sm) for sm in SHARED for n, launch in enumerate(launches.values()) if wanted(launch, sm)]
    lines = []
    with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
        for line in pool.imap(compile_numbered, jobs):
            print(line, flush=True)
            lines.append(line)
    if options.markdown:
        options.markdown.write_text(markdown(lines), encoding="utf-8")
    wrong = [f"{line.kernel} {line.arch} {line.dtype} {line.config}: {line.wrong}" for line in lines if line.wrong]
    print("\n".join(wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
