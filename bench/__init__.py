"""Benchmarks of each op, of ``fastfg.attribute`` and of ``fastfg.evaluate``, beside other implementations.

    pytest bench/                    every suite; small sizes on a CPU, full sizes on a CUDA device
    pytest bench/bench_project.py    one suite, named after its op
        --size small|full            choose the size
        --save                       append one line per benchmark to bench/results/<device>/<suite>.jsonl
        --results DIR                append to DIR/<device>/<suite>.jsonl
    python -m bench.report           make tables from these lines

A provider is timed only after its result matched the reference in float64.
"""

import torch

torch.backends.cudnn.allow_tf32 = False  # a TF32 convolution keeps only three digits of float32
