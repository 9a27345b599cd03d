"""The transformer: against the official implementation, and what every mode of it must keep.

Legend: B batch, L tokens, V vocabulary, D depth.
"""

import sys
import weakref
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mvar.checkpoint.published import published_state_dict
from mvar.config import ModelConfig
from mvar.errors import BackendError, ConfigError
from mvar.model import mamba_backend
from mvar.model.init import init_weights_
from mvar.model.kernels.optional import Loaded, load
from mvar.model.transformer import MVAR, DecodeState, drop_path_rates
from mvar.scales import PATCH_NUMS_512
from tests.golden import golden, golden_json

PYRAMID = (1, 2, 3, 4)
PARAMETERS = {
    12: 198_435_568,
    16: 464_157_440,
    20: 900_529_136,
    24: 1_550_067_136,
    30: 3_017_065_756,
    32: 3_658_707_968,
}


def small(**changes: Any) -> MVAR:
    """A tiny model whose branches, gates and head all matter."""
    arguments: dict[str, Any] = {"depth": 3, "num_classes": 5, "patch_nums": PYRAMID, "vocab_size": 16}
    arguments |= {"latent_channels": 4, "width": 64, "heads": 2}
    model = MVAR(**(arguments | changes))
    init_weights_(model, 0, ModelConfig(init_gamma=1.0, init_head=1.0, init_conditioning=1.0))
    return model


