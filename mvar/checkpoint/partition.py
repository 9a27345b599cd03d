"""Which elements of which parameter live in this rank's memory under DeepSpeed, to read and to write them.

The one place that knows DeepSpeed's insides. What is read, by ZeRO stage (seen in 0.19.8):

| stage | fp32 master weights                                 | where a parameter lies in them                  |
|-------|-----------------------------------------------------|-------------------------------------------------|
| 0     | the module's own parameters                         | whole, on every rank                            |
| 1, 2  | `client.param_groups[g]["params"][0]`, flat         | `parameter._hp_mapping`: its range, and in flat |
| 3     | `optimizer.fp32_partitioned_groups_flat[i]`, flat   | `optimizer.grad_position`: flat number, offset  |

Adam's moments are in `client.state[master]`, laid out like the master weights; `client` is the torch-style optimizer
that we gave to DeepSpeed. The weights that the model computes with follow through `update_lp_params` (1, 2), or through
each sub-group's own re-assignment while it is open, and a gather of persistent parameters (3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mvar import headway
from mvar.errors import BackendError

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)
EMA = "ema"
TESTED_DEEPSPEED = "0.19"


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of the flattened parameter `name`, at `offset` of master tensor number `master`."""

    name: str
    start: int
    stop: int
    master: int
    offset: int

    @property
    def count(self) -> int:
        return self.stop - self.start


class Copied(Protocol):
    """The end of copies that a device may still be busy with, as torch.cuda.Event has it."""

    def wait(self) -> None:
        """Let the device finish them before whatever it is given from now on."""

    def synchronize(self) -> None:
        """Wait for them."""


