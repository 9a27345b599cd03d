"""The library as the README shows it: what `from mvar import MVAR, VQVAE, generate` promises."""

import torch

from mvar import MVAR, VQVAE, generate

SIDES = (1, 2, 3, 4)


def _pair() -> tuple[MVAR, VQVAE]:
    torch.manual_seed(0)
    tok = VQVAE(channels=32, latent_channels=8, vocab_size=64, patch_nums=SIDES, channel_mult=(1, 1, 2))
    model = MVAR(
        depth=2, num_classes=10, patch_nums=tok.patch_nums, vocab_size=64, latent_channels=8, width=64, heads=1
    )
    return model, tok


def test_images_become_codes_and_inputs_and_images() -> None:
    _, tok = _pair()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    codes_BL = tok.encode(images)
    assert codes_BL.shape == (2, 30) and codes_BL.dtype == torch.int64
    assert int(codes_BL.min()) >= 0 and int(codes_BL.max()) < 64
    assert tok.inputs_from_codes(codes_BL).shape == (2, 29, 8)
    decoded = tok.decode(codes_BL)
    assert decoded.shape == images.shape and decoded.dtype == torch.float32 and decoded.abs().max() <= 1


def test_logits_are_float32_and_alike_in_train_and_eval() -> None:
    model, tok = _pair()
    x_BLC = tok.inputs_from_codes(torch.randint(64, (3, 30), generator=torch.Generator().manual_seed(0)))
    labels_B = torch.tensor([0, 9, 10])  # 10: no class
    trained = model.train()(labels_B, x_BLC)
    assert trained.shape == (3, 30, 64) and trained.dtype == torch.float32
    assert torch.equal(trained, model.eval()(labels_B, x_BLC))


def test_generate_draws_codes_that_depend_on_seed_and_label_only() -> None:
    model, tok = _pair()
    labels_B = torch.tensor([1, 2, 3])
    drawn_BL = generate(model, tok, labels_B, cfg=1.5, top_k=900, top_p=0.96, seeds=range(3))
    assert drawn_BL.shape == (3, 30) and drawn_BL.dtype == torch.int64
    alone_BL = generate(model, tok, labels_B[1:2], cfg=1.5, top_k=900, top_p=0.96, seeds=[1])
    assert torch.equal(alone_BL[0], drawn_BL[1])
    assert not torch.equal(generate(model, tok, labels_B, seeds=range(3, 6)), drawn_BL)


def test_the_published_size_is_the_default() -> None:
    with torch.device("meta"):
        tok = VQVAE(channels=160, latent_channels=32, vocab_size=4096)
        model = MVAR(depth=16, num_classes=1000, patch_nums=tok.patch_nums, vocab_size=4096, latent_channels=32)
    assert sum(p.numel() for p in model.parameters()) == 464_157_440
    assert tok.image_size == 256
