"""Train a ResNet on Fashion-MNIST, CIFAR-10 or a folder of pictures, as one process or as one a GPU under torchrun.

    python examples/train.py --output run
    torchrun --nproc-per-node 8 examples/train.py --data FOLDER --model resnet50 --dtype bf16 --output run

A run that was stopped, by whatever, goes on from its last checkpoint when the same command is given again. In its folder
losses.csv gets a row a step, evaluation.csv one an epoch: of the network and of its exponential moving average (EMA).
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
from image_data import SMALL, Batches, Data, load, test_batches, training_batches
from run_folder import RunFolder
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from train_options import parsed, settings

import resnet_fused
from resnet_fused import models, networks
from resnet_fused.console import UsageError, progress_bar, require_rich
from resnet_fused.images import UnreadableImage


class Stopped(Exception):
    """Training cannot go on, with the reason in one line."""


class World(NamedTuple):
    """This process among those that train together."""

    rank: int
    ranks: int
    device: torch.device

    def reduced(self, value: Tensor, op: Any = distributed.ReduceOp.SUM) -> Tensor:
        """``value`` of all processes together, in its place."""
        if self.ranks > 1:
            distributed.all_reduce(value, op)
        return value


def join(device: str, timeout: int) -> World:
    """Meet the other processes that torchrun started, if it did."""
    place = torch.device(device)
    if "WORLD_SIZE" not in os.environ:
        return World(0, 1, place)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    # Signals and losses are reduced on the host, which no GPU has to wait for.
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(seconds=timeout))
    return World(distributed.get_rank(), distributed.get_world_size(), place)


def network(options: argparse.Namespace, data: Data, device: torch.device) -> nn.Module:
    """The network, of the same values whether stock or fused; small and grey pictures get another stem."""
    if options.sync_bn and options.stock and device.type == "cpu":
        raise UsageError("--sync-bn with --stock: torch.nn.SyncBatchNorm takes no tensors on a processor")
    torch.manual_seed(options.seed)
    build: Any = partial(networks.stock_model, options.model) if options.stock else models.BUILDERS[options.model]
    model = build(num_classes=data.classes)
    if data.size <= SMALL or len(data.mean) != 3:
        model.conv1 = nn.Conv2d(len(data.mean), 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    if options.sync_bn:
        convert = nn.SyncBatchNorm.convert_sync_batchnorm if options.stock else resnet_fused.convert_sync_batchnorm
        model = convert(model)
    return model.to(device, memory_format=torch.channels_last)


class Training:
    """A run: the state that a checkpoint holds, and the steps that change it."""

    def __init__(self, options: argparse.Namespace, world: World) -> None:
        self.options, self.world, self.folder = options, world, RunFolder(options.output)
        self.data = load(options.data, options.size, options.seed)
        self.together = options.batch * options.accumulate * world.ranks
        self.steps = -(-len(self.data.train) // self.together)  # of an epoch
        self.total = self.steps * options.epochs
        self.step = self.epoch = self.received = 0  # finished steps and epochs; a signal to stop
        self.trained_s, self.since = 0.0, time.perf_counter()
        self.pending: list[tuple[float, Tensor]] = []  # rate and loss of the steps that have no row yet
        self.network = network(options, self.data, world.device)
        self.ema = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(options.ema_decay), use_buffers=True)
        if options.compile:
            self.network.compile()
        self.model: Any = self.network
        if world.ranks > 1:
            # DDP sorts its buckets anew behind its first step, and with that the order of three or more summands; a run that goes
            # on has another first step. Where unused parameters are looked for DDP leaves the buckets alone.
            device_ids = [world.device] if world.device.type == "cuda" else None
            self.model = DistributedDataParallel(self.network, device_ids, find_unused_parameters=options.deterministic)
        parameters = list(self.network.parameters())
        decayed = {"params": [p for p in parameters if p.dim() > 1], "weight_decay": options.weight_decay}
        groups = [decayed, {"params": [p for p in parameters if p.dim() <= 1]}]
        self.optimizer = torch.optim.SGD(groups, options.lr, options.momentum, nesterov=options.momentum > 0)
        self.schedule = LambdaLR(self.optimizer, self._rate)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=options.dtype == "fp16")
        self.stateful = {"network": self.network, "ema": self.ema, "optimizer": self.optimizer}
        self.stateful |= {"schedule": self.schedule, "scaler": self.scaler}
        self.settings = settings(options) | {"device": world.device.type, "processes": world.ranks}
        self.settings |= {"pictures": len(self.data.train), "classes": self.data.classes}

    def _rate(self, step: int) -> float:
        """The factor of the learning rate: a straight line up, then half a cosine down."""
        warm = int(self.total * self.options.warmup)
        if step < warm:
            return (step + 1) / (warm + 1)
        return (1 + math.cos(math.pi * (step - warm) / (self.total - warm))) / 2

    def _save(self) -> None:
        # No state of random numbers: every draw has its own seed.
        if self.world.rank == 0:
            state: dict[str, Any] = {name: part.state_dict() for name, part in self.stateful.items()}
            state |= {"settings": self.settings, "step": self.step, "epoch": self.epoch, "trained_s": self.trained_s}
            self.folder.save(state)
        self.since = time.perf_counter()

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        state = self.folder.load(self.settings) if self.options.resume == "auto" else None
        if state is not None:
            for name, part in self.stateful.items():
                part.load_state_dict(state[name])
            self.step, self.epoch, self.trained_s = state["step"], state["epoch"], state["trained_s"]
        if int(self.world.reduced(torch.tensor(self.step))) != self.step * self.world.ranks:
            raise UsageError(f"--output: not every process sees the same checkpoint in {self.options.output}")
        if self.world.rank == 0:
            self.folder.cut(self.step, self.epoch)

    def _answers(self, model: nn.Module, x: Tensor) -> Tensor:
        dtype = networks.DTYPES[self.options.dtype]
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            return model(x).float()

    def _train_step(self, batches: Batches) -> None:
        accumulate, smoothing = self.options.accumulate, self.options.label_smoothing
        whole = torch.zeros((), device=self.world.device)
        for number in range(accumulate):
            x, y = next(batches)
            alone = self.world.ranks > 1 and number < accumulate - 1
            with self.model.no_sync() if alone else nullcontext():
                loss = F.cross_entropy(self._answers(self.model, x), y, label_smoothing=smoothing) / accumulate
                self.scaler.scale(loss).backward()
            whole += loss.detach()
        self.pending.append((self.schedule.get_last_lr()[0], whole))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.ema.update_parameters(self.network)
        self.step += 1

    def _write(self) -> None:
        """Rows for the pending steps, with the mean loss of all processes; Stopped where it is no finite number."""
        if not self.pending:
            return
        losses = self.world.reduced(torch.stack([loss for _, loss in self.pending]).double().cpu()) / self.world.ranks
        now = time.perf_counter()
        speed = len(self.pending) * self.together / (now - self.since)
        self.trained_s, self.since = self.trained_s + now - self.since, now
        first = self.step - len(self.pending) + 1
        rows = [
            (self.epoch + 1, step, loss, rate, round(speed, 1))
            for step, (rate, _), loss in zip(range(first, self.step + 1), self.pending, losses.tolist(), strict=True)
        ]
        self.pending = []
        for _, step, loss, *_ in rows:
            if not math.isfinite(loss):
                raise Stopped(f"step {step}: the loss is {loss}; a smaller --lr or a longer --warmup may help")
        if self.world.rank == 0:
            self.folder.add_losses(rows)

    def _halts(self) -> bool:
        """Whether any process was told to stop, or --max-steps are done."""
        self.received = int(self.world.reduced(torch.tensor(self.received), distributed.ReduceOp.MAX))
        return self.received > 0 or self.step >= self.options.max_steps

    def _train_epoch(self, advance: Callable[[], None]) -> None:
        options, world, pictures = self.options, self.world, self.data.train
        done = self.step - self.epoch * self.steps
        start, stop = done * options.accumulate, self.steps * options.accumulate
        place = {"seed": options.seed, "epoch": self.epoch, "rank": world.rank, "ranks": world.ranks}
        keys = training_batches(len(pictures), options.batch, start, stop, **place)
        batches = self.data.batches(pictures, keys, options.workers, world.device)
        self.model.train()
        self.since = time.perf_counter()
        for _ in range(done, self.steps):
            if self._halts():
                break
            self._train_step(batches)
            advance()
            due = self.step % options.checkpoint_every == 0
            if due or self.step % options.log_every == 0:
                self._write()
            if due:
                self._save()
        self._write()

    @torch.inference_mode()
    def _evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Accuracy and mean loss over the test pictures of all processes."""
        model.eval()
        world, pictures = self.world, self.data.test
        sums = torch.zeros(2, dtype=torch.float64, device=world.device)
        keys = test_batches(len(pictures), self.options.batch, world.rank, world.ranks)
        for x, y in self.data.batches(pictures, keys, self.options.workers, world.device):
            answers = self._answers(model, x)
            right, loss = (answers.argmax(1) == y).sum(), F.cross_entropy(answers, y, reduction="sum")
            sums += torch.stack([right.double(), loss.double()])
        accuracy, mean_loss = (world.reduced(sums) / len(pictures)).tolist()
        return accuracy, mean_loss

    def _finish_epoch(self) -> None:
        if self.world.ranks > 1:  # running statistics are each process's own; the checkpoint has those of the first
            for buffer in (*self.network.buffers(), *self.ema.buffers()):
                distributed.broadcast(buffer, 0)
        values = (*self._evaluate(self.network), *self._evaluate(self.ema))
        self.epoch += 1
        if self.world.rank == 0:
            self.folder.add_evaluation((self.epoch, self.step, *values, round(self.trained_s, 2)))
            right = f"{100 * values[0]:.2f} % right, EMA {100 * values[2]:.2f} %"
            print(f"epoch {self.epoch}: {right}, {self.trained_s:.1f} s of training", flush=True)

    def fit(self) -> None:
        """Train to the end or until told to stop; the checkpoint is of where it ends."""
        bar = progress_bar()
        bar.disable = self.world.rank > 0 or not sys.stderr.isatty()
        with bar:
            task = bar.add_task(self.options.model, total=self.total, completed=self.step)
            while self.epoch < self.options.epochs:
                self._train_epoch(lambda: bar.advance(task))
                if not (halted := self._halts()):
                    self._finish_epoch()
                self._save()
                if halted:
                    return


@contextmanager
def stopped_by_signals(training: Training) -> Iterator[None]:
    """SIGTERM and SIGINT end the training behind the step that is being made."""

    def remember(number: int, _: Any) -> None:
        training.received = number

    before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(options: argparse.Namespace) -> int:
    """Train as the options say; the exit code."""
    require_rich()
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not options.deterministic
    training = Training(options, join(options.device, options.timeout))
    training.resume()
    with stopped_by_signals(training):
        training.fit()
    if training.world.ranks > 1:
        distributed.barrier()  # torchrun ends all when one ends, and the first may still be writing
        distributed.destroy_process_group()
    return 128 + training.received if training.received else 0


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        return run(parsed(arguments, __doc__))
    except (UsageError, UnreadableImage, Stopped) as error:
        # A loader's process sends its traceback along: the reason is in the last line.
        print(f"train.py: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    sys.exit(main())
