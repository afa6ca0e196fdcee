"""The mutexes of a window's edges: for programs that agree to exclude each other."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from support.windows import TRANSPORTS, transport

import fusedfog


def guarded(how: str, folder: str) -> float:
    """Sender and receiver of an edge add to a number in a file; without the mutex they would lose some."""
    rank, path = dist.get_rank(), os.path.join(folder, "number")
    if rank == 0:
        with open(path, "w") as file:
            file.write("0")
    x = torch.zeros(1)
    with transport(how), fusedfog.Window(x, [(0, 1)]) as window:
        dist.barrier()
        for _ in range(30):
            with window.mutex(own=rank == 1):
                with open(path) as file:
                    number = int(file.read())
                time.sleep(0.001)
                with open(path, "w") as file:
                    file.write(str(number + 1))
        dist.barrier()
        with open(path) as file:
            return int(file.read())


@pytest.mark.parametrize("how", TRANSPORTS)
def test_a_mutex_excludes_the_other_end_of_its_edge(ranks: Pool, how: str, tmp_path: Any) -> None:
    assert ranks.run(2, guarded, how, str(tmp_path)) == [60, 60]


def mutex_held() -> str:
    x = torch.zeros(1)
    with fusedfog.Window(x, [(0, 1)]) as window:
        text = ""
        if dist.get_rank() == 1:
            with window.mutex(own=True):
                dist.barrier()
                dist.barrier()
        else:
            dist.barrier()
            with pytest.raises(fusedfog.PeerTimeout) as error, window.mutex(timeout=0.2):
                pass
            text = str(error.value)
            dist.barrier()
            with window.mutex(timeout=20):  # The claim that timed out is forgotten.
                pass
        dist.barrier()
        return text


def test_a_mutex_that_is_held_too_long_is_an_error_that_names_the_edge_s_other_end(ranks: Pool) -> None:
    assert "mutex: nothing from rank 1 within 0.2 s" in ranks.run(2, mutex_held)[0]
