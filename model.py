"""CLIP: an image tower, a text tower, one feature space.

    images [b, 3, S, S] -> ViT or ResNet      -> [b, d] -> / length
    tokens [b, L]       -> causal transformer -> [b, d] -> / length        (padding, most of b x L, is left out: see Packing)

The architecture of Radford et al. 2021 (arXiv 2103.00020), with the exact GELU. Names, shapes and initial distributions
of all parameters are OpenCLIP's: `open_clip.create_model_and_transforms(name, pretrained=path)` loads what we save.
"""

import contextlib
import copy
import difflib
import inspect
import math
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from config import ConfigError

try:
    from torch.nn.attention.varlen import (
        varlen_attn,
    )  # torch 2.10 has it too, but is told otherwise to be causal

    VARLEN = "window_size" in inspect.signature(varlen_attn).parameters
except ImportError:
    VARLEN = False

TEXT = dict(context_length=77, vocab_size=49408, text_width=512, text_heads=8, text_layers=12)
MODELS = {
    "RN50": dict(
        embed_dim=1024,
        image_size=224,
        vision_layers=(3, 4, 6, 3),
        vision_width=64,
        vision_norm="batch",
        **TEXT,
    ),
    "ViT-B-32": dict(
        embed_dim=512, image_size=224, vision_layers=12, vision_width=768, patch_size=32, **TEXT
    ),
    "ViT-B-16": dict(
        embed_dim=512, image_size=224, vision_layers=12, vision_width=768, patch_size=16, **TEXT
    ),
}


class Packing(NamedTuple):
    """How captions lie without padding, T tokens one behind another (see `pack`), and where in the padded [b, L] each belongs.
    Only attention looks from token to token, so only there their borders matter: everything else computes on [T, w]."""

    token_index: torch.Tensor  # (T,) ascending: the place of each token among the b * L
    ends: torch.Tensor  # (b,) which of the T are <end_of_text>, where features are read
    seen: torch.Tensor  # (b, 1, 1, L) bool: the places that <end_of_text> attends to
    starts: torch.Tensor  # (b + 1,) int32: where captions start among the T, and T; or None,

    # where there is no varlen attention: then attend on (b, L)
    def pad(self, x):  # (T, w) -> (b, L, w), zeros elsewhere
        b, L = self.seen.shape[0], self.seen.shape[-1]
        return (
            x.new_zeros(b * L, x.shape[-1]).index_copy(0, self.token_index, x).unflatten(0, (b, L))
        )

    def unpad(self, x):  # (b, L, w) -> (T, w)
        return x.flatten(0, 1).index_select(0, self.token_index)