def batch_of(model: MVAR, images: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = model.pyramid.total - model.pyramid.lengths[0]
    x_BLC = torch.randn(images, tokens, model.latent_channels, generator=generator)
    return torch.arange(images) % (model.num_classes + 1), x_BLC.to(dtype)


def gradients(model: MVAR, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    labels_B, x_BLC = batch_of(model)
    model(labels_B, x_BLC, **options).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(ours: Tensor, reference: Tensor) -> float:
    return float((ours.detach() - reference).abs().max() / reference.abs().max())


def golden_model(part: str, *files: str) -> MVAR:
    state = {
        name: value.float() if value.is_floating_point() else value for name, value in golden(part, *files).items()
    }
    model = MVAR(2, 10, PYRAMID, 64, 8) if part == "mvar_tiny" else MVAR(3, 10)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("training", [True, False])
def test_tiny_model_equals_the_official_one(training: bool) -> None:
    """Logits, loss, residual stream and gradients; in eval mode too, where the published forward pass is another."""
    model, train = (
        golden_model("mvar_tiny", "state.safetensors").train(training),
        golden("mvar_tiny", "train.safetensors"),
    )
    streams: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: streams.append(output))
    logits_BLV = model(train["label"], train["x_wo_first"])
    assert relative(logits_BLV, train["logits"]) < 1e-5
    for index, stream in enumerate(streams):
        assert relative(stream, train[f"act.block_{index}"]) < 1e-5
    loss = F.cross_entropy(logits_BLV.flatten(0, 1), train["gt_idx"].flatten())
    assert loss.item() == pytest.approx(train["loss"].item(), rel=1e-6)
    loss.backward()
    assert_gradients(model, train, golden_json("mvar_tiny", "meta.json")["grads"])


def test_ten_scale_model_equals_the_official_one() -> None:
    model = golden_model("mvar_ten_scales", "state_blocks.safetensors", "state_rest.safetensors")
    train = golden("mvar_ten_scales", "train.safetensors")
    logits_BLV = model(train["label"], train["x_wo_first"])
    assert relative(logits_BLV[:, train["logits_pos"]], train["logits_at"]) < 1e-5
    assert relative(logits_BLV.logsumexp(-1), train["logits_logsumexp"]) < 1e-5
    assert torch.equal(logits_BLV.argmax(-1), train["logits_argmax"])
    loss = F.cross_entropy(logits_BLV.flatten(0, 1), train["gt_idx"].flatten())
    assert loss.item() == pytest.approx(train["loss"].item(), rel=1e-6)
    loss.backward()
    assert_gradients(model, train, golden_json("mvar_ten_scales", "meta.json")["grads"])


def assert_gradients(model: MVAR, train: dict[str, Tensor], norms: dict[str, dict[str, float]]) -> None:
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.norm().item() == pytest.approx(norms[name]["l2"], rel=1e-4), name
        if f"grad.{name}" in train:
            assert relative(parameter.grad, train[f"grad.{name}"]) < 1e-4, name


@pytest.mark.parametrize(("depth", "count"), PARAMETERS.items())
def test_parameter_counts_of_published_depths(depth: int, count: int) -> None:
    with torch.device("meta"):
        model = MVAR(depth)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    with torch.device("meta"):
        model = MVAR(depth, attn_l2_norm=False)
    assert sum(parameter.numel() for parameter in model.parameters()) == count - depth * depth


def test_published_state_dict_has_the_published_names_shapes_and_types() -> None:
    with torch.device("meta"):
        model = MVAR(12)
    ours = {name: [list(t.shape), str(t.dtype)] for name, t in published_state_dict(model).items()}
    assert ours == {name: entry[:2] for name, entry in golden_json("keys", "mvar_keys_d12.json").items()}


def test_published_state_dict_reproduces_a_published_file() -> None:
    file = golden("mvar_tiny", "state.safetensors")
    ours = published_state_dict(golden_model("mvar_tiny", "state.safetensors"))
    assert ours.keys() == file.keys()
    for name, value in file.items():
        assert torch.equal(ours[name].to(value.dtype), value), name


def test_missing_and_unknown_names_are_refused() -> None:
    state = small().state_dict()
    with pytest.raises(RuntimeError, match="Unexpected"):
        small().load_state_dict(state | {"blocks.0.extra": torch.zeros(1)})
    del state["head.bias"]
    with pytest.raises(RuntimeError, match="Missing"):
        small().load_state_dict(state)


@pytest.mark.parametrize("mode", ["train", "eval", "checkpointed"])
@pytest.mark.parametrize("scale", [1, 2, 3])
def test_nothing_leaks_from_later_scales(mode: str, scale: int) -> None:
    """Inputs of a scale change no logit of a coarser one; they do change all of their own scale and of finer ones."""
    model = small(activation_checkpointing="every" if mode == "checkpointed" else "off").double()
    model.train(mode != "eval")
    labels_B, x_BLC = batch_of(model, dtype=torch.float64)
    offset = model.pyramid.offsets[scale]
    changed_BLC = x_BLC.clone()
    changed_BLC[:, model.pyramid.offsets[scale + 1] - 2] += 1.0  # the last token of the scale; x has no first token
    with torch.set_grad_enabled(mode == "checkpointed"):
        difference_L = (model(labels_B, x_BLC) - model(labels_B, changed_BLC)).abs().amax((0, 2))
    difference_L = difference_L.detach()
    assert float(difference_L[:offset].max()) < 1e-12
    assert float(difference_L[offset:].min()) > 1e-9


@pytest.mark.parametrize("steps", [(1, 1, 1, 1), (2, 2), (1, 3), (4,)])
@pytest.mark.parametrize("shared", [False, True])
def test_a_few_scales_at_a_time_equal_the_whole_pass(steps: tuple[int, ...], shared: bool) -> None:
    model = small(shared_conditioning=shared).double().eval()
    labels_B, x_BLC = batch_of(model, dtype=torch.float64)
    whole_BLV = model(labels_B, x_BLC)
    state, parts, first = DecodeState(), [], 0
    for step in steps:
        scales = range(first, first + step)
        low, high = model.pyramid.offsets[first], model.pyramid.offsets[first + step]
        inputs = x_BLC[:, max(low - 1, 0) : high - 1]
        parts.append(model(labels_B, inputs if high > 1 else None, state=state, scales=scales))
        first += step
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_BLV, rtol=0, atol=1e-12)
    assert state.next_scale == 4


