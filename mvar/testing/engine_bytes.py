"""What a real engine holds and sends, counted in bytes: the measure that predictions are held against.

Tensors are found by walking the garbage collector's objects, each storage counted once, so that nothing which DeepSpeed
allocates is overlooked. Messages are counted where DeepSpeed hands them to torch.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mvar.config import TrainConfig
from mvar.run.world import World
from mvar.training.engine import Engine
from mvar.training.job import prepare
from mvar.training.objective import Objective

Bytes = dict[str, int]


def storages(tensors: list[Any]) -> dict[int, int]:
    """Address -> bytes of every storage behind these tensors, their shards and gradients."""
    found: dict[int, int] = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


@contextmanager
def kept_by_autograd(parameters: Iterable[Tensor]) -> Iterator[dict[int, Tensor]]:
    """What the forward pass inside the block keeps for the backward pass, by address; `parameters` apart."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in owned:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def everything_alive() -> dict[int, int]:
    gc.collect()
    tensors = [item for item in gc.get_objects() if isinstance(item, Tensor)]
    return storages([*tensors, *(t.grad for t in tensors if t.is_leaf and t.grad is not None)])


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def config_is_bf16(engine: Engine) -> bool:
    return engine.config.engine.precision == "bf16"


def held(engine: Engine, before: dict[int, int]) -> Bytes:
    """Bytes of this rank by category; `other`: what is neither these nor was there `before` the engine."""
    zero: Any = engine._engine.optimizer
    parameters = list(engine._engine.module.parameters())
    weights = [
        *parameters,
        *(getattr(p, "ds_tensor", None) for p in parameters),
        *getattr(zero, "bit16_groups_flat", []),
    ]
    masters = engine.partition._masters if engine.stage else []
    moments = [list(engine._optimizer.state[key].values()) for key in engine.partition._masters]
    gradients: list[Any] = [[p.grad, getattr(p, "grad_accum", None)] for p in parameters]
    for name in ("averaged_gradients", "all_grad_tensors", "grad_partitions_flat_buffer"):
        gradients.append(getattr(zero, name, None))
    buckets = [vars(b) for b in getattr(zero, "ipg_buckets", {}).values()]
    if engine.stage == 1 and config_is_bf16(engine):
        gradients.append(zero.fp32_groups_gradients_flat)
    parts = {"weights": weights, "optimizer": [masters, moments], "gradients": gradients, "buckets": buckets}
    counted: set[int] = set()
    found: Bytes = {}
    for name, tensors in parts.items():
        mine = {a: n for a, n in storages(list(_flat(tensors))).items() if a not in counted}
        counted |= mine.keys()
        found[name] = sum(mine.values())
    rest = {a: n for a, n in everything_alive().items() if a not in counted and a not in before}
    found["other"] = sum(rest.values())
    return found


SENDING = {"all_reduce": 0, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1, "all_gather": 1, "broadcast": 0}
"""Collectives of DeepSpeed's backend -> which argument is what this rank puts in."""


@contextmanager
def counting_messages() -> Iterator[Bytes]:
    """Bytes that this rank's engine puts into each kind of collective inside the block."""
    from deepspeed.comm import comm

    backend: Any = comm.cdb
    sent: Bytes = dict.fromkeys(SENDING, 0)

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            place = SENDING[name]
            names = ("input_tensor", "input") if place else ("tensor",)
            tensor = arguments[place] if len(arguments) > place else next(named[key] for key in names if key in named)
            sent[name] += tensor.numel() * tensor.element_size()
            return function(*arguments, **named)

        return call

    for name in SENDING:
        setattr(backend, name, counted(name, getattr(backend, name)))
    try:
        yield sent
    finally:
        for name in SENDING:
            delattr(backend, name)


def measure(world: World, trees: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """For each configuration: bytes held at the end of a step's last backward pass, and messages of one step."""
    return {name: measure_one(world, TrainConfig.model_validate(tree)) for name, tree in trees.items()}


def measure_one(world: World, config: TrainConfig) -> dict[str, Any]:
    job = prepare(config, world.size)
    objective = Objective(job.store.quantizer(), world.device)
    batches = [job.stream.batch(0, world.rank * job.split.micro_batch, job.split.micro_batch)] * job.split.accumulation
    before = everything_alive()
    engine = Engine(job.config, job.model, job.plan, job.split, objective, world)
    engine.initialise()
    engine.step(0, batches)
    update, seen = engine._update, {}

    def spy() -> Any:
        seen.update(held(engine, before))
        return update()

    engine._update = spy  # type: ignore[method-assign]
    with counting_messages() as sent:
        engine.step(1, batches)
    return {"held": seen, "sent": sent}
