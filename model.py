"""CLIP: an image tower and a text tower that map into one feature space.

    images (b, 3, S, S)                tokens (b, L)
           |                                |
    pixel mean and std                 leave out the padding                (T,)
           |                                |
           |                           token + position embedding           (T, w)
           |                                |
    ViT, ResNet or timm model          causal transformer                   (T, w)
           |                                |
           |                           read at <end_of_text>                (b, w)
           |                                |
      projection                       projection
           |                                |
    image_features (b, d)              text_features (b, d)                 rows of length 1

Letters: b samples, S x S pixels, L tokens per padded caption, T tokens in all captions together,
w the width of a tower, d = embed_dim.

The architecture is that of Radford et al. 2021 (arXiv 2103.00020), with the exact GELU. Names,
shapes and initial distributions of all parameters are OpenCLIP's, so that
`open_clip.create_model_and_transforms(name, pretrained=path)` loads what we save.
"""

import contextlib
import copy
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

from config import ConfigError, nearest

try:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.10 has varlen_attn too, but without window_size, which tells it to be causal.
    VARLEN = "window_size" in inspect.signature(varlen_attn).parameters
except ImportError:
    VARLEN = False

TEXT = dict(
    context_length=77,
    vocab_size=49408,
    text_width=512,
    text_heads=8,
    text_layers=12,
)

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
        embed_dim=512,
        image_size=224,
        vision_layers=12,
        vision_width=768,
        patch_size=32,
        **TEXT,
    ),
    "ViT-B-16": dict(
        embed_dim=512,
        image_size=224,
        vision_layers=12,
        vision_width=768,
        patch_size=16,
        **TEXT,
    ),
}

# CLIP's mean and standard deviation of red, green and blue, for pixels from 0 to 1.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


# Transformer blocks that are compiled as one. Gradients are reduced from run to run.
BLOCKS_PER_RUN = 3


# ---- Packing: captions without their padding ----
#
# A batch of captions is padded with zeros to tokens (b, L). Captions from the web are short: at
# CC3M's median of 17 tokens, three quarters of a context of 77 is padding. No feature depends on
# it. So the text tower leaves it out and computes on the captions' own tokens, laid one behind
# another: on (T, w) in place of (b, L, w).
#
# Two captions of 3 and 5 tokens, padded to L = 6 (S is <start_of_text>, E is <end_of_text>, a dot
# is padding):
#
#     tokens (b, L)            S a E . . .             positions 0 to 5
#                              S b c d E .             positions 6 to 11
#
#     packed (T,)              S a E S b c d E
#     token_index (T,)         0 1 2 6 7 8 9 10        packed = tokens.flatten()[token_index]
#
# Embeddings, norms, MLPs and projections treat each token by itself and need nothing else.
# Attention mixes tokens, but only those of one caption, so it must know where each caption begins.
# On a GPU, varlen attention computes on packed tokens, given these borders. Elsewhere the queries,
# keys and values are padded for attention alone, and its output is packed again.


def pack(lengths, longest, device="cpu"):
    """Positions of the tokens to compute, for `encode_text`.

    lengths: int64 (b,) on the CPU, of captions padded to (b, longest).
    Returns token_index, int64 (T,) on `device`: ascending positions in the flattened (b, longest).

    T is rounded up to a multiple of b by keeping some padding behind the first captions, half a
    token per caption on average. For a given b, T then has at most `longest` values, so compiled
    graphs are reused. The host knows T and copies to a GPU asynchronously, so nothing waits for
    the device.
    """
    b = len(lengths)
    padding = longest - lengths  # (b,) behind each caption
    extra = -lengths.sum() % b  # how many positions of padding to keep

    # Keep the padding of the first caption, then of the next, until there are `extra` positions.
    padding_before = padding.cumsum(0) - padding  # (b,) behind all earlier captions
    kept = (extra - padding_before).clamp(min=0).minimum(padding)  # (b,)

    computed = torch.arange(longest) < (lengths + kept)[:, None]  # (b, longest)
    token_index = computed.flatten().nonzero().squeeze(1)  # (T,)

    if torch.device(device).type == "cuda":
        return token_index.pin_memory().to(device, non_blocking=True)
    return token_index.to(device)


