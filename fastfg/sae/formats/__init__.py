"""The formats of SAE files, one module for each. They are told apart by the content of the files."""

from fastfg.sae.formats import (
    batch_topk,
    by_sight,
    clipscope,
    dictionary_learning,
    gemma_scope,
    openai,
    overcomplete,
    own,
    patchsae,
    prisma,
    saelens,
    saev,
    sparsify,
)

FORMATS = (
    own,
    prisma,
    saelens,
    sparsify,
    dictionary_learning,
    saev,
    patchsae,
    openai,
    overcomplete,
    clipscope,
    batch_topk,
    gemma_scope,
    by_sight,
)