def test_an_image_is_conditioned_once_and_dropping_half_of_a_batch_keeps_the_first_half() -> None:
    model = small().double().eval()
    calls: list[int] = []
    for block in model.blocks:
        block.ada_lin.register_forward_hook(lambda *_: calls.append(1))
    labels_B, x_BLC = batch_of(model, dtype=torch.float64)
    whole_BLV = model(labels_B, x_BLC)
    calls.clear()
    state, lengths = DecodeState(), model.pyramid.lengths
    model(labels_B, x_BLC[:, : lengths[1]], state=state, scales=range(2))
    state.keep_first(1)
    end = sum(lengths[:3])
    third_BLV = model(labels_B[:1], x_BLC[:1, end - lengths[2] - 1 : end - 1], state=state, scales=range(2, 3))
    assert len(calls) == model.depth
    torch.testing.assert_close(third_BLV, whole_BLV[:1, end - lengths[2] : end], rtol=0, atol=1e-12)


def test_train_and_eval_mode_compute_the_same() -> None:
    model = small()
    labels_B, x_BLC = batch_of(model)
    assert torch.equal(model.train()(labels_B, x_BLC), model.eval()(labels_B, x_BLC))


@pytest.mark.parametrize("setting", ["every", 2, "selective"])
@pytest.mark.parametrize("dropping", [False, True])
def test_activation_checkpointing_changes_no_bit_of_the_gradients(setting: Any, dropping: bool) -> None:
    options = {"drop_path_DGB": torch.rand(3, 3, 2)} if dropping else {}
    plain = gradients(small(), **options)
    checkpointed = gradients(small(activation_checkpointing=setting), **options)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_selective_checkpointing_runs_no_linear_layer_twice_and_keeps_less() -> None:
    calls, kept = {}, {}
    for setting in ("off", "selective", "every"):
        model = small(activation_checkpointing=setting)
        labels_B, x_BLC = batch_of(model)
        with Count() as counted:
            loss = model(labels_B, x_BLC).square().mean()
            kept[setting] = counted.live_bytes()
            loss.backward()
        calls[setting] = counted.matmuls
    assert calls["off"] == calls["selective"] < calls["every"]
    assert kept["every"] < kept["selective"] < kept["off"]


class Count(TorchDispatchMode):
    """Counts matmuls, and the bytes of results that are still held by something."""

    def __init__(self) -> None:
        super().__init__()
        self.matmuls = 0
        self._results: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        self.matmuls += operation._schema.name in ("aten::mm", "aten::addmm")
        tensors = [value for value in pytree.tree_leaves(result) if isinstance(value, Tensor)]
        self._results += [weakref.ref(tensor.untyped_storage()) for tensor in tensors]
        return result

    def live_bytes(self) -> int:
        storages = [storage for ref in self._results if (storage := ref()) is not None]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_every_parameter_gets_a_gradient() -> None:
    for options in ({}, {"shared_conditioning": True}, {"attn_l2_norm": False}):
        model = small(**options)
        found = gradients(model)
        assert {name for name, g in found.items() if g.abs().sum() > 0} == dict(model.named_parameters()).keys()


def test_drop_path_multiplies_each_branch_of_each_image() -> None:
    model = small().double()
    labels_B, x_BLC = batch_of(model, dtype=torch.float64)
    kept_BLV = model(labels_B, x_BLC)
    ones = torch.ones(3, 3, 2)
    torch.testing.assert_close(model(labels_B, x_BLC, drop_path_DGB=ones), kept_BLV)

    # Dropping one branch of one image: as if its gates were zero, and only for that image.
    for block, branch in ((0, 0), (1, 1), (2, 2)):
        dropped = ones.clone()
        dropped[block, branch, 0] = 0
        out_BLV = model(labels_B, x_BLC, drop_path_DGB=dropped)
        torch.testing.assert_close(out_BLV[1], kept_BLV[1])
        linear = model.blocks[block].ada_lin[1]
        rows = slice(branch * model.width, (branch + 1) * model.width)
        weight, bias = linear.weight.data.clone(), linear.bias.data.clone()
        linear.weight.data[rows] = 0
        linear.bias.data[rows] = 0
        torch.testing.assert_close(out_BLV[0], model(labels_B, x_BLC)[0])
        linear.weight.data, linear.bias.data = weight, bias