class Packing(NamedTuple):
    """What the transformer must know about packed captions; made by `make_packing`.

    For the two captions above:

        packed (T,)              S a E S b c d E
        token_index (T,)         0 1 2 6 7 8 9 10
        ends (b,)                    2         7
        starts (b + 1,)          0     3         8
        end_mask (b, 1, 1, L)    1 1 1 0 0 0
                                 1 1 1 1 1 0

    Varlen attention of one query per caption, <end_of_text>, must not see the padding that may be
    kept behind it. So there each caption has two segments: its own tokens, with one query, and the
    padding behind them, with none.

        key_starts (2b + 1,)     0     3 3       8 8
        query_starts (2b + 1,)   0     1 1       2 2
    """

    # int64 (T,): position of each packed token in the flattened (b, L).
    token_index: torch.Tensor
    # int64 (b,): index of each <end_of_text> among the T, where features are read.
    ends: torch.Tensor
    # bool (b, 1, 1, L): positions that <end_of_text> attends to, in the padded layout.
    end_mask: torch.Tensor
    # int32 (b + 1,): index of each caption's first token among the T, and T at the end; or None,
    # without varlen attention.
    starts: torch.Tensor | None
    # int32 (2b + 1,): where the segments begin among the T, and among the b queries; or None.
    key_starts: torch.Tensor | None
    query_starts: torch.Tensor | None

    def has_varlen(self, dtype):
        """Whether queries, keys and values of this dtype are attended to by varlen attention."""
        return self.starts is not None and dtype in (torch.bfloat16, torch.float16)

    def pad(self, x):
        """(T, w) -> (b, L, w), zeros where nothing is packed."""
        b, _, _, L = self.end_mask.shape
        padded = x.new_zeros(b * L, x.shape[-1]).index_copy(0, self.token_index, x)
        return padded.unflatten(0, (b, L))

    def unpad(self, x):
        """(b, L, w) -> (T, w), the reverse of pad."""
        return x.flatten(0, 1).index_select(0, self.token_index)


def make_packing(tokens, token_index, varlen):
    """The Packing of tokens, int64 (b, L), at token_index, int64 (T,), from `pack`.

    varlen: whether varlen attention will be used, which needs `starts`.
    """
    b, L = tokens.shape
    device = tokens.device

    # Where rows begin and captions end in the padded layout. <end_of_text> is the largest token id.
    rows = torch.arange(0, b * L + 1, L, device=device)  # (b + 1,), in the flattened (b, L)
    end = tokens.argmax(-1)  # (b,), in its row

    # The same among the T packed tokens: token_index is ascending, so a search finds a position.
    ends = torch.searchsorted(token_index, rows[:-1] + end)
    end_mask = torch.arange(L, device=device) <= end[:, None]  # (b, L)
    end_mask = end_mask[:, None, None]
    if not varlen:
        return Packing(token_index, ends, end_mask, None, None, None)

    starts = torch.searchsorted(token_index, rows, out_int32=True)
    key_starts = torch.stack([starts[:-1], ends.int() + 1], 1).flatten()  # (2b,)
    key_starts = torch.cat([key_starts, starts[-1:]])  # (2b + 1,)
    query_starts = torch.arange(1, 2 * b + 2, device=device, dtype=torch.int32) // 2
    return Packing(token_index, ends, end_mask, starts, key_starts, query_starts)


def has_varlen(device, head_size):
    """Whether `device` has varlen attention for heads of this size (bfloat16 and float16 only)."""
    if not VARLEN or device.type != "cuda":
        return False

    ampere_or_newer = torch.cuda.get_device_capability(device) >= (8, 0)
    return ampere_or_newer and head_size % 8 == 0


# ---- Transformer ----


