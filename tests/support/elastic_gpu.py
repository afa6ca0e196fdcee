"""An elastic run of "GPUs": tensors on the CPU that count as a GPU's, over the backend that keeps NCCL's rules.

    def train():
        with elastic_gpu.pretend(silent=True):          # in a process of `Members`
            fusedfog.init(elastic=True)
            ...

The default group has gloo for them, as torch knows them as CPU tensors; the communicator of an epoch is NCCL's stand-in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.distributed as dist

from fusedfog.comm import communicator, join
from fusedfog.comm.elastic import nccl
from fusedfog.optim import build
from support import fake_cuda, ordered_backend


@contextmanager
def pretend(*, silent: bool) -> Iterator[fake_cuda.Gpu]:
    """Inside, this process has a GPU, and `init` takes it.

    Args:
        silent: whoever waits for a rank that has died learns nothing of it; otherwise NCCL has an error.
    """
    ordered_backend.load()
    ordered_backend.silence(silent)
    with ExitStack() as stack:
        gpu = stack.enter_context(fake_cuda.pretend())
        for where, name, value in (
            (torch.cuda, "is_available", lambda: True),
            (join, "_pick_device", lambda backend, launch: torch.device("cuda", 0)),
            (dist, "is_nccl_available", lambda: True),
            (nccl, "NCCL", "ordered"),
            # They ask the default group for the backend of tensors that are only said to be on a GPU.
            (communicator, "check_backend", lambda view, place: None),
            (communicator, "nccl_options", lambda view, place, timeout, comm_sms: None),
            (build, "check_backend", lambda view, place: None),
        ):
            stack.enter_context(mock.patch.object(where, name, value))
        yield gpu
