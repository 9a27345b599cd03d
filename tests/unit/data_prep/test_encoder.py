"""Encoding in several arithmetics: exact ones agree, fast ones are measured and have to be accepted."""

import shutil

import numpy as np
import pytest
import torch

from data_prep.calibrate import CALIBRATION, Calibration, agreement_by_scale, calibrate, require_accepted
from data_prep.encoder import BatchEncoder, deterministic
from data_prep.finalize import finalize
from data_prep.inspect import facts
from data_prep.job import TokenizeConfig
from data_prep.kept import LISTING
from data_prep.tokenize import tokenize
from mvar.data.store import CodeStore
from mvar.errors import BackendError, ConfigError, ImageError
from mvar.images.arrays import from_uint8
from mvar.scales import ScalePyramid
from mvar.settings import load
from mvar.tokenizer.vqvae import VQVAE
from tests.stores import PATCH_NUMS, SIZE_PX, TOKENS, VOCAB, image_folder, tiny_tokenizer, tiny_vqvae

IMAGES = np.random.default_rng(3).integers(0, 256, (7, SIZE_PX, SIZE_PX, 3), dtype=np.uint8)


def encoder(precision="fp32", batch=4, compiled=False, threads=None):
    return BatchEncoder(tiny_vqvae(), torch.device("cpu"), batch, precision, compiled, threads)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    image_folder(root / "images", classes=2, per_class=4)
    tiny_tokenizer(root / "tokenizer.safetensors")
    return root


def config(inputs, store, *more):
    given = [f"source={inputs}/images", f"tokenizer={inputs}/tokenizer.safetensors", f"store={store}"]
    return load(TokenizeConfig, None, [*given, "threads=1", "workers=0", "calibration_images=6", *more])


def test_fp32_codes_are_those_of_the_tokenizer_itself():
    codes = encoder()(IMAGES)
    assert codes.dtype == np.uint16
    assert np.array_equal(codes[:4], tiny_vqvae().encode(from_uint8(IMAGES[:4])).numpy())
    assert codes.shape == (7, TOKENS)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_codes_of_an_image_depend_on_neither_threads_nor_batch(precision):
    wide = VQVAE(channels=32, latent_channels=8, vocab_size=64, patch_nums=(1, 2, 4, 8), channel_mult=(1, 2, 8))
    images = np.random.default_rng(5).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)

    def codes(batch, threads):
        made = BatchEncoder(wide.eval().requires_grad_(False), torch.device("cpu"), batch, precision, threads=threads)
        return np.concatenate([made(images[:3]), made(images[3:])] if batch == 3 else [made(images)])

    expected = codes(5, 1)
    assert all(np.array_equal(codes(batch, threads), expected) for batch in (5, 3) for threads in (2, 3))


def test_a_calibration_does_not_depend_on_threads():
    one, three = (calibrate(encoder("bf16", threads=threads), IMAGES) for threads in (1, 3))
    assert one == three


def test_launched_codes_come_in_the_order_they_were_launched():
    made = encoder(threads=2)
    launched = [made.launch(IMAGES[:3]), made.launch(IMAGES[3:])]
    assert np.array_equal(np.concatenate([part.collect() for part in launched]), encoder()(IMAGES))
    assert made.is_idle()
    assert launched[0].is_done()


def test_bf16_rounds_the_trunk_and_leaves_head_and_quantizer_exact():
    seen = []
    fast = encoder("bf16")
    fast.vqvae.quantizer.encode = lambda f, plain=fast.vqvae.quantizer.encode: seen.append(f) or plain(f)
    codes = fast(IMAGES)
    assert all(f.dtype == torch.float32 for f in seen)
    assert not all(torch.equal(f, f.bfloat16().float()) for f in seen)  # They come out of a float32 convolution.
    agreement = (codes == encoder()(IMAGES)).mean()
    assert 0.3 < agreement < 1
    assert codes.max() < VOCAB


def test_the_arithmetic_outside_stays_as_it_was():
    torch.set_float32_matmul_precision("high")
    try:
        with deterministic(tf32=False):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_tf32_is_refused_on_a_cpu(inputs, tmp_path):
    with pytest.raises(BackendError, match="precision=tf32: a CPU does not have it"):
        tokenize(config(inputs, tmp_path / "codes", "precision=tf32", "device=cpu"))


@pytest.mark.parametrize("has_bf16", [False, True])
def test_bf16_on_a_cpu_without_its_instructions_is_said_to_be_slow(inputs, tmp_path, monkeypatch, caplog, has_bf16):
    monkeypatch.setattr("mvar.model.kernels.precision._cpu_multiplies", lambda _dtype: has_bf16)
    BatchEncoder.load(config(inputs, tmp_path / "codes", "precision=bf16", "device=cpu"))
    said = "precision: bf16, because this CPU has no instructions for bfloat16; precision=fp32 is several times faster"
    assert (said in caplog.text) is not has_bf16