class LayerNorm(nn.LayerNorm):
    """Autocast computes norms in float32. The result returns to the input's type: the norm does not change the stream's."""

    def forward(self, x):
        return super().forward(x).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention. Its parameters are named, and start, as those of nn.MultiheadAttention."""

    def __init__(self, width, heads, causal):
        super().__init__()
        divide(width, heads, "attention: the width must split evenly into the heads")
        self.heads, self.causal = heads, causal
        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * width, width)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, packing=None):  # (b, L, w), or (T, w) with a packing
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (b, L, 3w)
        if packing and packing.starts is not None and qkv.dtype in (torch.bfloat16, torch.float16):
            qkv, L = (
                qkv.unflatten(-1, (3, self.heads, -1)),
                packing.seen.shape[-1],
            )  # (T, 3, heads, w/heads)
            x = varlen_attn(
                *qkv.unbind(1), packing.starts, packing.starts, L, L, window_size=(-1, 0)
            )  # causal
            return self.out_proj(x.flatten(1))  # (T, w)
        q, k, v = self.split(packing.pad(qkv) if packing else qkv)  # each (b, heads, L, w/heads)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # (b, heads, L, w/heads)
        x = x.transpose(1, 2).flatten(2)  # (b, L, w)
        return self.out_proj(packing.unpad(x) if packing else x)

    def one(self, x, query, packing=None):  # (b, L, w) or (T, w), (b, w)
        """One query in each sequence: its answer (b, w) needs the keys and values of all tokens, but no other query."""
        w = x.shape[-1]
        (q_weight, kv_weight), (q_bias, kv_bias) = (
            self.in_proj_weight.split([w, 2 * w]),
            self.in_proj_bias.split([w, 2 * w]),
        )
        q, kv = (
            F.linear(query, q_weight, q_bias),
            F.linear(x, kv_weight, kv_bias),
        )  # (b, w), (b, L, 2w) or (T, 2w)
        k, v = self.split(packing.pad(kv) if packing else kv)  # each (b, heads, L, w/heads)
        q = q.unflatten(-1, (self.heads, 1, -1))  # (b, heads, 1, w/heads)
        x = F.scaled_dot_product_attention(
            q, k, v, packing.seen if packing else None
        )  # (b, heads, 1, w/heads)
        return self.out_proj(x.flatten(1))  # (b, w)

    def split(self, x):  # (b, L, n w) -> n times (b, heads, L, w/heads)
        return x.unflatten(-1, (-1, self.heads, self.out_proj.in_features // self.heads)).permute(
            2, 0, 3, 1, 4
        )


class Block(nn.Module):
    """First the tokens look at each other, then each thinks for itself; both times they add to what they know."""

    def __init__(self, width, heads, causal):
        super().__init__()
        self.ln_1, self.attn = LayerNorm(width), Attention(width, heads, causal)
        mlp = OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=nn.GELU(), c_proj=nn.Linear(4 * width, width)
        )
        self.ln_2, self.mlp = LayerNorm(width), nn.Sequential(mlp)

    def forward(
        self, x, packing=None, last=False
    ):  # (b, L, w) or (T, w) -> the same, or of the last block (b, w)
        y = self.ln_1(x)
        if last:  # one token is read after it: the class token, or <end_of_text>
            x, query = (
                t.index_select(0, packing.ends) if packing else t[:, 0] for t in (x, y)
            )  # (b, w)
            x = x + self.attn.one(y, query, packing)
        else:
            x = x + self.attn(y, packing)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads, causal):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, causal) for _ in range(layers))
        self.grad_checkpointing = False

    def forward(self, x, packing=None):  # (b, L, w) or (T, w) -> (b, w): what is read of it
        for block in self.resblocks:
            args = x, packing, block is self.resblocks[-1]
            x = recomputed(block, *args) if self.grad_checkpointing else block(*args)
        return x


class VisionTransformer(nn.Module):
    """The image is a sentence of patches; a class token in front of them collects the answer."""

    def __init__(self, image_size, patch_size, width, layers, embed_dim):
        super().__init__()
        patches = (
            divide(image_size, patch_size, "image_size must be a whole number of patches") ** 2
        )
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(1 + patches, width) * width**-0.5)
        self.ln_pre, self.ln_post = LayerNorm(width), LayerNorm(width)
        self.transformer = Transformer(width, layers, max(1, width // 64), causal=False)
        self.proj = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)

    def forward(self, x):  # (b, 3, S, S)
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (b, patches, w)
        x = torch.cat(
            [self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1
        )  # (b, 1 + patches, w)
        x = self.transformer(self.ln_pre(x + self.positional_embedding.to(x.dtype)))
        return self.ln_post(x) @ self.proj  # (b, d)


def group_norm(channels):
    """In place of BatchNorm2d: sees one sample only. Groups of 8 channels or more (if there are as many), at most 32 groups."""
    return nn.GroupNorm(
        max(g for g in range(1, 33) if channels % g == 0 and (g == 1 or channels // g >= 8)),
        channels,
    )


class Bottleneck(nn.Module):
    def __init__(self, channels, width, stride, norm):
        super().__init__()
        self.stride = stride
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), norm(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), norm(4 * width)
        nn.init.zeros_(self.bn3.weight)  # a new block passes its input on
        same = stride == 1 and channels == 4 * width
        self.downsample = (
            None
            if same
            else nn.Sequential(nn.Conv2d(channels, 4 * width, 1, bias=False), norm(4 * width))
        )

    def forward(self, x):  # (b, channels, h, w)
        out = self.bn1(self.conv1(x)).relu_()
        out = self.bn2(self.conv2(out)).relu_()
        if self.stride > 1:  # average, then subsample: a strided convolution would alias
            out, x = F.avg_pool2d(out, self.stride), F.avg_pool2d(x, self.stride)
        out = self.bn3(self.conv3(out))  # (b, 4 width, h/stride, w/stride)
        return (out + (x if self.downsample is None else self.downsample(x))).relu_()


class Stage(nn.Sequential):
    def __init__(self, channels, width, depth, stride, norm):
        super().__init__(
            Bottleneck(channels, width, stride, norm),
            *(Bottleneck(4 * width, width, 1, norm) for _ in range(1, depth)),
        )


class AttentionPool2d(nn.Module):
    """The mean of all positions attends to itself and to them. It is the only query whose answer is used, or computed."""

    def __init__(self, positions, width, heads, embed_dim):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(1 + positions, width) * width**-0.5)
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, embed_dim)
        for proj in (self.k_proj, self.q_proj, self.v_proj, self.c_proj):
            nn.init.normal_(proj.weight, std=width**-0.5)

    def forward(self, x):  # (b, w, h', w')
        x = x.flatten(2).transpose(1, 2)  # (b, positions, w)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding.to(
            x.dtype
        )  # (b, 1 + positions, w)
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(
                1, 2
            )  # (b, heads, 1 or 1 + positions, w/heads)
            for t in (self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x))
        )
        return self.c_proj(F.scaled_dot_product_attention(q, k, v).flatten(1))  # (b, d)


class ModifiedResNet(nn.Module):
    """A ResNet with a stem of three convolutions, average pooling for strides, and attention pooling at its end."""

    def __init__(self, image_size, layers, width, embed_dim, norm):
        super().__init__()
        positions = (
            divide(
                image_size,
                32,
                "a ResNet halves its input five times: image_size must be a multiple of 32",
            )
            ** 2
        )
        half = divide(
            width, 2, "the ResNet's stem has vision_width / 2 channels: vision_width must be even"
        )
        norm = dict(batch=nn.BatchNorm2d, group=group_norm)[norm]
        self.conv1, self.bn1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), norm(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, bias=False), norm(half)
        self.conv3, self.bn3 = nn.Conv2d(half, width, 3, padding=1, bias=False), norm(width)
        self.layer1 = Stage(width, width, layers[0], 1, norm)
        self.layer2 = Stage(4 * width, 2 * width, layers[1], 2, norm)
        self.layer3 = Stage(8 * width, 4 * width, layers[2], 2, norm)
        self.layer4 = Stage(16 * width, 8 * width, layers[3], 2, norm)
        self.attnpool = AttentionPool2d(positions, 32 * width, 32 * width // 64, embed_dim)
        self.grad_checkpointing = False

    def stem(self, x):  # (b, 3, S, S)
        x = self.bn1(self.conv1(x)).relu_()  # (b, width/2, S/2, S/2)
        x = self.bn2(self.conv2(x)).relu_()
        x = self.bn3(self.conv3(x)).relu_()  # (b, width, S/2, S/2)
        return F.avg_pool2d(x, 2)  # (b, width, S/4, S/4)

    def forward(self, x):
        for stage in (
            self.stem,
            self.layer1,
            self.layer2,
            self.layer3,
            self.layer4,
        ):  # at last (b, 32 width, S/32, S/32)
            x = recomputed(stage, x, module=self) if self.grad_checkpointing else stage(x)
        return self.attnpool(x)  # (b, d)


class TimmTower(nn.Module):
    """Any image model of timm, with its own pooling, and a linear map to d: OpenCLIP's TimmModel with timm_pool=""."""

    def __init__(self, name, image_size, embed_dim):
        super().__init__()
        import timm  # here, because the towers above do without it

        if not timm.is_model(name):
            raise ConfigError(
                f"timm {timm.__version__} has no model {name!r}{nearest(name, timm.list_models())}"
            )
        self.trunk = timm.create_model(name, num_classes=0)
        self.image_size = image_size or self.trunk.default_cfg["input_size"][-1]
        if image_size and hasattr(self.trunk, "set_input_size"):  # the others take any size
            self.trunk.set_input_size(image_size)
        width = getattr(self.trunk, "head_hidden_size", self.trunk.num_features)
        self.head = nn.Sequential(OrderedDict(proj=nn.Linear(width, embed_dim, bias=False)))

    def forward(self, x):
        return self.head(self.trunk(x))  # (b, d)