class LayerNorm(nn.LayerNorm):
    """LayerNorm that returns its input's dtype. Under autocast, torch's would return float32."""

    def forward(self, x):
        return super().forward(x).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention. Parameters: names and initial values of nn.MultiheadAttention."""

    def __init__(self, width, heads, causal):
        super().__init__()
        rule = "attention: the width must split evenly into the heads"
        self.head_size = divide(width, heads, rule)
        self.heads = heads
        self.causal = causal

        self.in_proj_weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * width, width)))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x, packing=None):
        """x: (b, L, w), or (T, w) with a packing. Returns the same shape."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (b, L, 3w) or (T, 3w)

        if packing is None:
            x = self.attend(qkv)  # (b, L, w)
        elif packing.has_varlen(qkv.dtype):
            x = self.attend_packed(qkv, packing)  # (T, w)
        else:
            x = packing.unpad(self.attend(packing.pad(qkv)))  # (T, w)

        return self.out_proj(x)

    def attend(self, qkv):
        """(b, L, 3w) -> (b, L, w)."""
        q, k, v = self.split_heads(qkv)  # (b, heads, L, w/heads) each
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # the same
        return x.transpose(1, 2).flatten(2)

    def attend_packed(self, qkv, packing):
        """(T, 3w) -> (T, w), causal: each token attends to the earlier ones of its own caption."""
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(1)  # (T, heads, w/heads) each
        starts = packing.starts
        longest = packing.end_mask.shape[-1]

        # Window (-1, 0): all tokens before a token, none after it.
        x = varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0))
        return x.flatten(1)

    def attend_from(self, query, x, packing=None):
        """Attention from one query per sequence, to the keys and values of all its tokens.

        query: (b, w), one token of each sequence. x: (b, L, w), or (T, w) with a packing.
        Returns (b, w).
        """
        w = x.shape[-1]
        q_weight, kv_weight = self.in_proj_weight.split([w, 2 * w])
        q_bias, kv_bias = self.in_proj_bias.split([w, 2 * w])

        q = F.linear(query, q_weight, q_bias)  # (b, w)
        kv = F.linear(x, kv_weight, kv_bias)  # (b, L, 2w) or (T, 2w)

        if packing is None:
            x = self.attend_one(q, kv)  # (b, w)
        elif packing.has_varlen(kv.dtype):
            x = self.attend_one_packed(q, kv, packing)  # (b, w)
        else:
            x = self.attend_one(q, packing.pad(kv), packing.end_mask)  # (b, w)

        return self.out_proj(x)

    def attend_one(self, q, kv, mask=None):
        """q (b, w), kv (b, L, 2w) -> (b, w). mask: bool (b, 1, 1, L), what a query attends to."""
        q = q.unflatten(-1, (self.heads, 1, -1))  # (b, heads, 1, w/heads)
        k, v = self.split_heads(kv)  # (b, heads, L, w/heads) each
        x = F.scaled_dot_product_attention(q, k, v, mask)  # (b, heads, 1, w/heads)
        return x.flatten(1)

    def attend_one_packed(self, q, kv, packing):
        """q (b, w), kv (T, 2w) -> (b, w): each query attends to the tokens of its own caption.

        There is no mask, which for L = 77 would not be aligned as GPUs like it. Keys of a segment
        without queries, the padding, get gradients of zero.
        """
        q = q.unflatten(-1, (self.heads, -1))  # (b, heads, w/heads)
        k, v = kv.unflatten(-1, (2, self.heads, -1)).unbind(1)  # (T, heads, w/heads) each
        longest = packing.end_mask.shape[-1]

        x = varlen_attn(q, k, v, packing.query_starts, packing.key_starts, 1, longest)
        return x.flatten(1)

    def split_heads(self, x):
        """(b, L, n w) -> (n, b, heads, L, w/heads), to be unpacked into n tensors."""
        return x.unflatten(-1, (-1, self.heads, self.head_size)).permute(2, 0, 3, 1, 4)


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, width, heads, causal):
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.ln_2 = LayerNorm(width)
        mlp = OrderedDict(
            c_fc=nn.Linear(width, 4 * width),
            gelu=nn.GELU(),
            c_proj=nn.Linear(4 * width, width),
        )
        self.mlp = nn.Sequential(mlp)

    def forward(self, x, packing=None, last=False):
        """x: (b, L, w), or (T, w) with a packing. Returns the same shape; the last block (b, w)."""
        if last:
            return self.forward_last(x, packing)

        x = x + self.attn(self.ln_1(x), packing)
        x = x + self.mlp(self.ln_2(x))
        return x

    def forward_last(self, x, packing):
        """The same, computed only for the one token of each sequence that becomes the feature."""
        y = self.ln_1(x)
        x = feature_token(x, packing)  # (b, w)
        x = x + self.attn.attend_from(feature_token(y, packing), y, packing)
        x = x + self.mlp(self.ln_2(x))
        return x


