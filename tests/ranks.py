"""Processes that talk over gloo, started once for all tests of a session, to run functions of the test modules as their ranks."""

from __future__ import annotations

import importlib
import io
import multiprocessing
import tempfile
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE_S = 120


def _serve(rank: int, size: int, store: str, requests: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE_S)
    )
    while (request := requests.recv()) is not None:
        module, name, args = request
        answer = io.BytesIO()
        try:
            torch.manual_seed(0)
            torch.save((True, getattr(importlib.import_module(module), name)(rank, *args)), answer)
        except Exception:
            answer = io.BytesIO()
            torch.save((False, traceback.format_exc()), answer)
        requests.send_bytes(answer.getvalue())
    dist.destroy_process_group()


class Ranks:
    """``size`` processes, one group. A function that raises in one of them fails the test with its traceback."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, store, theirs), daemon=True)
            process.start()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, function: Any, *args: Any) -> list[Any]:
        """``function(rank, *args)`` of each rank, which all call at once."""
        for connection in self._connections:
            connection.send((function.__module__, function.__name__, args))
        answers = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(PATIENCE_S):
                raise TimeoutError(f"rank {rank} does not answer")
            answers.append(torch.load(io.BytesIO(connection.recv_bytes()), weights_only=False))
        failed = [f"rank {rank}: {answer}" for rank, (done, answer) in enumerate(answers) if not done]
        if failed:
            raise RuntimeError("\n".join(failed))
        return [answer for _, answer in answers]

    def close(self) -> None:
        for connection, process in zip(self._connections, self._processes, strict=True):
            try:
                connection.send(None)
            except OSError:
                continue
            process.join(5)
        for process in self._processes:
            process.kill()
        self._folder.cleanup()