class CLIP(nn.Module):
    """The two towers; make one with `create`. The text tower's parameters lie directly in here, as in OpenCLIP."""

    def __init__(
        self,
        visual,
        image_size,
        embed_dim,
        context_length,
        vocab_size,
        text_width,
        text_heads,
        text_layers,
        tau_init,
    ):
        super().__init__()
        self.visual, self.image_size, self.embed_dim, self.context_length = (
            visual,
            image_size,
            embed_dim,
            context_length,
        )
        self.token_embedding = nn.Embedding.from_pretrained(
            torch.randn(vocab_size, text_width) * 0.02, freeze=False
        )
        self.positional_embedding = nn.Parameter(torch.randn(context_length, text_width) * 0.01)
        self.transformer = Transformer(text_width, text_layers, text_heads, causal=True)
        self.ln_final = LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.randn(text_width, embed_dim) * text_width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(tau_init)))
        self.register_buffer(
            "pixel_mean",
            torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1),
            persistent=False,
        )
        self.register_buffer(
            "pixel_std",
            torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1),
            persistent=False,
        )

        # As in GPT-2, what adds to the stream is scaled down by the number of additions. (OpenCLIP's ViT blocks keep torch's.)
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=text_width**-0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * text_width) ** -0.5)
            for added in (block.attn.out_proj, block.mlp.c_proj):
                nn.init.normal_(added.weight, std=(2 * text_layers * text_width) ** -0.5)

    def forward(self, images, tokens, token_index=None):
        """-> (image_features [b, d], text_features [b, d]), each row of length 1; see encode_image and encode_text."""
        return self.encode_image(images), self.encode_text(tokens, token_index)

    def encode_image(self, images, normalize=True):
        """images [b, 3, image_size, image_size], uint8, or float with CLIP's mean and std already applied -> features [b, d].

        They have length 1, in float32 even under autocast (a float64 model: float64), unless normalize=False. Raises ValueError
        for another shape. Any memory format will do; for is_resnet(model), a model in channels_last is the faster one.
        """
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"images are {list(images.shape)}, expected [b, 3, {self.image_size}, {self.image_size}]"
            )
        if (
            images.dtype == torch.uint8
        ):  # bytes travelled to the device, a quarter of what floats are
            layout = torch.channels_last if is_resnet(self) else torch.contiguous_format
            images = (
                images.to(self.pixel_mean.dtype, memory_format=layout) / 255 - self.pixel_mean
            ) / self.pixel_std
        features = self.visual(images)
        return unit_length(features) if normalize else features

    def encode_text(self, tokens, token_index=None, normalize=True):
        """tokens int64 [b, L], L <= context_length, zeros after the end -> features [b, d]; normalize as in encode_image.

        The feature is read at <end_of_text>, the largest token id, and no token sees a later one: what comes after it does
        not matter. token_index int64 [T], from `pack`: the places that are computed; without it, all b * L. The features are the
        same. Raises ValueError for more than context_length tokens.
        """
        b, L = tokens.shape
        if L > self.context_length:
            raise ValueError(f"captions of {L} tokens, but context_length is {self.context_length}")
        rows, end = torch.arange(0, b * L + 1, L, device=tokens.device), tokens.argmax(-1)
        token_index = (
            torch.arange(b * L, device=tokens.device) if token_index is None else token_index
        )
        head = self.text_projection.shape[0] // self.transformer.resblocks[0].attn.heads
        varlen = (
            VARLEN
            and tokens.is_cuda
            and torch.cuda.get_device_capability(tokens.device) >= (8, 0)
            and head % 8 == 0
        )
        packing = Packing(
            token_index,
            ends=torch.searchsorted(token_index, rows[:-1] + end),
            seen=(torch.arange(L, device=tokens.device) <= end[:, None])[:, None, None],
            starts=torch.searchsorted(token_index, rows, out_int32=True) if varlen else None,
        )
        x = self.token_embedding(tokens.flatten()[token_index]) + F.embedding(
            token_index % L, self.positional_embedding
        )  # (T, w)
        features = self.ln_final(self.transformer(x, packing)) @ self.text_projection  # (b, d)
        return unit_length(features) if normalize else features

    def set_grad_checkpointing(self, enable=True):
        """Keep only the inputs of transformer blocks and ResNet stages; compute the rest again in the backward pass."""
        for module in self.modules():
            if isinstance(module, (Transformer, ModifiedResNet)):
                module.grad_checkpointing = enable
            elif isinstance(module, TimmTower):
                module.trunk.set_grad_checkpointing(enable)

    def compile_blocks(self, **options):
        """torch.compile, with `options`, each transformer block and ResNet stage in place (a timm tower whole); names stay.

        One by one, so that gradients appear, and are reduced, all along the backward pass. Equal blocks are compiled once.
        """
        torch._dynamo.config.cache_size_limit = (
            64  # 4 stages x (train, eval, other batch sizes) pass torch's limit, 8
        )
        fixed = set(
            self.visual.modules()
        )  # left to itself, torch makes one slower graph for stages of several sizes
        for module in self.modules():
            if isinstance(module, (Block, Stage, TimmTower)):
                module.compile(dynamic=False if module in fixed else None, **options)


