"""Packed captions: features and gradients are those of padded ones, in whatever batch; graphs are compiled once for all sizes."""

import copy
import functools
import types
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from towers import captions, pictures, tiny

import data
import dist
import model as models
import optim
import train as training
from config import Config
from loss import ContrastiveLoss
from runtime import hardware

LENGTHS = {
    "all": list(range(2, 21)),
    "one": [7],
    "equal": [9] * 6,
    "one full": [20],
    "all full": [20] * 3,
    "short": [2] * 5,
    "tail": [3, 20, 5, 2, 2],
    "little room": [20, 20, 20, 6],
}


def packed(lengths, trim=True, context_length=20, vocab_size=1000):
    """-> tokens (b, L), token_index (T,)."""
    lengths = torch.tensor(lengths)
    longest = int(lengths.max()) if trim else context_length
    return captions(lengths, context_length, vocab_size)[:, :longest], models.pack(lengths, longest)


def gradients(model, *args):
    """Features, and the gradients of a function of them that treats no two numbers alike."""
    model.zero_grad(set_to_none=True)
    features = model.encode_text(*args)
    (
        features
        * torch.linspace(-1, 2, features.numel(), dtype=features.dtype).view_as(features).sin()
    ).sum().backward()
    return {
        "features": features.detach(),
        **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    }


def assert_same(a, b, atol, rtol=0.0):
    assert a.keys() == b.keys() and len(a) > 20
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], atol=atol, rtol=rtol, msg=lambda m: f"{name}: {m}"
        )


@pytest.mark.parametrize("name", LENGTHS)
def test_pack(name):
    lengths = torch.tensor(LENGTHS[name])
    b = len(lengths)
    for longest in range(int(lengths.max()), 22):
        token_index = models.pack(lengths, longest)
        rows, places = token_index // longest, token_index % longest
        kept = torch.bincount(rows, minlength=b)
        assert (
            (token_index.diff() > 0).all() and (kept >= lengths).all() and (kept <= longest).all()
        )
        assert torch.equal(
            places, torch.cat([torch.arange(k) for k in kept])
        )  # each caption from its start on
        assert (
            len(token_index) % b == 0 and len(token_index) - lengths.sum() < b
        )  # half a token each is the mean waste


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("trim", [True, False])
def test_features_and_gradients_are_those_of_padded_captions(name, trim):
    model = tiny("vit").double()
    tokens, token_index = packed(LENGTHS[name], trim)
    full = F.pad(tokens, (0, 20 - tokens.shape[1]))
    assert_same(gradients(model, tokens, token_index), gradients(model, full), atol=1e-10)
    model.float()
    assert_same(gradients(model, tokens, token_index), gradients(model, full), atol=2e-5, rtol=1e-4)


def test_padding_does_not_matter():
    """Neither what is in the padding that fills T up, nor in the rest of it; and nothing of it has a gradient."""
    model = tiny("vit").double()
    tokens, token_index = packed([3, 20, 5, 2, 2])
    assert len(token_index) == 35 and len(token_index) > 32  # three places of padding are computed
    before = gradients(model, tokens, token_index)
    places = torch.arange(20) >= torch.tensor([3, 20, 5, 2, 2])[:, None]
    after = gradients(model, tokens.masked_fill(places, 777), token_index)
    assert_same(before, after, atol=1e-12)
    assert (
        after["token_embedding.weight"][777].abs().max()
        == 0
        == before["token_embedding.weight"][0].abs().max()
    )


