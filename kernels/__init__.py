"""One pass over flat buffers: mix the neighbours' messages, apply an update rule, write back.

CUDA tensors take the Triton kernel of `fused_pass`, CPU tensors torch's own kernels in the batches of `cpu_pass`, or the
plain torch of `torch_pass`. A new rule is one function in `rules.py` and its twin in `reference.py`. What a method does
before and after its exchange are two rules.
"""

from __future__ import annotations

from . import cpu_pass, reference
from .compiled import RULES as COMPILED_RULES
from .compiled import compile_now
from .hyper import adam_hyper, sgd_hyper
from .passes import Compression, GradientInputs, Mixing, Pass, Precision
from .region import BLOCK, Gradients, Region
from .wire import CompressedChannel

__all__ = [
    "BLOCK",
    "COMPILED_RULES",
    "RULES",
    "CompressedChannel",
    "Compression",
    "GradientInputs",
    "Gradients",
    "Mixing",
    "Pass",
    "Precision",
    "Region",
    "adam_hyper",
    "compile_now",
    "run_pass",
    "sgd_hyper",
    "warm_pass",
]

RULES: tuple[str, ...] = tuple(reference.RULES)
"""Names of the update rules; `reference` describes each."""


def run_pass(work: Pass) -> None:
    """Make a pass; see `Pass` for what it does.

    Raises:
        ValueError: for an unknown rule or `missing`, lengths of sent, inbox and weights or of states and messages that
            disagree with each other or with the rule, and on CUDA for fp64 or a missing table.
    """
    work.check(reference.RULES)
    if work.param.is_cuda:
        from .fused_pass import launch as run
    else:
        run = cpu_pass.run_pass
    run(work)


def warm_pass(work: Pass) -> None:
    """Compile what `run_pass` would run of a pass on a GPU, and run nothing; on the CPU there is nothing to compile.

    Raises:
        ValueError: as `run_pass`.
    """
    work.check(reference.RULES)
    if work.param.is_cuda:
        from .fused_pass import warm

        warm(work)