def create(name, tau_init=0.07, **overrides):
    """-> CLIP in float32, new weights from torch's random generator: seed it before. logit_scale is ln(1 / tau_init).

    name: one of MODELS, any of its numbers overridden: create("RN50", image_size=64, vision_norm="group"); or "timm:NAME", an
    image model of timm with the text tower of ViT-B-32, d = 512. A ViT has vision_width // 64 heads, as in OpenCLIP, or one.
    Raises ValueError for an unknown name or number, naming the nearest, and for numbers that do not fit, with the arithmetic.
    """
    if name not in MODELS and not name.startswith("timm:"):
        raise ConfigError(
            f"unknown model {name!r}{nearest(name, MODELS)}; there are {', '.join(MODELS)} and timm:NAME"
        )
    n = dict(MODELS.get(name) or dict(embed_dim=512, image_size=None, **TEXT))
    for key, value in overrides.items():
        if key not in n:
            raise ConfigError(
                f"{name} has no number {key!r}{nearest(key, n)}; it has {', '.join(n)}"
            )
        stages = isinstance(n[key], tuple)
        values = value if stages and isinstance(value, (tuple, list)) else [value]
        if not (
            value in ("batch", "group")
            if key == "vision_norm"
            else len(values) == (4 if stages else 1)
            and all(type(v) is int and v > 0 for v in values)
        ):
            raise ConfigError(
                f"{name}: {key} = {value!r}; give a positive integer (vision_norm: 'batch' or 'group'; stages: four)"
            )
        n[key] = value
    if name not in MODELS:
        visual = TimmTower(name[len("timm:") :], n["image_size"], n["embed_dim"])
    elif "patch_size" in n:
        visual = VisionTransformer(
            n["image_size"], n["patch_size"], n["vision_width"], n["vision_layers"], n["embed_dim"]
        )
    else:
        visual = ModifiedResNet(
            n["image_size"], n["vision_layers"], n["vision_width"], n["embed_dim"], n["vision_norm"]
        )
    return CLIP(
        visual,
        n["image_size"] or visual.image_size,
        n["embed_dim"],
        **{k: n[k] for k in TEXT},
        tau_init=tau_init,
    )


