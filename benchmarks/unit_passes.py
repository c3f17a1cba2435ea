"""The passes over memory of a training step, unit by unit, in stock PyTorch, torch.compile and on the Triton backend.

A unit is a convolution with its batch norm, ReLU and residual addition, forward and backward. A plan lists the passes of each
unit with bytes and flop: the least a pass can move, each operand once, each result once, of a 1×1 convolution with stride only
the pixels it reads, a filter's gradient in float32, a ReLU mask as one bit an element. Half precision, channels_last.

* ``stock``: each operator its own passes. Statistics, normalisation, ReLU, addition; backward threshold, both sums, gradient;
  pool indices in int64.
* ``inductor``: statistics, then one pass up to the ReLU (with the addition, and both norms of a projection's block); backward
  one pass of sums and one that applies them. At a block's output the sums' pass adds the two gradients that reach it and writes
  dz. Pool indices in int8.
* ``ours``: the launches of ``plans.chain`` and ``plans.chain_backward`` under the plan that ``plans.choice`` chooses. A 1×1
  convolution's dgrad has the backward of the batch norm in front in its epilogue (dz and both sums); wgrad and dgrad form the
  gradient at the raw output in their prologue, unless a ReLU without a mask is left to apply. cuDNN's 3×3 and 7×7 read and write
  plain tensors: activations and gradients around them are materialised, and the activation is formed again in the backward.
* ``ours_own_conv3x3``: the same with this package's 3×3 kernels where there is no stride.

A launch that serves two units counts where it runs: a projection's product inside conv3's fprop counts with conv3. The head
(average pool and classifier) is the same in every plan. Not counted: launches themselves (a CUDA graph hides them), casts of
weights, algebra on [C] and [C, C], loss and optimizer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from network_units import SIZE, Block, Network, Unit

BIT = 1 / (8 * SIZE)  # of a tensor's bytes: one bit an element
BYTE = 1 / SIZE


@dataclass(frozen=True)
class Pass:
    """One pass over memory of ``unit``; a launch of ours names its kernel and shape as the cost model knows them."""

    unit: Unit
    label: str
    bytes: float
    flops: float = 0
    kernel: str | None = None
    shape: tuple[tuple[str, int], ...] = ()


def convolution(u: Unit, label: str) -> Pass:
    """A bare convolution."""
    moved = {"fprop": u.read + u.weight + u.y, "dgrad": u.y + u.weight + u.x, "wgrad": u.y + u.read + 2 * u.weight}
    return Pass(u, label, moved[label], u.flops)


def convolutions(u: Unit, needs_dx: bool) -> Iterator[Pass]:
    yield convolution(u, "fprop")
    yield convolution(u, "wgrad")
    if needs_dx:
        yield convolution(u, "dgrad")


def stream(u: Unit, label: str, tensors: float, kernel: str | None = None, **flags: int) -> Pass:
    """A pass that reads and writes ``tensors`` times the unit's output."""
    return Pass(u, label, tensors * u.y, 0, kernel, (("m", u.rows), ("c", u.k), *flags.items()))


def product(u: Unit, label: str, moved: float, flops: float = 0, **flags: int) -> Pass:
    """A launch of our own convolution: ``moved`` bytes with its fusions, ``flops`` beyond the convolution's."""
    shape = {"m": u.rows, "c": u.c, "k": u.k, "stride": u.stride} | ({"h": u.h, "w": u.w} if u.r == 3 else {}) | flags
    return Pass(u, label, moved, u.flops + flops, f"{label}{u.r}x{u.r}", tuple(shape.items()))


def stock(block: Block) -> Iterator[Pass]:
    for u in block.units:
        yield from convolutions(u, needs_dx=not block.pooled)
        yield stream(u, "statistics", 1)
        yield stream(u, "normalise", 2)
        yield stream(u, "backward sums", 2)
        yield stream(u, "backward", 3)
    for u in block.path:
        yield stream(u, "relu", 2)
        yield stream(u, "relu backward", 3)
    first, last = block.path[0], block.path[-1]
    if block.pooled:
        yield stream(last, "maxpool", 1 + (1 + 8 * BYTE) / 4)
        yield stream(last, "maxpool backward", 1 + (1 + 8 * BYTE) / 4)
    else:
        yield stream(last, "add", 3)
        yield Pass(first, "add gradients", 3 * first.x)


