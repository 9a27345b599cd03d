"""Drawing as one CUDA graph: everything from labels and seeds to pixels is launched by the host at once.

A small batch is drawn in thousands of kernels of a few microseconds each, which take the host longer to launch than the
device to run. A graph fixes the kernels and their memory, so it holds one batch size and one set of options.

Shapes: B images, S scales, C latent channels, h = w side of the feature map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mvar.model.transformer import MVAR
from mvar.sampling.options import SamplingOptions
from mvar.sampling.sampler import Forced, Toward, check_request, draw_scales, require_finite
from mvar.tokenizer.vqvae import VQVAE

WARM_UP = 2
"""Calls before the capture: kernels are compiled and tuned in the first, libraries take their workspaces."""


class GraphedDrawing:
    """Draws batches of `batch` images with `options`, and gives what `finish` makes of them.

    `finish`: feature maps (B, C, h, w) -> a tensor, such as pictures. `growing`: of the map after every scale, stacked
    (B, S, ...), and not of the last alone. `forced`: makes the tokens that are given, for each run anew; `toward`: a
    class (1) for all images to draw toward. `graphed`: capture at the first call and replay from then on; without it
    every call runs as it comes. The result of a call lasts until the next.
    """

    def __init__(
        self,
        model: MVAR,
        tokenizer: VQVAE,
        batch: int,
        finish: Callable[[Tensor], Tensor],
        options: SamplingOptions,
        *,
        graphed: bool,
        growing: bool = False,
        forced: Callable[[], Forced] | None = None,
        toward: Toward | None = None,
    ) -> None:
        self._model, self._quantizer, self._finish, self._graphed = model, tokenizer.quantizer, finish, graphed
        self._options, self._growing, self._forced = options, growing, forced
        device = model.pos_start.device
        self._labels_B = torch.zeros(batch, dtype=torch.int64, device=device)
        self._seeds_B = torch.zeros_like(self._labels_B)
        self._toward = None
        if toward is not None:
            self._toward = Toward(toward.labels_B.to(device).expand(batch), toward.share)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._results: tuple[Tensor, Tensor] | None = None

    @torch.inference_mode()
    def __call__(self, labels_B: Tensor, seeds: Sequence[int]) -> Tensor:
        """Raises ConfigError for labels and seeds that do not fit, MvarError for logits that are not finite."""
        self._seeds_B.copy_(check_request(self._model, labels_B, seeds))
        self._labels_B.copy_(labels_B)
        if not self._graphed:
            finished, finite_S = self._run()
        else:
            finished, finite_S = self._replay()
        require_finite(self._model, finite_S)
        return finished

    def _run(self) -> tuple[Tensor, Tensor]:
        """What the graph holds: no host reads anything here."""
        forced = None if self._forced is None else self._forced()
        steps = list(
            draw_scales(
                self._model, self._quantizer, self._labels_B, self._seeds_B, self._options, forced, self._toward
            )
        )
        finite_S = torch.stack([step.finite for step in steps])
        if self._growing:
            return torch.stack([self._finish(step.f_hat_BChw) for step in steps], dim=1), finite_S
        return self._finish(steps[-1].f_hat_BChw), finite_S

    def _replay(self) -> tuple[Tensor, Tensor]:
        if self._graph is None:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    self._run()
            torch.cuda.current_stream().wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._results = self._run()
        assert self._results is not None
        self._graph.replay()
        return self._results