def pack(lengths, longest, device="cpu"):
    """lengths int64 [b], on the CPU, of captions padded to [b, longest] -> token_index int64 [T] on `device`, for encode_text.

    token_index are the places of the captions' own tokens, and of a little padding behind the first captions, which makes T a multiple
    of b: half a token per caption on average, and over all batches T takes at most `longest` values. So compiled graphs are
    reused. The host knows T and waits for nothing.
    """
    room, padding = longest - lengths, -lengths.sum() % len(lengths)
    added = (
        (padding - (room.cumsum(0) - room)).clamp(min=0).minimum(room)
    )  # fill the first caption, then the next
    token_index = (
        (torch.arange(longest) < (lengths + added)[:, None]).flatten().nonzero().squeeze(1)
    )
    return (
        token_index.pin_memory().to(device, non_blocking=True)
        if torch.device(device).type == "cuda"
        else token_index.to(device)
    )


def is_resnet(model):
    return isinstance(model.visual, ModifiedResNet)


def num_parameters(model):
    """-> dict(image, text, total) of int. logit_scale is in the total only."""
    image, total = (sum(p.numel() for p in m.parameters()) for m in (model.visual, model))
    return dict(image=image, text=total - image - 1, total=total)


def forward_flops(model, text_len):
    """-> dict(image, text) of int: FLOPs of one image, and of one caption of text_len tokens, in the forward pass.

    Of matrix products and convolutions, two per multiply-add; attention in full, as if not causal. Any device, compiled or not.
    """
    memo = {id(t): t.detach().to("meta") for t in (*model.parameters(), *model.buffers())}
    shapes, size = (
        copy.deepcopy(model, memo).eval(),
        model.image_size,
    )  # what is in memo counts as copied: no data here

    def count(encode, *shape, dtype):  # MATH: attention as two products, which every torch counts
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            encode(torch.zeros(shape, dtype=dtype, device="meta"))
        return counter.get_total_flops()

    return dict(
        image=count(shapes.encode_image, 1, 3, size, size, dtype=torch.uint8),
        text=count(shapes.encode_text, 1, text_len, dtype=torch.int64),
    )


def unit_length(x):
    return F.normalize(
        x if x.dtype == torch.float64 else x.float(), dim=-1
    )  # bfloat16 would be off by 0.4 %


def recomputed(block, *args, module=None):
    """block(*args), keeping args alone for the backward pass. `module`: whose batch statistics the second run must not count again."""
    return checkpoint(
        block,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,  # there is no dropout
        context_fn=lambda: (contextlib.nullcontext(), frozen_batch_stats(module or block)),
    )


@contextlib.contextmanager
def frozen_batch_stats(module):
    """Inside, batch norm trains as ever, but leaves its running averages alone: for a second pass over the same samples."""
    norms = [
        (m, m.momentum, m.num_batches_tracked)
        for m in module.modules()
        if isinstance(m, nn.BatchNorm2d)
    ]
    for m, _, _ in norms:
        m.momentum, m.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for m, momentum, count in norms:
            m.momentum, m.num_batches_tracked = momentum, count


def divide(a, b, rule):
    if a % b:
        raise ConfigError(f"{rule}, but {a} = {b} * {a // b} + {a % b}")
    return a // b


def nearest(word, words):
    found = difflib.get_close_matches(word, words, 1, cutoff=0.5)
    return f", did you mean {found[0]!r}?" if found else ""
