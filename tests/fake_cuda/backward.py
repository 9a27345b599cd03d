"""The backward pass without torch's engine, which wants streams of a real GPU before it calls anything."""

from __future__ import annotations

from graphlib import TopologicalSorter
from typing import Any
from unittest import mock

import torch
from torch import Tensor

Node = Any
"""A step of the graph that autograd recorded: torch.autograd.graph.Node, or the context of a Function of our own."""


def gradients(loss: Tensor) -> dict[Tensor, Tensor]:
    """Leaf -> its gradient, for all that the scalar `loss` depends on. Each step is called with what the engine gives.

    Raises AssertionError where a gradient is on another device than what it belongs to, or of another shape.
    """
    arrived: dict[Node, dict[int, Tensor]] = {loss.grad_fn: {loss.output_nr: torch.ones_like(loss)}}
    leaves: dict[Tensor, Tensor] = {}
    # The number of a pass, which torch.utils.checkpoint asks for, so that it recomputes once in each.
    with mock.patch.object(torch._C, "_current_graph_task_id", lambda: 0), torch.no_grad():
        for node in _users_first(loss.grad_fn):
            found = arrived.pop(node, {})
            if hasattr(node, "variable"):
                leaves[node.variable] = found[0]
            elif found:
                for target, place, gradient in _called(node, found):
                    sums = arrived.setdefault(target, {})
                    sums[place] = sums[place] + gradient if place in sums else gradient
    return leaves


def _users_first(root: Node) -> list[Node]:
    targets: dict[Node, list[Node]] = {}
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node not in targets:
            targets[node] = [target for target, _ in node.next_functions if target is not None]
            waiting += targets[node]
    return list(TopologicalSorter(targets).static_order())[::-1]


def _called(node: Node, found: dict[int, Tensor]) -> list[tuple[Node, int, Tensor]]:
    """What the step gives, and to which input of which next one."""
    outputs = range(len(node._input_metadata))
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        given = node.apply(*(found[i] if i in found else _zeros(node._input_metadata[i]) for i in outputs))
        given = given if isinstance(given, tuple) else (given,)
        edges = [edge for edge in node.next_functions if edge[0] is not None]
        given = [gradient for gradient, wanted in zip(given, node.needs_input_grad, strict=False) if wanted]
    else:
        given = node(*(found.get(i) for i in outputs))
        given = given if isinstance(given, tuple) else (given,)
        edges = node.next_functions
    pairs = zip(edges, given, strict=True)
    return [(*edge, _fitting(node, *edge, gradient)) for edge, gradient in pairs if edge[0] and gradient is not None]


def _zeros(like: Any) -> Tensor | None:
    """What the engine gives for an output that nothing used. An output that is None looks like a scalar here."""
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device) if like.shape else None


def _fitting(node: Node, target: Node, place: int, gradient: Tensor) -> Tensor:
    """Summed over what was broadcast, in the dtype of what it is the gradient of."""
    wanted = target._input_metadata[place]
    assert gradient.device == wanted.device, (
        f"{node.name()} gives {gradient.device} to {target.name()}, which is on {wanted.device}"
    )
    return gradient.sum_to_size(wanted.shape).to(wanted.dtype)
