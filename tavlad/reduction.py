"""Sums of gradients that do not depend on the number of ranks, to the bit.

A global batch is cut into V parts, the virtual ranks, whatever the number of real ones. Their gradients are added up in
one binary tree over the parts, always the same: node [a, b) is node [a, m) plus node [m, b), m = (a + b) // 2. A rank
that has some contiguous parts adds up the nodes that lie within them; the other nodes are added up after the ranks have
met. Floating-point addition is commutative, but not associative: the tree is all that has to be fixed.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

Node = tuple[int, int]
_ELEMENTS_AT_ONCE = 4_000_000
"""Of each rank's sums: what is exchanged in one piece."""


def nodes_within(parts: range, num_parts: int) -> list[Node]:
    """The largest nodes of the tree over `num_parts` leaves that lie within the parts, in order.

    >>> nodes_within(range(0, 3), 8), nodes_within(range(3, 8), 8)
    ([(0, 2), (2, 3)], [(3, 4), (4, 8)])
    """

    def visit(low: int, high: int) -> Iterator[Node]:
        if parts.start <= low and high <= parts.stop:
            yield low, high
        elif low < parts.stop and parts.start < high:
            middle = (low + high) // 2
            yield from visit(low, middle)
            yield from visit(middle, high)

    return list(visit(0, num_parts))


class TreeSum:
    """The sum over all virtual ranks of what the parameters' gradients are, part after part."""

    def __init__(self, parameters: list[nn.Parameter], rank: int, size: int, num_parts: int) -> None:
        """Every rank has `num_parts` // `size` virtual ranks, or one more."""
        if size > num_parts:
            raise ValueError(
                f"{size} workers for resources.virtual_ranks = {num_parts}: a worker needs at least one virtual rank"
            )
        self._parameters = parameters
        self._rank, self._size, self._num_parts = rank, size, num_parts
        self._nodes = [nodes_within(parts_of(each, size, num_parts), num_parts) for each in range(size)]
        self._waiting: list[tuple[Node, Tensor]] = []

    def add(self, part: int, *, computed: bool) -> None:
        """Take the gradients of a part, the next in order; zeros if nothing was `computed` for it."""
        gradients = [each.grad if computed else None for each in self._parameters]
        flat = torch.cat(
            [
                torch.zeros_like(parameter).flatten() if gradient is None else gradient.flatten()
                for parameter, gradient in zip(self._parameters, gradients, strict=True)
            ]
        )
        for each in self._parameters:
            each.grad = None
        node = (part, part + 1)
        while self._waiting and self._are_halves(self._waiting[-1][0], node):
            (low, _), left = self._waiting.pop()
            flat = left.add_(flat)
            node = (low, node[1])
        self._waiting.append((node, flat))

    def finish(self) -> None:
        """Give every parameter the whole sum as its gradient."""
        nodes, sums = [node for node, _ in self._waiting], [each for _, each in self._waiting]
        self._waiting.clear()
        assert nodes == self._nodes[self._rank], "every part was added once, in order"
        total = sums[0] if self._size == 1 else self._exchange(sums)
        for parameter, gradient in zip(
            self._parameters, total.split([each.numel() for each in self._parameters]), strict=True
        ):
            parameter.grad = gradient.view_as(parameter)

    def _are_halves(self, left: Node, right: Node) -> bool:
        """Whether the two are the halves of one node."""
        (low, middle), (_, high) = left, right
        return (low + high) // 2 == middle and (low, high) in nodes_within(range(low, high), self._num_parts)

    def _exchange(self, sums: list[Tensor]) -> Tensor:
        """Each rank adds up its slice of all ranks' sums, in tree order; then the slices are put together."""
        num_nodes = max(len(each) for each in self._nodes)  # ranks may have different numbers: all send as many
        total = torch.empty_like(sums[0])
        for start in range(0, len(total), _ELEMENTS_AT_ONCE):
            piece = total[start : start + _ELEMENTS_AT_ONCE]
            slice_size = -(-len(piece) // self._size)
            sent = total.new_zeros(num_nodes, self._size * slice_size)
            for row, each in zip(sent, sums, strict=False):
                row[: len(piece)] = each[start : start + len(piece)]
            sent_WNS = sent.view(num_nodes, self._size, slice_size).transpose(0, 1).contiguous()
            got_WNS = torch.empty_like(sent_WNS)
            dist.all_to_all_single(got_WNS, sent_WNS)
            found = {
                node: got_WNS[rank, row] for rank, nodes in enumerate(self._nodes) for row, node in enumerate(nodes)
            }
            whole = total.new_empty(self._size * slice_size)
            dist.all_gather_into_tensor(whole, self._sum(found, (0, self._num_parts)))
            piece.copy_(whole[: len(piece)])
        return total

    def _sum(self, found: dict[Node, Tensor], node: Node) -> Tensor:
        if node in found:
            return found[node]
        low, high = node
        middle = (low + high) // 2
        return self._sum(found, (low, middle)) + self._sum(found, (middle, high))


def parts_of(rank: int, size: int, num_parts: int) -> range:
    """The contiguous parts of a global batch that a rank computes."""
    return range(num_parts * rank // size, num_parts * (rank + 1) // size)
