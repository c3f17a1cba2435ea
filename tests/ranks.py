"""Processes that talk over gloo, started once for all tests of a session, to run functions of the test modules as their ranks."""

from __future__ import annotations

import importlib
import io
import multiprocessing
import os
import sys
import tempfile
import traceback
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

PATIENCE_S = 120


def _serve(rank: int, size: int, store: str, timeout_s: float, requests: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
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
    """``size`` processes, one group. A function that raises in one of them fails the test with its traceback.

    ``timeout_s``: how long a collective waits for the others.
    """

    def __init__(self, size: int, timeout_s: float = PATIENCE_S) -> None:
        # One process imports PyTorch, which takes seconds, and is copied before it computes anything.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["distributed_cases"])
        with mock.patch.dict(
            os.environ, PYTHONPATH=os.pathsep.join(sys.path)
        ):  # the server has no other way to know it
            forkserver.ensure_running()
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, store, timeout_s, theirs), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def run(self, function: Any, *args: Any) -> list[Any]:
        """``function(rank, *args)`` of each rank, which all call at once."""
        self.begin(function, *args)
        answers = [self.answer(rank) for rank in range(len(self._connections))]
        failed = [f"rank {rank}: {answer}" for rank, (done, answer) in enumerate(answers) if not done]
        if failed:
            raise RuntimeError("\n".join(failed))
        return [answer for _, answer in answers]

    def begin(self, function: Any, *args: Any) -> None:
        for connection in self._connections:
            connection.send((function.__module__, function.__name__, args))

    def answer(self, rank: int) -> tuple[bool, Any]:
        """Whether a rank came through, and what it returned or its traceback."""
        if not self._connections[rank].poll(PATIENCE_S):
            raise TimeoutError(f"rank {rank} does not answer")
        return torch.load(io.BytesIO(self._connections[rank].recv_bytes()), weights_only=False)

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
