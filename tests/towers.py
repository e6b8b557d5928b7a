"""Small towers and small batches, for the tests of model.py."""

import torch
import torch.nn.functional as F

import model as models

TINY_TEXT = dict(
    embed_dim=32,
    text_width=48,
    text_heads=3,
    text_layers=2,
    context_length=20,
    vocab_size=1000,
)
TINY_VIT = dict(
    image_size=48,
    patch_size=16,
    vision_layers=2,
    vision_width=128,
    **TINY_TEXT,
)
TINY_RESNET = dict(
    image_size=64,
    vision_layers=(1, 2, 1, 1),
    vision_width=8,
    **TINY_TEXT,
)

# A ViT, and ResNets with batch norm and with group norm: (name, overrides) for model.create.
TINY = {
    "vit": ("ViT-B-32", TINY_VIT),
    "batch": ("RN50", TINY_RESNET),
    "group": ("RN50", dict(vision_norm="group", **TINY_RESNET)),
}


def tiny(kind, seed=0):
    """A small model of one of the kinds in TINY, with perturbed weights."""
    torch.manual_seed(seed)
    name, numbers = TINY[kind]
    return perturb(models.create(name, **numbers))


@torch.no_grad()
def perturb(model):
    """Change, in place, what starts at zero or one, so that a mistake in its use shows in features.

    These are biases, norms and the running statistics of batch norm.
    """
    for p in model.parameters():
        if p.ndim == 1:
            p.add_(0.3 * torch.randn_like(p))

    # Take the running statistics from a batch, so that features in eval mode are of usual size.
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.train().encode_image(pictures(2, model.image_size))

    for norm in norms:
        norm.momentum = 0.1
        norm.running_mean.add_(0.1 * torch.randn_like(norm.running_mean))
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.8, 1.25))
        norm.num_batches_tracked.fill_(7)
    return model


def pictures(b, size):
    """uint8 (b, 3, size, size): noise on blotches of random colours, so that features differ."""
    colours = 255 * torch.rand(b, 3, 3, 3)
    blotches = F.interpolate(colours, size=(size, size), mode="bilinear")
    noise = 20 * torch.randn(b, 3, size, size)
    return (blotches + noise).clamp(0, 255).to(torch.uint8)


def captions(lengths, context_length, vocab_size):
    """tokens, int64 (b, context_length): start, random words, end (the largest id), then zeros."""
    start = vocab_size - 2
    end = vocab_size - 1

    tokens = torch.zeros(len(lengths), context_length, dtype=torch.long)
    for row, length in zip(tokens, lengths):
        row[:length] = torch.randint(1, start, (length,))
        row[0] = start
        row[length - 1] = end
    return tokens


def tiny_batch(model):
    """Images and tokens of four samples for a tiny model."""
    images = pictures(4, model.image_size)
    tokens = captions([3, 9, 12, 7], 20, 1000)[:, :12]
    return images, tokens