def feature_token(x, packing):
    """(b, L, w), or (T, w) with a packing -> (b, w): the token that becomes the feature."""
    if packing is None:
        return x[:, 0]  # the class token of images
    return x.index_select(0, packing.ends)  # <end_of_text> of captions


class Run(nn.Module):
    """Neighbouring blocks, which are compiled as one: fewer calls than block by block.

    It has no parameters of its own. A tuple keeps nn.Module from counting those of the blocks.
    """

    def __init__(self, blocks):
        super().__init__()
        self.blocks = tuple(blocks)

    def forward(self, x, packing=None, last=False):
        """As Block.forward. last: of the last run."""
        for block in self.blocks:
            x = block(x, packing, last and block is self.blocks[-1])
        return x


class Transformer(nn.Module):
    """A stack of blocks. It returns one token per sequence, see feature_token."""

    def __init__(self, width, layers, heads, causal):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, causal) for _ in range(layers))
        starts = range(0, layers, BLOCKS_PER_RUN)
        self.runs = nn.ModuleList(Run(self.resblocks[i : i + BLOCKS_PER_RUN]) for i in starts)
        self.grad_checkpointing = False

    def forward(self, x, packing=None):
        """x: (b, L, w), or (T, w) with a packing. Returns (b, w)."""
        if self.grad_checkpointing:
            for block in self.resblocks:
                x = checkpointed(block, x, packing, block is self.resblocks[-1])
            return x

        for run in self.runs:
            x = run(x, packing, run is self.runs[-1])
        return x


class Region(nn.Module):
    """A method of a module, as a module of its own: so that it can be compiled by itself."""

    def __init__(self, method):
        super().__init__()
        self.method = method

    def forward(self, *args):
        return self.method(*args)


# ---- Image towers ----


class VisionTransformer(nn.Module):
    """ViT: patch embedding, class token, transformer, projection."""

    def __init__(self, image_size, patch_size, width, layers, embed_dim):
        super().__init__()
        self.image_size = image_size
        rule = "image_size must be a whole number of patches"
        patches = divide(image_size, patch_size, rule) ** 2
        heads = max(1, width // 64)  # as in OpenCLIP

        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        std = width**-0.5
        self.class_embedding = nn.Parameter(torch.randn(width) * std)
        self.positional_embedding = nn.Parameter(torch.randn(1 + patches, width) * std)
        self.ln_pre = LayerNorm(width)
        self.ln_post = LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, causal=False)
        self.proj = nn.Parameter(torch.randn(width, embed_dim) * std)
        self.embedding = Region(self.embed_patches)

    def forward(self, x):
        """(b, 3, S, S) -> (b, d)."""
        x = self.transformer(self.embedding(x))  # (b, w)
        return self.ln_post(x) @ self.proj

    def embed_patches(self, x):
        """(b, 3, S, S) -> (b, 1 + patches, w)."""
        x = self.conv1(x)  # (b, w, S/patch_size, S/patch_size)
        x = x.flatten(2).transpose(1, 2)  # (b, patches, w)

        class_token = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)  # (b, 1, w)
        x = torch.cat([class_token, x], dim=1)  # (b, 1 + patches, w)
        x = x + self.positional_embedding.to(x.dtype)
        return self.ln_pre(x)