def test_drop_path_rates_rise_linearly_from_zero() -> None:
    assert drop_path_rates(5, 0.2) == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    assert drop_path_rates(1, 0.2) == [0.0]


def test_images_of_a_batch_do_not_mix() -> None:
    model = small().double()
    labels_B, x_BLC = batch_of(model, images=3, dtype=torch.float64)
    alone = model(labels_B[1:2], x_BLC[1:2])
    torch.testing.assert_close(model(labels_B, x_BLC)[1:2], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", ["autocast", "weights", "matmuls", "fp16 weights"])
def test_half_precision_gives_float32_logits_near_those_of_float32(how: str) -> None:
    model = small()
    labels_B, x_BLC = batch_of(model)
    expected_BLV = model(labels_B, x_BLC).detach()
    if how == "weights":
        model.bfloat16()
    elif how == "fp16 weights":
        model.half()
    elif how == "matmuls":
        model.store_matmuls_(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        logits_BLV = model(labels_B, x_BLC)
    assert logits_BLV.dtype == torch.float32
    assert 0 < relative(logits_BLV, expected_BLV) < 0.05
    logits_BLV.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_shared_conditioning_has_one_projection_and_nine_vectors_a_block() -> None:
    with torch.device("meta"):
        model = MVAR(36, patch_nums=PATCH_NUMS_512, shared_conditioning=True)
    state = model.state_dict()
    assert state["shared_ada_lin.1.weight"].shape == (9 * 2304, 2304)
    assert state["blocks.35.ada_gss"].shape == (1, 1, 9, 2304)
    assert not any(".ada_lin." in name and name.startswith("blocks.") for name in state)


def test_512_px_works_whole_and_scale_by_scale() -> None:
    model = small(depth=1, patch_nums=PATCH_NUMS_512).eval()
    labels_B, x_BLC = batch_of(model, images=1)
    with torch.no_grad():
        whole_BLV = model(labels_B, x_BLC)
        state, parts = DecodeState(), []
        for scale in range(model.pyramid.num_scales):
            low, high = model.pyramid.offsets[scale], model.pyramid.offsets[scale + 1]
            inputs = x_BLC[:, max(low - 1, 0) : high - 1]
            parts.append(model(labels_B, inputs, state=state, scales=range(scale, scale + 1)))
    assert whole_BLV.shape == (1, 2240, 16)
    assert relative(torch.cat(parts, dim=1), whole_BLV) < 1e-5


def test_features_and_head_make_the_logits() -> None:
    model = small()
    labels_B, x_BLC = batch_of(model)
    features_BLC = model.features(labels_B, x_BLC)
    assert features_BLC.shape == (2, 30, 64)
    assert torch.equal(model.head(features_BLC), model(labels_B, x_BLC))


def test_pyramids_may_begin_with_more_than_one_token() -> None:
    model = small(patch_nums=(2, 3, 5))
    labels_B, x_BLC = batch_of(model)
    assert model(labels_B, x_BLC).shape == (2, 4 + 9 + 25, 16)


def test_from_config_builds_what_the_configuration_says() -> None:
    config = ModelConfig(depth=2, width=96, heads=3, patch_nums=PYRAMID, vocab_size=8, latent_channels=4)
    model = MVAR.from_config(config, num_classes=7, activation_checkpointing=2)
    assert (model.depth, model.width, model.heads, model.num_classes) == (2, 96, 3, 7)
    assert model.pyramid.patch_nums == PYRAMID
    assert model.activation_checkpointing == 2
    assert model.head.weight.shape == (8, 96)


@pytest.mark.parametrize("geometry", [{"width": 100}, {"width": 96, "heads": 5}, {"depth": 0}])
def test_impossible_geometry_is_refused(geometry: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="width must be a multiple"):
        small(**geometry)


def test_inputs_that_do_not_fit_the_scales_are_refused() -> None:
    model = small()
    labels_B, x_BLC = batch_of(model)
    with pytest.raises(ValueError, match="expected \\(B, 29, 4\\)"):
        model(labels_B, x_BLC[:, :-1])
    with pytest.raises(ValueError, match="begins at 0"):
        model(labels_B, x_BLC, state=DecodeState(), scales=range(1, 2))
    with pytest.raises(ValueError, match="begins at 0"):
        model(labels_B, x_BLC, scales=range(5))


@pytest.fixture
def no_memory() -> Iterator[None]:
    """Imports and choices are remembered for a process: forget them before and after."""
    for forget in (load, mamba_backend.choose):
        forget.cache_clear()
    yield
    for forget in (load, mamba_backend.choose):
        forget.cache_clear()


@pytest.mark.usefixtures("no_memory")
def test_mamba_kernels_asked_for_by_name_and_missing_name_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    with pytest.raises(BackendError, match=r"mamba_backend=mamba_ssm.*causal-conv1d.*requirements-gpu\.txt"):
        small(mamba_backend="mamba_ssm")


@pytest.mark.usefixtures("no_memory")
def test_mamba_kernels_asked_for_by_name_refuse_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba_backend, "load", lambda _: Loaded(None))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = small(mamba_backend="mamba_ssm")
    with pytest.raises(BackendError, match="need a CUDA device"):
        model(*batch_of(model))


@pytest.mark.usefixtures("no_memory")
def test_mamba_kernels_that_cannot_be_imported_are_done_without_and_the_reason_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with an extension that was built for another torch: the package is there, its import fails."""
    broken = ModuleType("causal_conv1d")
    broken.__getattr__ = lambda name: (_ for _ in ()).throw(OSError(f"undefined symbol behind {name}"))  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "causal_conv1d", broken)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    told = mamba_backend.choose("auto", torch.bfloat16, torch.device("cuda"), True)
    assert told.way == "triton" and "OSError: undefined symbol" in told.reason and not told.slow
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    mamba_backend.choose.cache_clear()
    old = mamba_backend.choose("auto", torch.bfloat16, torch.device("cuda"), True)
    assert old.way == "torch" and "compute capability 8.0" in old.reason and old.slow


@pytest.mark.usefixtures("no_memory")
def test_mamba_kernels_are_not_taken_where_fp32_means_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(mamba_backend, "load", lambda _: Loaded(None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert mamba_backend.choose("auto", torch.bfloat16, gpu, False).way == "mamba_ssm"
    assert mamba_backend.choose("auto", torch.float32, gpu, True).way == "mamba_ssm"
    exact = mamba_backend.choose("auto", torch.float32, gpu, False)
    assert exact.way == "triton" and "TF32" in exact.reason
    assert mamba_backend.choose("auto", torch.float64, gpu, False).way == "torch"
    assert mamba_backend.choose("auto", torch.bfloat16, torch.device("cpu"), False).way == "torch"


@pytest.mark.usefixtures("no_memory")
def test_apex_normalises_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """apex needs CUDA to build, so a stand-in with its documented signature takes its place here."""
    made: list[tuple[int, float, bool]] = []

    class FusedLayerNorm(torch.nn.LayerNorm):
        def __init__(self, normalized_shape: int, eps: float, elementwise_affine: bool) -> None:
            super().__init__(normalized_shape, eps, elementwise_affine)
            made.append((normalized_shape, eps, elementwise_affine))

    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    normalization = ModuleType("apex.normalization")
    normalization.FusedLayerNorm = FusedLayerNorm  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex.normalization", normalization)
    plain = small()
    fused = small(norm_backend="apex")
    assert made == [(plain.width, 1e-6, False)] * (plain.depth + 1)
    fused.load_state_dict(plain.state_dict())
    labels_B, x_BLC = batch_of(plain)
    assert torch.equal(fused(labels_B, x_BLC), plain(labels_B, x_BLC))


@pytest.mark.usefixtures("no_memory")
def test_apex_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex.normalization", None)
    with pytest.raises(BackendError, match="norm_backend=apex"):
        small(norm_backend="apex")
