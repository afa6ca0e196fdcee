"""The far side of `tests/support/pool.py`: a zygote that imports torch once and forks workers, and the worker's loop.

The zygote is a fresh interpreter that never starts a thread, a process group or a backward pass, so forking it is safe
and a new worker costs milliseconds instead of the seconds an import of torch takes. It obeys three requests on its
control socket: fork a worker around the file descriptor sent along, reap a dead worker, die (the socket's end).
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import os
import pickle
import random
import signal
import socket
import struct
import sys
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, NoReturn

# torch._dynamo is what the first torch.optim.Optimizer imports (2 s): pay once, before the forks.
_PRELOAD = ("numpy", "torch", "torch.distributed", "torch.optim", "torch._dynamo", "pytest", "hypothesis", "fusedfog")
_LENGTH = struct.Struct("!I")
_SETTING_UP = timedelta(seconds=30)


def send_frame(sock: socket.socket, message: Any, fds: tuple[int, ...] = ()) -> None:
    """Send one pickled control message, with file descriptors riding on its first bytes."""
    body = pickle.dumps(message)
    socket.send_fds(sock, [_LENGTH.pack(len(body))], list(fds))
    sock.sendall(body)


def recv_frame(sock: socket.socket) -> tuple[Any, list[int]]:
    """Receive one control message and the descriptors sent with it; raises EOFError when the other side is gone."""
    head, fds, _, _ = socket.recv_fds(sock, _LENGTH.size, 1)
    if len(head) < _LENGTH.size:
        raise EOFError
    body = b""
    while len(body) < _LENGTH.unpack(head)[0]:
        part = sock.recv(65536)
        if not part:
            raise EOFError
        body += part
    return pickle.loads(body), fds


def _die_with_parent() -> None:
    # Without this a worker that hangs inside a test would outlive a killed pytest. Elsewhere the zygote kills by hand.
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _reap(pid: int, grace: float) -> int | None:
    """Exit status of a worker in `os.waitstatus_to_exitcode` form; killed if it still lives after `grace` seconds."""
    deadline = time.monotonic() + grace
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None


def zygote(control: socket.socket, stack_dir: str) -> None:
    """Serve fork and reap requests until the control socket closes, then take every worker down."""
    for name in _PRELOAD:
        # A broken import is reported by the test that needs it, in the worker, not here.
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
    send_frame(control, {"pid": os.getpid(), "threads": threads})
    alive: set[int] = set()
    try:
        while True:
            request, fds = recv_frame(control)
            if request["do"] == "fork":
                pid = os.fork()
                if pid == 0:
                    control.close()
                    _die_with_parent()
                    worker(Connection(fds[0]), stack_dir)
                os.close(fds[0])
                alive.add(pid)
                send_frame(control, pid)
            else:
                alive.discard(request["pid"])
                send_frame(control, _reap(request["pid"], request["grace"]))
    except (EOFError, OSError):
        pass
    finally:
        for pid in alive:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def worker(conn: Connection, stack_dir: str) -> NoReturn:
    """Run one task after another; leaves through os._exit so that no state inherited from the zygote is finalized."""
    with open(os.path.join(stack_dir, f"{os.getpid()}.stack"), "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to pytest, which then closes the pool
        environ, cwd = dict(os.environ), os.getcwd()
        try:
            while True:
                reply = _task(pickle.loads(conn.recv_bytes()))
                os.environ.clear()
                os.environ.update(environ)
                os.chdir(cwd)
                conn.send_bytes(reply)
        except (EOFError, OSError):
            pass
        finally:
            os._exit(0)


def _prepare(task: dict[str, Any]) -> None:
    """Give every task the same start, whatever ran in this worker before it."""
    import numpy as np
    import torch

    sys.path[:0] = [p for p in task["sys_path"] if p not in sys.path]
    os.environ.update(task["env"])
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def _open_world(task: dict[str, Any]) -> None:
    import torch.distributed as dist

    limit = timedelta(seconds=task["pg_timeout"])
    store = dist.FileStore(task["store"], task["world_size"])
    store.set_timeout(limit)
    # However short a timeout is tested: on a busy machine a process may begin later than the others by more than that.
    _meet(store, "come", task["world_size"], max(limit, _SETTING_UP))
    dist.init_process_group("gloo", store=store, rank=task["rank"], world_size=task["world_size"], timeout=limit)
    # Nobody may leave before everybody is in: a rank that fails at once would break the others' connecting instead of
    # what the test is about.
    _meet(store, "opened", task["world_size"], max(limit, _SETTING_UP))


def _meet(store: Any, what: str, world_size: int, limit: timedelta) -> None:
    if store.add(f"pool/{what}", 1) == world_size:
        store.set(f"pool/all/{what}", "in")
    store.wait([f"pool/all/{what}"], limit)


def _is_spent(reply: dict[str, Any]) -> bool:
    """Whether this process should not serve another task.

    After an error anything may be left behind; and torch counts groups per process to name them in the store, a count
    that a failed `init_process_group` leaves raised, so that this rank would never meet the others again.
    """
    import torch.distributed.distributed_c10d as c10d

    return "error" in reply or getattr(c10d._world, "group_count", 0) != 0


def _task(task: dict[str, Any]) -> bytes:
    import torch.distributed as dist

    reply: dict[str, Any] = {"seconds": 0.0}
    try:
        _prepare(task)
        fn, args, kwargs = pickle.loads(task["call"])
        if task["init"]:
            _open_world(task)
        start = time.perf_counter()
        try:
            value = fn(*args, **kwargs)
        finally:
            reply["seconds"] = time.perf_counter() - start
        reply["value"] = pickle.dumps(value)
        del value
    except BaseException as error:  # SystemExit of a rank is a result to report, not the end of the worker
        reply.pop("value", None)
        reply["error"] = (type(error).__name__, str(error), traceback.format_exc())
        # The traceback's frames hold optimizers and works, which must go before their group does.
        traceback.clear_frames(error.__traceback__)
        del error
    fn = args = kwargs = None
    gc.collect()
    try:
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException as error:
        reply.setdefault("error", (type(error).__name__, f"while closing the world: {error}", traceback.format_exc()))
    reply["spent"] = _is_spent(reply)
    return pickle.dumps(reply)


if __name__ == "__main__":
    zygote(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