class ModifiedResNet(nn.Module):
    """ResNet with a stem of three convolutions, average pooling for strides, attention pooling."""

    def __init__(self, image_size, layers, width, embed_dim, norm):
        super().__init__()
        self.image_size = image_size
        rule = "a ResNet halves its input five times: image_size must be a multiple of 32"
        positions = divide(image_size, 32, rule) ** 2
        rule = "the ResNet's stem has vision_width / 2 channels: vision_width must be even"
        half = divide(width, 2, rule)
        norm = nn.BatchNorm2d if norm == "batch" else group_norm

        self.conv1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False)
        self.bn1 = norm(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, bias=False)
        self.bn2 = norm(half)
        self.conv3 = nn.Conv2d(half, width, 3, padding=1, bias=False)
        self.bn3 = norm(width)

        # A stage returns four times its width.
        self.layer1 = Stage(width, width, layers[0], 1, norm)
        self.layer2 = Stage(4 * width, 2 * width, layers[1], 2, norm)
        self.layer3 = Stage(8 * width, 4 * width, layers[2], 2, norm)
        self.layer4 = Stage(16 * width, 8 * width, layers[3], 2, norm)

        self.attnpool = AttentionPool2d(positions, 32 * width, 32 * width // 64, embed_dim)
        self.grad_checkpointing = False
        self.stem = Region(self.apply_stem)

    def apply_stem(self, x):
        """(b, 3, S, S) -> (b, width, S/4, S/4)."""
        x = self.bn1(self.conv1(x)).relu_()  # (b, width/2, S/2, S/2)
        x = self.bn2(self.conv2(x)).relu_()  # the same
        x = self.bn3(self.conv3(x)).relu_()  # (b, width, S/2, S/2)
        return F.avg_pool2d(x, 2)

    def forward(self, x):
        """(b, 3, S, S) -> (b, d)."""
        for stage in (self.stem, self.layer1, self.layer2, self.layer3, self.layer4):
            if self.grad_checkpointing:
                x = checkpointed(stage, x, module=self)
            else:
                x = stage(x)

        # x is (b, 32 width, S/32, S/32).
        return self.attnpool(x)


class Stage(nn.Sequential):
    """`depth` bottleneck blocks, of which the first changes the channels and the resolution."""

    def __init__(self, channels, width, depth, stride, norm):
        blocks = [Bottleneck(channels, width, stride, norm)]
        for _ in range(1, depth):
            blocks.append(Bottleneck(4 * width, width, 1, norm))
        super().__init__(*blocks)


class Bottleneck(nn.Module):
    """Residual block: convolutions of 1 x 1 (to `width` channels), 3 x 3, 1 x 1 (to 4 width)."""

    def __init__(self, channels, width, stride, norm):
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = norm(4 * width)

        # The residual branch starts at zero: a new block returns its shortcut.
        nn.init.zeros_(self.bn3.weight)

        if stride > 1 or channels != 4 * width:
            conv = nn.Conv2d(channels, 4 * width, 1, bias=False)
            self.downsample = nn.Sequential(conv, norm(4 * width))
        else:
            self.downsample = None

    def forward(self, x):
        """(b, channels, h, w) -> (b, 4 width, h/stride, w/stride)."""
        out = self.bn1(self.conv1(x)).relu_()
        out = self.bn2(self.conv2(out)).relu_()

        # Average pooling lowers the resolution. A convolution with a stride would alias.
        if self.stride > 1:
            out = F.avg_pool2d(out, self.stride)
            x = F.avg_pool2d(x, self.stride)

        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            x = self.downsample(x)
        return (out + x).relu_()


def group_norm(channels):
    """GroupNorm in place of BatchNorm2d: the features of a sample do not depend on other samples.

    At most 32 groups, of 8 channels or more (if there are as many).
    """
    for groups in range(32, 1, -1):
        if channels % groups == 0 and channels // groups >= 8:
            return nn.GroupNorm(groups, channels)
    return nn.GroupNorm(1, channels)


class AttentionPool2d(nn.Module):
    """Attention pooling: the mean of all positions, the only query, attends to them and itself."""

    def __init__(self, positions, width, heads, embed_dim):
        super().__init__()
        self.heads = heads
        std = width**-0.5
        self.positional_embedding = nn.Parameter(torch.randn(1 + positions, width) * std)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)
        for proj in (self.k_proj, self.q_proj, self.v_proj, self.c_proj):
            nn.init.normal_(proj.weight, std=std)

    def forward(self, x):
        """(b, w, S/32, S/32) -> (b, d)."""
        x = x.flatten(2).transpose(1, 2)  # (b, positions, w)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1)  # (b, 1 + positions, w)
        x = x + self.positional_embedding.to(x.dtype)

        q = self.split_heads(self.q_proj(x[:, :1]))  # (b, heads, 1, w/heads)
        k = self.split_heads(self.k_proj(x))  # (b, heads, 1 + positions, w/heads)
        v = self.split_heads(self.v_proj(x))  # the same

        x = F.scaled_dot_product_attention(q, k, v)  # (b, heads, 1, w/heads)
        return self.c_proj(x.flatten(1))

    def split_heads(self, x):
        """(b, n, w) -> (b, heads, n, w/heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class TimmTower(nn.Module):
    """An image model of timm, with its own pooling, and a linear map to d.

    It is OpenCLIP's TimmModel with timm_pool="".
    """

    def __init__(self, name, image_size, embed_dim):
        super().__init__()
        import timm  # here, because the other towers do without it

        if not timm.is_model(name):
            hint = nearest(name, timm.list_models(), cutoff=0.5)
            raise ConfigError(f"timm {timm.__version__} has no model {name!r}{hint}")

        self.trunk = timm.create_model(name, num_classes=0)
        self.image_size = image_size or self.trunk.default_cfg["input_size"][-1]

        # Models without set_input_size take images of any size.
        if image_size and hasattr(self.trunk, "set_input_size"):
            self.trunk.set_input_size(image_size)

        width = getattr(self.trunk, "head_hidden_size", self.trunk.num_features)
        proj = nn.Linear(width, embed_dim, bias=False)
        self.head = nn.Sequential(OrderedDict(proj=proj))

    def forward(self, x):
        """(b, 3, S, S) -> (b, d)."""
        return self.head(self.trunk(x))


# ---- CLIP ----


class CLIP(nn.Module):
    """Both towers, made by `create`. The text tower's parts are attributes here, as in OpenCLIP."""

    def __init__(
        self,
        visual,
        embed_dim,
        context_length,
        vocab_size,
        text_width,
        text_heads,
        text_layers,
        tau_init,
    ):
        super().__init__()
        self.visual = visual
        self.image_size = visual.image_size
        self.embed_dim = embed_dim
        self.context_length = context_length

        token_embedding = torch.randn(vocab_size, text_width) * 0.02
        self.token_embedding = nn.Embedding.from_pretrained(token_embedding, freeze=False)
        self.positional_embedding = nn.Parameter(torch.randn(context_length, text_width) * 0.01)
        self.transformer = Transformer(text_width, text_layers, text_heads, causal=True)
        self.ln_final = LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.randn(text_width, embed_dim) * text_width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(tau_init)))

        pixel_mean = torch.tensor(PIXEL_MEAN).view(3, 1, 1)
        pixel_std = torch.tensor(PIXEL_STD).view(3, 1, 1)
        self.register_buffer("pixel_mean", pixel_mean, persistent=False)
        self.register_buffer("pixel_std", pixel_std, persistent=False)
        self.pixels_to_floats = Region(self.normalize_pixels)

        # As in GPT-2, the projections that add to the residual stream start smaller, by the square
        # root of their number. The blocks of a ViT keep torch's initial weights, as in OpenCLIP.
        residual_std = (2 * text_layers * text_width) ** -0.5
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=text_width**-0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * text_width) ** -0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)

    def forward(self, images, tokens, token_index=None):
        """-> image_features (b, d), text_features (b, d); see encode_image and encode_text."""
        return self.encode_image(images), self.encode_text(tokens, token_index)

    def encode_image(self, images, normalize=True):
        """images: (b, 3, image_size, image_size), uint8, or float after CLIP's mean and std.

        Returns features (b, d). Unless normalize=False, they have length 1 and are float32, even
        under autocast (float64 from a float64 model). Raises ValueError for another shape. Any
        memory format will do; if is_resnet(model), a model in channels_last is faster.
        """
        size = self.image_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"images are {list(images.shape)}, expected [b, 3, {size}, {size}]")

        if images.dtype == torch.uint8:
            images = self.pixels_to_floats(images)
        features = self.visual(images)  # (b, d)
        return unit_length(features) if normalize else features

    def normalize_pixels(self, images):
        """uint8 (b, 3, S, S) -> float, with CLIP's mean 0 and standard deviation 1.

        This is done on the device: bytes are a quarter of the floats to send there.
        """
        layout = torch.channels_last if is_resnet(self) else torch.contiguous_format
        images = images.to(self.pixel_mean.dtype, memory_format=layout)
        return (images / 255 - self.pixel_mean) / self.pixel_std

    def encode_text(self, tokens, token_index=None, normalize=True):
        """tokens: int64 (b, L), L <= context_length, zeros after the end.

        token_index: int64 (T,), from `pack`: only these positions are computed. Without it, all b L
        are; the features are the same.

        Returns features (b, d); normalize as in encode_image. They are read at <end_of_text>, the
        largest token id. No token attends to a later one, so what comes after the end does not
        matter. Raises ValueError for L > context_length.
        """
        b, L = tokens.shape
        if L > self.context_length:
            raise ValueError(f"captions of {L} tokens, but context_length is {self.context_length}")

        if token_index is None:
            token_index = torch.arange(b * L, device=tokens.device)
        head_size = self.transformer.resblocks[0].attn.head_size
        packing = make_packing(tokens, token_index, has_varlen(tokens.device, head_size))

        packed = tokens.flatten()[token_index]  # (T,)
        position = token_index % L  # (T,), of each token in its caption
        x = self.token_embedding(packed)  # (T, w)
        x = x + F.embedding(position, self.positional_embedding)

        x = self.transformer(x, packing)  # (T, w) -> (b, w)
        features = self.ln_final(x) @ self.text_projection  # (b, d)
        return unit_length(features) if normalize else features

    def set_grad_checkpointing(self, enable=True):
        """Keep only the inputs of transformer blocks and ResNet stages; recompute in backward."""
        for module in self.modules():
            if isinstance(module, (Transformer, ModifiedResNet)):
                module.grad_checkpointing = enable
            elif isinstance(module, TimmTower):
                module.trunk.set_grad_checkpointing(enable)

    def compile_blocks(self, **options):
        """Apply torch.compile, with `options`, to the parts of both towers.

        It works in place, so parameters keep their names. Since the parts are compiled one by one,
        gradients appear, and are reduced, all along the backward pass. Equal ones are compiled
        once. Blocks are compiled in runs, or each by itself where gradients are checkpointed.
        """
        # 4 stages x (train, eval, other batch sizes) exceed torch's limit of 8 graphs per function.
        torch._dynamo.config.cache_size_limit = 64

        # Images have one size. Without dynamic=False, torch would make a single, slower graph for
        # ResNet stages of several sizes. Captions have many sizes. Left to itself, torch would
        # compile for the first, and anew for all when it meets another: half a minute in which, at
        # different steps, each rank keeps the others waiting.
        captions = set(self.transformer.modules())
        parts = (Block, Run, Stage, Region, AttentionPool2d, TimmTower)
        for module in self.modules():
            if isinstance(module, parts):
                module.compile(dynamic=module in captions, **options)


