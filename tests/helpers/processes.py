"""Ranks in processes of their own, joined by gloo, that run one function after another."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

# What one call may take on a machine that does other things too.
LIMIT_S = 120.0
# ... and how long others may go on when one has failed, for which they may be waiting.
GRACE_S = 10.0


# What cannot be imported is left out.
_IMPORTED = [
    "warpform.distributed",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
]


class Failed:
    """What a rank raised."""

    def __init__(self, error: BaseException) -> None:
        self.text = "".join(traceback.format_exception(error))


def _serve(rank: int, size: int, store: str, connection: Connection, timeout_s: float) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    # Connections to the outside are not needed, and a host name that resolves to nothing would cost the time-out.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        rank=rank,
        world_size=size,
        store=dist.FileStore(store, size),
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    while True:
        function, arguments, seed = connection.recv()
        torch.manual_seed(seed)
        try:
            result = function(*arguments)
        except Exception as error:
            result = Failed(error)
        connection.send(result)


class Processes:
    """Processes with ranks 0 to size - 1 of one default group.

    They are forked from a server that has imported what takes long: seconds once, and little for each process.
    """

    def __init__(self, size: int, timeout_s: float = LIMIT_S) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_IMPORTED)
        self._folder = tempfile.TemporaryDirectory()
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, f"{self._folder.name}/store", theirs, timeout_s), daemon=True
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Calls a function of an importable module on every rank. Their results.

        Random numbers are the same on all ranks and follow from this process's seed of torch, whatever ran before.

        Raises:
            AssertionError: with the traceback, where one raised.
        """
        results = self.try_run(function, *arguments)
        for rank, result in enumerate(results):
            assert not isinstance(result, Failed), f"on rank {rank} of {len(results)}:\n{result.text}"
        return results

    def try_run(
        self, function: Callable[..., Any], *arguments: Any, without: tuple[int, ...] = (), limit_s: float = LIMIT_S
    ) -> list[Any]:
        """The same, with Failed for ranks that raised, and None for those of `without`, which are not waited for."""
        seed = int(torch.randint(2**31, ()))
        for connection in self.connections:
            connection.send((function, arguments, seed))
        results: list[Any] = [None] * len(self.connections)
        waiting = {c: r for r, c in enumerate(self.connections) if r not in without}
        end = time.monotonic() + limit_s
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                silent = f"ranks {sorted(waiting.values())} of {len(results)} gave no answer within {limit_s} s"
                failures = [f"rank {r}:\n{one.text}" for r, one in enumerate(results) if isinstance(one, Failed)]
                raise AssertionError("\n".join([silent, *failures]))
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[call-overload]
                try:
                    results[rank] = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    results[rank] = Failed(RuntimeError(f"the process of rank {rank} is gone"))
                if isinstance(results[rank], Failed):
                    end = min(end, time.monotonic() + GRACE_S)
        return results

    def close(self) -> None:
        """Ends the processes, stopped ones too."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for connection in self.connections:
            connection.close()
        self._folder.cleanup()