def test_bfloat16():
    model = tiny("vit")
    tokens, token_index = packed(LENGTHS["all"])
    exact = model.encode_text(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        low = model.encode_text(tokens, token_index)
        assert model.encode_text(tokens, token_index, normalize=False).dtype == torch.bfloat16
    assert low.dtype == torch.float32 and F.cosine_similarity(low, exact).min() > 0.99
    low.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_checkpointing():
    model = tiny("vit").double()
    args = packed(LENGTHS["tail"])
    plain = gradients(model, *args)
    model.set_grad_checkpointing()
    assert_same(gradients(model, *args), plain, atol=1e-12)


def test_openclips_text_tower():
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    numbers = dict(embed_dim=32, text_width=48, text_heads=3, text_layers=3)
    model = models.create(
        "ViT-B-32", image_size=32, vision_layers=1, vision_width=64, **numbers
    ).double()
    other = open_clip.model.CLIP(
        32,
        dict(image_size=32, patch_size=32, layers=1, width=64),
        dict(width=48, heads=3, layers=3),
    ).double()
    other.load_state_dict(model.state_dict())
    tokens, token_index = packed([5, 77, 17, 2, 30], context_length=77, vocab_size=49408)
    other.encode_text = functools.partial(other.encode_text, normalize=True)
    mine, theirs = gradients(model, tokens, token_index), gradients(other, tokens)
    assert_same(mine, theirs, atol=1e-9, rtol=1e-9)  # the largest gradients are over 1000


@pytest.mark.parametrize("micro_batch", [0, 4])
def test_a_training_step(micro_batch):
    """train_step on packed captions: the gradients of the padded model, with micro-batches too, each packed by itself."""
    c = Config(
        algorithm="fastclip-v3", batch_size=8, micro_batch=micro_batch, lr=0.0, warmup_steps=1
    )
    lengths = torch.tensor([3, 20, 5, 2, 2, 9, 11, 4])
    torch.manual_seed(1)
    model = tiny("vit").double()
    batch = data.Batch(
        pictures(8, model.image_size), captions(lengths, 20, 1000), lengths, torch.arange(8), {}
    )
    found = []
    for padded in (False, True):
        one = copy.deepcopy(model)
        if padded:
            one.forward = types.MethodType(
                lambda self, images, tokens, token_index: (
                    self.encode_image(images),
                    self.encode_text(tokens),
                ),
                one,
            )
        optimizer = optim.create(one, c)
        training.train_step(
            batch,
            one,
            ContrastiveLoss(c.algorithm, 8),
            optimizer,
            dist.GradReducer(one.parameters()),
            torch.amp.GradScaler("cpu", enabled=False),
            nullcontext,
            c,
            0,
            10,
            10,
        )
        found.append({name: p.grad for name, p in one.named_parameters()})
    assert_same(*found, atol=1e-7)  # the contrast itself is in float32


def test_no_recompiles_after_warm_up():
    """Two batches of different sizes are all the warm-up there is: then no length, of T or L, compiles anything anew."""
    torch._dynamo.reset()
    model = tiny("vit")
    compiled = copy.deepcopy(model)
    compiled.compile_blocks(backend="aot_eager")  # inductor compiles as often, but longer

    def compare(lengths, seed):
        generator = torch.Generator().manual_seed(seed)
        args = packed(
            lengths if lengths else torch.randint(2, 21, (8,), generator=generator).tolist()
        )
        assert_same(gradients(compiled, *args), gradients(model, *args), atol=1e-4, rtol=1e-3)
        compiled.encode_image(pictures(8, model.image_size)).sum().backward()

    try:
        compare([3, 9, 12, 7, 5, 6, 8, 4], 0)
        compare([3, 19, 5, 2, 2, 17, 16, 15], 1)
        torch._dynamo.utils.counters.clear()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in range(2, 12):
                compare(None, seed)
            compare([20] * 8, 0)
            compare([2] * 8, 0)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    finally:
        torch._dynamo.reset()


def test_how_varlen_attention_is_called(monkeypatch):
    """Without a GPU: a stand-in that goes through the captions one by one."""

    def one_by_one(q, k, v, starts, starts_k, longest, longest_k, window_size):
        assert (
            q.shape == k.shape == v.shape == (len(token_index), 3, 16)
            and starts is starts_k
            and starts.dtype == torch.int32
        )
        assert (
            window_size == (-1, 0)
            and longest == longest_k >= starts.diff().max()
            and starts[-1] == len(q)
        )
        captions = zip(*(x.split(starts.diff().tolist()) for x in (q, k, v)))
        out = [
            F.scaled_dot_product_attention(
                *(x.transpose(0, 1) for x in qkv), is_causal=True
            ).transpose(0, 1)
            for qkv in captions
        ]
        calls.append(torch.cat(out))
        return calls[-1]

    calls = []
    monkeypatch.setattr(models, "varlen_attn", one_by_one, raising=False)
    model = tiny("vit").bfloat16()
    lengths = torch.tensor(LENGTHS["tail"])
    token_index, end = models.pack(lengths, 20), lengths - 1
    rows = torch.arange(0, 101, 20)
    packing = models.Packing(
        token_index,
        torch.searchsorted(token_index, rows[:-1] + end),
        (torch.arange(20) <= end[:, None])[:, None, None],
        None,
    )
    x = torch.randn(len(token_index), 48, dtype=torch.bfloat16)
    padded = model.transformer(x, packing)
    assert not calls
    varlen = model.transformer(
        x, packing._replace(starts=torch.searchsorted(token_index, rows, out_int32=True))
    )
    assert len(calls) == 1 and varlen.shape == (5, 48)  # of two layers: the last has one query
    torch.testing.assert_close(varlen, padded, rtol=0.05, atol=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu(precision):
    """float32 attends on padded captions, bfloat16 through varlen attention if there is one; nothing waits for the device."""
    model = tiny("vit").cuda()
    autocast = hardware.autocast(
        hardware.precision(precision, torch.device("cuda")), torch.device("cuda")
    )
    for lengths in LENGTHS.values():
        lengths = torch.tensor(lengths)
        tokens = captions(lengths, 20, 1000).cuda()
        with autocast():
            padded = gradients(model, tokens)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with autocast():
                model.encode_text(tokens, models.pack(lengths, 20, "cuda")).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        with autocast():
            found = gradients(model, tokens, models.pack(lengths, 20, "cuda"))
        assert all(x.isfinite().all() for x in found.values())
        scale = 1e-4 if precision == "fp32" else 5e-2
        for name, x in padded.items():
            assert (found[name] - x).norm() <= scale * x.norm() + 1e-6, name