def unit_length(x):
    """Scale rows to length 1, in float32 or float64: in bfloat16, lengths would be off by 0.4 %."""
    if x.dtype != torch.float64:
        x = x.float()
    return F.normalize(x, dim=-1)


def is_resnet(model):
    return isinstance(model.visual, ModifiedResNet)


# ---- Making a model from its name ----


def create(name, tau_init=0.07, **overrides):
    """A CLIP in float32, with new weights from torch's random generator: seed it before.

    name: one of MODELS, or "timm:NAME": an image model of timm, the text tower of ViT-B-32, and
    d = 512.
    tau_init: the initial temperature; logit_scale is ln(1 / tau_init).
    overrides: any numbers of the model, as in create("RN50", image_size=64, vision_norm="group").

    Raises ConfigError (a ValueError) for an unknown name or number, naming the nearest, and for
    numbers that do not fit, with the arithmetic.
    """
    n = resolve_numbers(name, overrides)

    if name not in MODELS:
        visual = TimmTower(name.removeprefix("timm:"), n["image_size"], n["embed_dim"])
    elif "patch_size" in n:
        visual = VisionTransformer(
            image_size=n["image_size"],
            patch_size=n["patch_size"],
            width=n["vision_width"],
            layers=n["vision_layers"],
            embed_dim=n["embed_dim"],
        )
    else:
        visual = ModifiedResNet(
            image_size=n["image_size"],
            layers=n["vision_layers"],
            width=n["vision_width"],
            embed_dim=n["embed_dim"],
            norm=n["vision_norm"],
        )

    text_numbers = {key: n[key] for key in TEXT}
    return CLIP(visual, n["embed_dim"], tau_init=tau_init, **text_numbers)