def inductor(block: Block) -> Iterator[Pass]:
    *inner, last = block.path
    for u in block.units:
        yield from convolutions(u, needs_dx=not block.pooled)
        yield stream(u, "statistics", 1)
    for u in block.path if block.pooled else inner:
        yield stream(u, "normalise, relu", 2)
        yield stream(u, "backward sums", 3)
        yield stream(u, "backward", 4)
    if block.pooled:
        yield stream(last, "maxpool", 1 + (1 + BYTE) / 4)
        yield stream(last, "maxpool backward", 1 + (2 + BYTE) / 4)
        return
    yield stream(last, "normalise, add, relu", 3)
    yield stream(last, "backward sums", 4 if block.last else 5)
    yield stream(last, "backward", 3)
    if block.projection is not None:
        yield stream(block.projection, "backward sums", 1)
        yield stream(block.projection, "backward", 2)


def is_own(u: Unit, own_conv3x3: bool) -> bool:
    """Whether our kernels convolve."""
    return u.is_pointwise or (own_conv3x3 and (u.r, u.stride, u.groups) == (3, 1, 1))


def gram_flops(u: Unit) -> int:
    return 2 * u.rows * u.c**2


def feedback_flops(u: Unit) -> int:
    """Of the product with the coupling, which half precision takes in two parts."""
    return 2 * gram_flops(u)


def ours(block: Block, own_conv3x3: bool = False) -> Iterator[Pass]:
    if block.pooled:
        yield from _our_stem(block.path[0])
    else:
        yield from _our_forward(block, own_conv3x3)
        yield from _our_backward(block, own_conv3x3)


def _our_stem(u: Unit) -> Iterator[Pass]:
    yield from convolutions(u, needs_dx=False)
    pooled = (1 + BYTE) / 4
    yield stream(u, "statistics", 1, "bn_stats")
    yield stream(u, "normalise, relu, maxpool", 1 + pooled, "pool")
    yield stream(u, "maxpool, backward sums", 1 + pooled)  # of which the cost model knows no kernel
    yield stream(u, "maxpool, backward", 2 + pooled, "pool_backward")


def _raw_output(u: Unit, own_conv3x3: bool, pending: bool) -> Iterator[Pass]:
    """y and its statistics."""
    if is_own(u, own_conv3x3):
        yield product(u, "fprop", u.read + u.weight + u.y, pending=int(pending), stats=1)
    else:
        yield convolution(u, "fprop")
        yield stream(u, "statistics", 1, "bn_stats")


def _gram(u: Unit, pending: bool) -> Pass:
    shape = (("m", u.rows), ("c", u.c), ("k", u.c), ("stride", u.stride), ("pending", int(pending)))
    return Pass(u, "gram", u.read, gram_flops(u), "gram", shape)


def _our_forward(block: Block, own_conv3x3: bool) -> Iterator[Pass]:
    *inner, last = block.path
    projection = block.projection
    for u, consumer in zip(inner, block.path[1:], strict=True):
        yield from _raw_output(u, own_conv3x3, pending=u is not block.path[0])
        if not is_own(consumer, own_conv3x3):
            yield stream(u, "normalise, relu", 2, "bn_act")
    dual = projection is not None and projection.covariance and last.covariance
    if projection is not None and projection.covariance:
        yield _gram(projection, pending=False)
        if not dual:
            yield product(projection, "fprop", projection.read + projection.weight + projection.y)
    elif projection is not None:
        yield from _raw_output(projection, own_conv3x3, pending=False)
        yield stream(projection, "normalise", 2, "bn_act")
    if not last.covariance:
        yield from _raw_output(last, own_conv3x3, pending=True)
        yield stream(last, "normalise, add, relu", 3 + BIT, "bn_act", residual=1, mask=1)
        return
    yield _gram(last, pending=True)
    moved = last.read + last.weight + (1 + BIT) * last.y
    if dual:
        moved += projection.read + projection.weight
        yield product(last, "fprop", moved, projection.flops, pending=1, mask=1, c2=projection.c)
    else:
        yield product(last, "fprop", moved + last.y, pending=1, residual=1, mask=1)