def test_agreement_is_counted_scale_by_scale():
    left = np.zeros((2, TOKENS), dtype=np.uint16)
    right = left.copy()
    right[0, 0] = 1
    right[:, 5:] = 1
    assert agreement_by_scale(left, right, ScalePyramid(PATCH_NUMS)) == (0.5, 1.0, 0.0)


def test_a_calibration_measures_codes_and_reconstructions():
    found = calibrate(encoder("bf16"), IMAGES)
    exact, fast = encoder()(IMAGES), encoder("bf16")(IMAGES)
    assert found.agreement == pytest.approx((exact == fast).mean())
    squared = (tiny_vqvae().decode(torch.from_numpy(fast.astype(np.int64))) - from_uint8(IMAGES)).square().mean()
    assert found.psnr_fast_db == pytest.approx(10 * np.log10(4 / float(squared)), abs=1e-3)
    assert found.psnr_fp32_db != found.psnr_fast_db
    assert calibrate(encoder("fp32"), IMAGES).agreement == 1.0


def test_a_fast_mode_is_refused_until_its_cost_is_accepted(inputs, tmp_path):
    store = tmp_path / "codes"
    with pytest.raises(
        ConfigError, match=r"bf16: a fast mode has to be accepted.\ncodes in common with fp32, 6 images"
    ):
        tokenize(config(inputs, store, "precision=bf16"))
    with pytest.raises(ConfigError, match=r"not good enough for accept_agreement=1\.0"):
        tokenize(config(inputs, store, "precision=bf16", "accept_agreement=1"))
    assert not store.exists()  # Another mode, or another source, may still be chosen.
    tokenize(config(inputs, store, "precision=bf16", "accept_agreement=0.3"))
    finalize(store)
    told = CodeStore.open(store).manifest.encoding
    assert told["precision"] == "bf16"
    assert 0.3 < told["calibration"]["agreement"] < 1
    assert len(told["calibration"]["agreement_S"]) == len(PATCH_NUMS)
    assert "codes in common with fp32" in facts(store)


def test_a_mode_that_is_refused_later_leaves_the_job_that_is_there(inputs, tmp_path):
    store = tmp_path / "codes"
    fast = ("precision=bf16", "accept_agreement=0.3", "shard_samples=2")
    tokenize(config(inputs, store, *fast), 0, 2)
    before = {path.name for path in store.iterdir()}
    with pytest.raises(ConfigError, match="not good enough"):
        tokenize(config(inputs, store, *fast, "accept_agreement=1"), 1, 2)
    assert LISTING in before and {path.name for path in store.iterdir()} == before


def test_the_next_task_takes_over_the_calibration(inputs, tmp_path, monkeypatch):
    store = tmp_path / "codes"
    fast = ("precision=bf16", "accept_agreement=0.3", "shard_samples=2")
    tokenize(config(inputs, store, *fast), 0, 2)
    monkeypatch.setattr("data_prep.tokenize.calibrate", None)
    tokenize(config(inputs, store, *fast), 1, 2)
    finalize(store)
    with pytest.raises(ConfigError, match="not good enough"):
        tokenize(config(inputs, store, *fast, "accept_agreement=1"))


def test_fp32_needs_no_calibration_and_says_so_in_no_file(inputs, tmp_path):
    tokenize(config(inputs, tmp_path / "codes"))
    assert not (tmp_path / "codes" / CALIBRATION).exists()
    finalize(tmp_path / "codes")
    assert "calibration" not in CodeStore.open(tmp_path / "codes").manifest.encoding


def test_damaged_images_are_passed_over_by_the_calibration(inputs, tmp_path):
    shutil.copytree(inputs / "images", tmp_path / "images")
    files = sorted((tmp_path / "images").rglob("*.png"))
    for path in files[1:]:
        path.write_bytes(b"damaged")
    given = ("precision=bf16", "accept_agreement=0", f"source={tmp_path}/images")
    tokenize(config(inputs, tmp_path / "codes", *given), skip_bad=7)
    finalize(tmp_path / "codes")
    assert CodeStore.open(tmp_path / "codes").manifest.encoding["calibration"]["images"] == 1
    files[0].write_bytes(b"damaged")
    with pytest.raises(ImageError, match="no training image can be decoded"):
        tokenize(config(inputs, tmp_path / "none", *given), skip_bad=8)


def test_the_accepted_share_is_the_one_that_the_message_proposes(inputs, tmp_path):
    calibration = Calibration(
        job_sha256="", images=1, agreement=0.7299, agreement_S=(0.7,), psnr_fp32_db=1, psnr_fast_db=1
    )
    with pytest.raises(ConfigError, match=r"accept_agreement=0\.72 "):
        require_accepted(config(inputs, tmp_path, "precision=bf16"), calibration)
    require_accepted(config(inputs, tmp_path, "precision=bf16", "accept_agreement=0.72"), calibration)


@pytest.mark.slow
def test_a_compiled_encoder_fills_up_short_batches_and_agrees_with_the_plain_one():
    compiled = encoder(compiled=True)(IMAGES)
    assert compiled.shape == (7, TOKENS)
    assert (compiled == encoder()(IMAGES)).mean() > 0.95