def resolve_numbers(name, overrides):
    """-> dict: the numbers of a named model, those in `overrides` replaced. Raises ConfigError."""
    if name in MODELS:
        numbers = dict(MODELS[name])
    elif name.startswith("timm:"):
        numbers = dict(embed_dim=512, image_size=None, **TEXT)
    else:
        names = ", ".join(MODELS)
        raise ConfigError(f"unknown model {name!r}; there are {names} and timm:NAME")

    for key, value in overrides.items():
        if key not in numbers:
            keys = ", ".join(numbers)
            hint = nearest(key, numbers, cutoff=0.75)
            raise ConfigError(f"{name} has no number {key!r}{hint}; it has {keys}")
        check_number(name, key, value, numbers[key])
        numbers[key] = value
    return numbers


def check_number(name, key, value, default):
    """Raise ConfigError unless `value` is of the kind that model `name` takes for `key`."""
    if key == "vision_norm":
        valid = value in ("batch", "group")
        expected = "'batch' or 'group'"
    elif isinstance(default, tuple):
        four = isinstance(value, (tuple, list)) and len(value) == 4
        valid = four and all(is_positive_integer(number) for number in value)
        expected = "four positive integers, one for each stage"
    else:
        valid = is_positive_integer(value)
        expected = "a positive integer"

    if not valid:
        raise ConfigError(f"{name}: {key} = {value!r}; give {expected}")