def _our_backward(block: Block, own_conv3x3: bool) -> Iterator[Pass]:
    """As ``chain_backward``: from the block's output down the path, then the projection."""
    first, last = block.path[0], block.path[-1]
    masked_grad = (1 + BIT) * last.y
    through_covariance = [u for u in (last, block.projection) if u is not None and u.covariance]
    if through_covariance:  # one launch, at the first of them
        u, *others = through_covariance
        moved = masked_grad + sum(each.read + 2 * each.weight for each in through_covariance)
        more = {"flops": sum(each.flops for each in others), "c2": sum(each.c for each in others)}
        yield product(u, "wgrad", moved, **more, pending=int(u is last), masked=1)
    path = list(block.path)
    dy = last.y  # bytes that form the gradient at the unit's raw output: its own, or those of a pending one
    if last.covariance:
        moved = masked_grad + last.weight + 2 * last.x
        yield product(last, "dgrad", moved, feedback_flops(last), masked=1, feedback=1, below=1)
        path.pop()
        dy = yield from _through_norm(path[-1], own_conv3x3, has_relu=False)
    else:
        yield stream(last, "backward sums", 2 + BIT, "bn_backward_reduce", mask=1)
        if last.is_pointwise:
            dy += masked_grad
        else:
            yield stream(last, "backward", 3 + BIT, "bn_backward", mask=1)
    while len(path) > 1:
        u = path.pop()
        if is_own(u, own_conv3x3):
            yield product(u, "dgrad", dy + u.weight + 2 * u.x, pending_grad=int(dy > u.y), below=1)
            yield product(u, "wgrad", dy + u.read + 2 * u.weight, pending=1, pending_grad=int(dy > u.y))
        else:
            yield convolution(u, "dgrad")
            yield stream(path[-1], "backward sums, activation", 3, "bn_backward_reduce", activation=1)
            yield convolution(u, "wgrad")
        dy = yield from _through_norm(path[-1], own_conv3x3, has_relu=not is_own(u, own_conv3x3))
    yield from _to_the_input(first, dy, own_conv3x3, has_identity=block.projection is None)
    if block.projection is not None:
        yield from _our_projection_backward(block.projection)


def _through_norm(u: Unit, own_conv3x3: bool, has_relu: bool) -> Iterator[Pass]:
    """A gradient at the raw output stays pending if both products of ``u`` can form it; returns the bytes that do."""
    if is_own(u, own_conv3x3) and u.stride == 1 and not has_relu:
        return 2 * u.y
    yield stream(u, "backward", 3, "bn_backward")
    return u.y


def _to_the_input(u: Unit, dy: int, own_conv3x3: bool, has_identity: bool) -> Iterator[Pass]:
    pending = int(dy > u.y)
    own = is_own(u, own_conv3x3)
    yield product(u, "wgrad", dy + u.read + 2 * u.weight, pending_grad=pending) if own else convolution(u, "wgrad")
    through = (1 + BIT) * u.x if has_identity else 0
    if u.is_pointwise or (own and not has_identity):
        moved = dy + u.weight + u.x + through
        yield product(u, "dgrad", moved, pending_grad=pending, residual=int(has_identity))
        return
    if pending:
        yield stream(u, "backward", 3, "bn_backward")
    yield convolution(u, "dgrad")
    if has_identity:
        shape = (("m", u.n * u.h * u.w), ("c", u.c), ("residual", 1), ("mask", 1))
        yield Pass(u, "add masked gradient", 2 * u.x + through, 0, "add_relu", shape)


def _our_projection_backward(u: Unit) -> Iterator[Pass]:
    if u.covariance:
        moved = (1 + BIT) * u.y + u.weight + 3 * u.read  # what it adds to is read too
        yield product(u, "dgrad", moved, feedback_flops(u), masked=1, feedback=1, accumulate=1)
        return
    yield stream(u, "backward sums", 2 + BIT, "bn_backward_reduce", mask=1)
    if u.stride == 1:
        dy = (2 + BIT) * u.y
        yield product(u, "wgrad", dy + u.read + 2 * u.weight, pending_grad=1, masked=1)
        yield product(u, "dgrad", dy + u.weight + u.x, pending_grad=1, masked=1)
    else:
        yield stream(u, "backward", 3 + BIT, "bn_backward", mask=1)
        yield product(u, "wgrad", u.y + u.read + 2 * u.weight)
        yield convolution(u, "dgrad")
    yield Pass(u, "add gradients", 3 * u.x)


def inference(block: Block) -> Iterator[Pass]:
    """The forward alone, batch norms folded: what any plan has to move. A ReLU before max pooling costs nothing."""
    for u in block.units:
        yield convolution(u, "fprop")
    last = block.path[-1]
    if block.pooled:
        yield stream(last, "maxpool", 1 + 1 / 4)
    else:
        yield stream(last, "residual", 1)


def head(u: Unit) -> Iterator[Pass]:
    """Average pool and classifier, forward and backward."""
    vectors = u.n * u.c * SIZE
    for label, times in (("forward", 1), ("backward", 2)):
        yield Pass(u, f"average pool {label}", u.x + vectors)
        yield Pass(u, f"classifier {label}", times * (u.weight + vectors + u.y), times * u.flops)


PLANS: dict[str, Callable[[Block], Iterator[Pass]]] = {
    "stock": stock,
    "inductor": inductor,
    "ours": ours,
    "ours_own_conv3x3": functools.partial(ours, own_conv3x3=True),
}


def passes(network: Network, plan: str) -> list[Pass]:
    return [p for block in network.blocks for p in PLANS[plan](block)] + list(head(network.head))