class Partition:
    """This rank's part of weights and moments. Build it after `deepspeed.initialize`; `client` is its AdamW.

    `ema`: also keep a moving average of the weights, cut and kept like the master weights. Raises BackendError.
    """

    def __init__(self, engine: Any, client: torch.optim.Optimizer, *, ema: bool = False) -> None:
        import deepspeed

        if not deepspeed.__version__.startswith(TESTED_DEEPSPEED + "."):
            raise BackendError(
                f"DeepSpeed {deepspeed.__version__}: checkpoints know the insides of {TESTED_DEEPSPEED}.x only."
                " Install the version of requirements.txt."
            )
        self.stage = int(engine.zero_optimization_stage())
        self._client = client
        self._counts_in_groups = type(client).__module__.startswith("apex.")
        """NVIDIA apex counts its steps in the parameter groups, the others in the state of each tensor."""
        self._zero = engine.optimizer
        parameters: dict[str, nn.Parameter] = dict(engine.module.named_parameters())
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
        """Shape of every parameter of the model, in the model's order."""
        find = {0: self._find_replicated, 1: self._find_flat, 2: self._find_flat, 3: self._find_sharded}[self.stage]
        self._masters, self.held = find(parameters)
        """`held`: what this rank has in memory. Ranks may hold the same elements (stage 0)."""
        self.owned = self._share() if self.stage == 0 else self.held
        """What this rank writes into a checkpoint. Every element of the model is owned by exactly one rank."""
        assert all(master.dtype == torch.float32 for master in self._masters)
        self.kinds = (*KINDS, EMA) if ema else KINDS
        """What there is of every parameter."""
        self._copied: Copied | None = None
        self._averages = [torch.zeros_like(master) for master in self._masters] if ema else []
        if ema and any(self._is_swapped(number) for number in range(len(self._masters))):
            raise BackendError("optim.ema_decay: weights that are kept on NVMe have no moving average. Set it to 0.")

    def _find_replicated(self, parameters: dict[str, nn.Parameter]) -> tuple[list[Tensor], list[Piece]]:
        pieces = [Piece(name, 0, p.numel(), number, 0) for number, (name, p) in enumerate(parameters.items())]
        return list(parameters.values()), pieces

    def _find_flat(self, parameters: dict[str, nn.Parameter]) -> tuple[list[Tensor], list[Piece]]:
        masters = [group["params"][0] for group in self._client.param_groups]
        pieces = []
        for name, parameter in parameters.items():
            mapping: Any = getattr(parameter, "_hp_mapping")  # noqa: B009 - set by DeepSpeed; None: nothing here
            if mapping is not None:
                start, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
                offset = mapping.hp_fragment_address.start
                pieces.append(Piece(name, start, start + count, mapping.param_group_index, offset))
        return masters, pieces

    def _find_sharded(self, parameters: dict[str, nn.Parameter]) -> tuple[list[Tensor], list[Piece]]:
        zero, rank = self._zero, dist.get_rank()
        pieces = []
        for name, parameter in parameters.items():
            master, offset, width = zero.grad_position[zero.get_param_id(parameter)]
            start = min(rank * width, parameter.ds_numel)  # type: ignore[attr-defined]
            stop = min(start + width, parameter.ds_numel)  # type: ignore[attr-defined]
            if stop > start:
                pieces.append(Piece(name, start, stop, master, offset))
        return list(zero.fp32_partitioned_groups_flat), pieces

    def _share(self) -> list[Piece]:
        """Cut the model into equal parts, one a rank."""
        total = sum(piece.count for piece in self.held)
        low, high = (total * (dist.get_rank() + r) // dist.get_world_size() for r in (0, 1))
        shared, seen = [], 0
        for piece in self.held:
            start, stop = max(low - seen, 0), min(high - seen, piece.count)
            if start < stop:
                shared.append(Piece(piece.name, start, stop, piece.master, start))
            seen += piece.count
        return shared

    @property
    def bytes_of_all(self) -> int:
        """Size of everything, over all ranks."""
        elements: int = sum(math.prod(shape) for shape in self.shapes.values())
        return 4 * len(self.kinds) * elements

    @property
    def bytes_owned(self) -> int:
        """Size of what this rank writes."""
        return 4 * len(self.kinds) * sum(piece.count for piece in self.owned)

    @contextmanager
    def opened(self, master: int, *, write: bool = False) -> Iterator[dict[str, Tensor]]:
        """Flat float32 views of a master tensor and its moments, by kind. NVMe: read from disk, and back if `write`."""
        zero: Any = self._zero
        swapped = self._is_swapped(master)
        if swapped:
            zero._optimizer_states_and_gradient_swap_in(master)
        key = self._masters[master]
        state = self._client.state[key]
        if not state:
            self._begin(key)
        with torch.no_grad():
            views = {WEIGHT: key.detach().view(-1)} | {kind: state[kind].view(-1) for kind in MOMENTS}
            if self._averages:
                views[EMA] = self._averages[master].view(-1)
            yield views
        if swapped and write:
            zero._optimizer_states_and_gradient_swap_out(master)
        elif swapped:
            zero._release_swap_buffers(master)

    def _is_swapped(self, master: int) -> bool:
        return self.stage == 3 and bool(self._zero._swappable_optimizer_subgroup(master))

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Move the average towards the weights: decay * average + (1 - decay) * weight."""
        for average, master in zip(self._averages, self._masters, strict=True):
            average.lerp_(master, 1 - decay)

    def _begin(self, key: Tensor) -> None:
        """The state that AdamW makes at its first step, before it."""
        state: Any = self._client.state[key]
        if not self._counts_in_groups:
            state["step"] = 0
        if isinstance(self._client, torch.optim.Adam):  # AdamW is one.
            fused = bool(self._client.defaults.get("fused"))
            state["step"] = torch.zeros((), dtype=torch.float32, device=key.device if fused else "cpu")
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(key, memory_format=torch.preserve_format)

    @property
    def adam_steps(self) -> int:
        """Updates that AdamW has made (skipped steps do not count). To be set after `fill`."""
        if self._counts_in_groups:
            return int(self._client.param_groups[0].get("step", 0))
        states = [state for key in self._masters if (state := self._client.state.get(key))]
        if states and isinstance(states[0]["step"], Tensor):
            return int(states[0]["step"])
        # DeepSpeed's fused one counts in one tensor of each group.
        return max((int(state["step"]) for state in states), default=0)

    @adam_steps.setter
    def adam_steps(self, steps: int) -> None:
        if self._counts_in_groups:
            for group in self._client.param_groups:
                group["step"] = steps
            return
        for key in self._masters:
            state: Any = self._client.state[key]
            if isinstance(state["step"], Tensor):
                state["step"].fill_(float(steps))
            else:
                state["step"] = steps

    def blocks(self) -> Iterator[tuple[Piece, str, Tensor]]:
        """Everything this rank owns, in the order of `layout`: piece, kind, flat float32 view, valid until the next."""
        for number, pieces in self._by_master(self.owned):
            with self.opened(number) as views:
                for piece in pieces:
                    for kind in self.kinds:
                        yield piece, kind, views[kind].narrow(0, piece.offset, piece.count)

    def hold(self, copied: Copied) -> None:
        """Weights and moments are being copied, until `copied`: `release_held` before they change."""
        self._copied = copied

    def release_held(self) -> None:
        """Let the device finish the copies under way before whatever it is given next."""
        if self._copied is not None:
            self._copied.wait()
        self._copied = None

    def layout(self) -> list[tuple[Piece, str]]:
        """Pieces and kinds in the order in which `blocks` gives them."""
        return [(piece, kind) for _, pieces in self._by_master(self.owned) for piece in pieces for kind in self.kinds]

    def fill(self, source: Callable[[Piece, str], Tensor | None]) -> None:
        """Write everything this rank holds: `source(piece, kind)` gives `piece.count` float32 values, None for zeros.

        What belongs to no parameter becomes zero: DeepSpeed pads with memory that it never set. `publish` afterwards.
        """
        zero: Any = self._zero
        self.release_held()
        if self.stage == 3:
            zero._partition_all_parameters()
        for number, pieces in self._by_master(self.held):
            with self.opened(number, write=True) as views:
                for kind, view in views.items():
                    view.zero_()
                    for piece in pieces:
                        values = source(piece, kind)
                        if values is not None:
                            view.narrow(0, piece.offset, piece.count).copy_(values)
                        headway.made()
                if self.stage == 3:
                    zero._reassign_or_swap_out_partitioned_parameters(number)

    def release(self) -> None:
        """ZeRO 3: cut weights that are whole, because something was computed with them, up again. All ranks."""
        zero: Any = self._zero
        zero._partition_all_parameters()
        self.publish()

    def gather(self, names: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """The whole fp32 weights of a few small parameters, on every rank, flat. All ranks."""
        starts = dict(zip(names, accumulate((math.prod(self.shapes[name]) for name in names), initial=0), strict=False))
        flat = torch.zeros(sum(math.prod(self.shapes[name]) for name in names), device=device)
        for number, pieces in self._by_master([piece for piece in self.owned if piece.name in starts]):
            if pieces:
                with self.opened(number) as views:
                    values = [views[WEIGHT].narrow(0, piece.offset, piece.count) for piece in pieces]
                    places = [flat.narrow(0, starts[piece.name] + piece.start, piece.count) for piece in pieces]
                    torch._foreach_copy_(places, values)  # one kernel instead of one for each
        dist.all_reduce(flat)
        return {name: flat.narrow(0, start, math.prod(self.shapes[name])) for name, start in starts.items()}

    def _by_master(self, pieces: list[Piece]) -> list[tuple[int, list[Piece]]]:
        found: dict[int, list[Piece]] = {number: [] for number in range(len(self._masters))}
        for piece in pieces:
            found[piece.master].append(piece)
        return list(found.items())

    def publish(self) -> None:
        """After `fill`: bring what other ranks wrote into the weights that the model computes with. All ranks."""
        zero: Any = self._zero
        if self.stage in (1, 2):
            zero.update_lp_params()
        elif self.stage == 3 and zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