def is_positive_integer(value):
    # type, not isinstance, because True and False are instances of int.
    return type(value) is int and value > 0


def divide(a, b, rule):
    """a / b if it is a whole number; else raises ConfigError: `rule`, and the arithmetic."""
    if a % b:
        raise ConfigError(f"{rule}, but {a} = {b} * {a // b} + {a % b}")
    return a // b


# ---- What a model costs ----


def num_parameters(model):
    """-> dict(image, text, total) of int. logit_scale is in the total only."""
    image = sum(p.numel() for p in model.visual.parameters())
    total = sum(p.numel() for p in model.parameters())
    return dict(image=image, text=total - image - 1, total=total)


def forward_flops(model, text_len):
    """-> dict(image, text) of int: forward FLOPs of one image, of one caption of text_len tokens.

    It counts matrix products and convolutions, two FLOPs per multiply-add, and attention in full,
    as if it were not causal. The model may be on any device, compiled or not.
    """
    # A copy of the model without data: deepcopy takes tensors found in memo as already copied.
    memo = {}
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = tensor.detach().to("meta")
    shapes = copy.deepcopy(model, memo).eval()

    size = model.image_size
    image = torch.zeros(1, 3, size, size, dtype=torch.uint8, device="meta")
    caption = torch.zeros(1, text_len, dtype=torch.int64, device="meta")
    return dict(
        image=count_flops(shapes.encode_image, image),
        text=count_flops(shapes.encode_text, caption),
    )


@torch.no_grad()
def count_flops(encode, x):
    """FLOPs of encode(x), x on the meta device."""
    # The MATH backend computes attention as two products, which every version of torch counts.
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        encode(x)
    return counter.get_total_flops()


# ---- Gradient checkpointing ----


def checkpointed(block, *args, module=None):
    """block(*args), but only args are kept for the backward pass, which runs the block once more.

    The second run leaves the running batch statistics of `module`, by default the block, alone.
    """

    def contexts():
        return contextlib.nullcontext(), frozen_batch_stats(module or block)

    # There is no dropout, so the random state need not be restored.
    return checkpoint(
        block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )


@contextlib.contextmanager
def frozen_batch_stats(module):
    """Batch norm uses the batch's statistics, but does not add them to its running ones.

    This is for a second pass over the same samples, which would count them twice.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]

    # Momentum 0 keeps the running averages as they are; without a counter, no batch is counted.
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None

    try:
        yield
    finally:
        for norm, (momentum, num_batches_tracked) in zip(norms, before):
            norm.momentum = momentum
            norm.num_batches_tracked = num_batches_tracked
