"""Small towers and batches for the tests of model.py."""

import torch
import torch.nn.functional as F

import model as models

TINY_TEXT = dict(
    embed_dim=32, text_width=48, text_heads=3, text_layers=2, context_length=20, vocab_size=1000
)
TINY = {
    "vit": (
        "ViT-B-32",
        dict(image_size=48, patch_size=16, vision_layers=2, vision_width=128, **TINY_TEXT),
    ),
    "batch": ("RN50", dict(image_size=64, vision_layers=(1, 2, 1, 1), vision_width=8, **TINY_TEXT)),
    "group": (
        "RN50",
        dict(
            image_size=64,
            vision_layers=(1, 2, 1, 1),
            vision_width=8,
            vision_norm="group",
            **TINY_TEXT,
        ),
    ),
}


def tiny(kind, seed=0):
    torch.manual_seed(seed)
    name, numbers = TINY[kind]
    return perturb(models.create(name, **numbers))


@torch.no_grad()
def perturb(model):
    """Moves what starts at zero or one (biases, norms, running statistics), so that nothing is idle when features are compared."""
    for p in model.parameters():
        if p.ndim == 1:
            p.add_(0.3 * torch.randn_like(p))
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m in norms:
        m.momentum = 1.0
    model.train().encode_image(pictures(2, model.image_size))
    for m in norms:
        m.momentum = 0.1
        m.running_mean.add_(0.1 * torch.randn_like(m.running_mean))
        m.running_var.mul_(torch.empty_like(m.running_var).uniform_(0.8, 1.25))
        m.num_batches_tracked.fill_(7)
    return model


def pictures(b, size):
    """uint8 (b, 3, size, size): random colours, a few blotches in each, so that images differ by more than noise."""
    blotches = F.interpolate(255 * torch.rand(b, 3, 3, 3), size=(size, size), mode="bilinear")
    return (blotches + 20 * torch.randn(b, 3, size, size)).clamp(0, 255).to(torch.uint8)


def captions(lengths, context_length, vocab_size):
    """tokens (b, context_length): start, words, end = the largest id, zeros."""
    tokens = torch.zeros(len(lengths), context_length, dtype=torch.long)
    for row, length in zip(tokens, lengths):
        row[:length] = torch.randint(1, vocab_size - 2, (length,))
        row[0], row[length - 1] = vocab_size - 2, vocab_size - 1
    return tokens


def tiny_batch(model, b=4):
    return pictures(b, model.image_size), captions([3, 9, 12, 7][:b], 20, 1000)[:, :12]
