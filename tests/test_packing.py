"""Packed captions have the features and gradients of padded ones, and compile only once."""

import copy
import functools
import types
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import data
import model as models
import train as training
from config import Config
from runtime import hardware
from towers import captions, pictures, tiny

pytestmark = pytest.mark.usefixtures("one_thread")

# Lengths of the captions of a batch, for tiny models: at most 20 tokens.
LENGTHS = {
    "all lengths": list(range(2, 21)),
    "single": [7],
    "equal": [9] * 6,
    "single full": [20],
    "all full": [20] * 3,
    "all short": [2] * 5,
    "one long": [3, 20, 5, 2, 2],
    "little padding": [20, 20, 20, 6],
}


def packed_captions(lengths, trim=True, context_length=20, vocab_size=1000):
    """-> tokens (b, L), token_index (T,).

    L is the length of the longest caption or, with trim=False, the context length.
    """
    lengths = torch.tensor(lengths)
    longest = int(lengths.max()) if trim else context_length
    tokens = captions(lengths, context_length, vocab_size)[:, :longest]
    return tokens, models.pack(lengths, longest)


def gradients(model, *args):
    """-> {name: tensor}: features of encode_text(*args), and gradients of a function of them.

    The function weighs all numbers differently, so that features that are swapped change gradients.
    """
    model.zero_grad(set_to_none=True)
    features = model.encode_text(*args)
    weights = torch.linspace(-1, 2, features.numel(), dtype=features.dtype).sin()
    (features * weights.view_as(features)).sum().backward()

    found = {"features": features.detach()}
    for name, p in model.named_parameters():
        if p.grad is not None:
            found[name] = p.grad.clone()
    return found


def assert_same(a, b, atol, rtol=0.0):
    """Two dicts of tensors, as `gradients` returns them, are close."""
    assert a.keys() == b.keys()
    assert len(a) > 20
    for name in a:
        try:
            torch.testing.assert_close(a[name], b[name], atol=atol, rtol=rtol)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


# ---- What is packed ----


@pytest.mark.parametrize("name", LENGTHS)
def test_pack_keeps_whole_captions_and_rounds_up_to_a_multiple_of_the_batch(name):
    lengths = torch.tensor(LENGTHS[name])
    b = len(lengths)

    for longest in range(int(lengths.max()), 22):
        token_index = models.pack(lengths, longest)
        rows = token_index // longest
        positions = token_index % longest
        kept = torch.bincount(rows, minlength=b)

        assert (token_index.diff() > 0).all()
        assert (kept >= lengths).all()
        assert (kept <= longest).all()

        # Each caption is kept from its first token on.
        assert torch.equal(positions, torch.cat([torch.arange(count) for count in kept]))

        # Less than one token of padding per caption is computed: half a token in the mean.
        assert len(token_index) % b == 0
        assert len(token_index) - lengths.sum() < b


def test_the_example_in_model_py():
    """Two captions of 3 and 5 tokens, padded to 6."""
    lengths = torch.tensor([3, 5])
    tokens = captions(lengths, 6, 1000)
    token_index = models.pack(lengths, 6)
    packing = models.make_packing(tokens, token_index, varlen=True)

    assert token_index.tolist() == [0, 1, 2, 6, 7, 8, 9, 10]
    assert packing.ends.tolist() == [2, 7]
    assert packing.starts.tolist() == [0, 3, 8]
    assert packing.key_starts.tolist() == [0, 3, 3, 8, 8]
    assert packing.query_starts.tolist() == [0, 1, 1, 2, 2]
    assert packing.end_mask.shape == (2, 1, 1, 6)
    assert packing.end_mask.flatten(1).int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]

    x = torch.randn(8, 4)
    padded = packing.pad(x)
    assert padded.shape == (2, 6, 4)
    assert not padded[0, 3:].any()
    assert not padded[1, 5:].any()
    assert torch.equal(packing.unpad(padded), x)


# ---- Features and gradients ----


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("trim", [True, False])
def test_features_and_gradients_are_those_of_padded_captions(name, trim):
    model = tiny("vit").double()
    tokens, token_index = packed_captions(LENGTHS[name], trim)
    padded = F.pad(tokens, (0, 20 - tokens.shape[1]))

    packed = gradients(model, tokens, token_index)
    assert_same(packed, gradients(model, padded), atol=1e-10)

    model.float()
    packed = gradients(model, tokens, token_index)
    assert_same(packed, gradients(model, padded), atol=2e-5, rtol=1e-4)


def test_padding_does_not_matter_and_gets_no_gradient():
    """Neither the padding that rounds T up, nor the rest of it."""
    model = tiny("vit").double()
    lengths = LENGTHS["one long"]
    tokens, token_index = packed_captions(lengths)

    # Three positions of padding are computed.
    assert sum(lengths) == 32
    assert len(token_index) == 35

    is_padding = torch.arange(20) >= torch.tensor(lengths)[:, None]
    zeros = gradients(model, tokens, token_index)
    others = gradients(model, tokens.masked_fill(is_padding, 777), token_index)

    assert_same(zeros, others, atol=1e-12)
    assert zeros["token_embedding.weight"][0].abs().max() == 0
    assert others["token_embedding.weight"][777].abs().max() == 0


def test_bfloat16_features_are_close_and_gradients_finite():
    model = tiny("vit")
    tokens, token_index = packed_captions(LENGTHS["all lengths"])
    exact = model.encode_text(tokens)

    with torch.autocast("cpu", torch.bfloat16):
        features = model.encode_text(tokens, token_index)
        unscaled = model.encode_text(tokens, token_index, normalize=False)
    assert unscaled.dtype == torch.bfloat16
    assert features.dtype == torch.float32
    assert F.cosine_similarity(features, exact).min() > 0.99

    features.sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert p.grad.isfinite().all(), name


def test_checkpointing_changes_no_gradient_of_packed_captions():
    model = tiny("vit").double()
    args = packed_captions(LENGTHS["one long"])
    plain = gradients(model, *args)

    model.set_grad_checkpointing()
    assert_same(gradients(model, *args), plain, atol=1e-12)


def test_gradients_are_those_of_openclips_text_tower():
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    model = models.create(
        "ViT-B-32",
        image_size=32,
        vision_layers=1,
        vision_width=64,
        embed_dim=32,
        text_width=48,
        text_heads=3,
        text_layers=3,
    ).double()

    vision = dict(image_size=32, patch_size=32, layers=1, width=64)
    text = dict(width=48, heads=3, layers=3)
    openclip = open_clip.model.CLIP(32, vision, text).double()
    openclip.load_state_dict(model.state_dict())
    openclip.encode_text = functools.partial(openclip.encode_text, normalize=True)

    lengths = [5, 77, 17, 2, 30]
    tokens, token_index = packed_captions(lengths, context_length=77, vocab_size=49408)
    packed = gradients(model, tokens, token_index)
    expected = gradients(openclip, tokens)

    # The largest gradients are over 1000.
    assert_same(packed, expected, atol=1e-9, rtol=1e-9)


# ---- Training ----


def gradients_of_a_training_step(model, c, batch):
    """-> {name: gradient} after one train_step from the start of a run."""
    with mock.patch.object(models, "create", return_value=model):
        trainer = training.build(
            c,
            num_samples=8,
            steps_per_epoch=10,
            total_steps=10,
            device=torch.device("cpu"),
        )
    training.train_step(trainer, batch, step=0)
    return {name: p.grad for name, p in model.named_parameters()}


def forward_padded(self, images, tokens, token_index):
    """CLIP.forward that ignores the packing."""
    return self.encode_image(images), self.encode_text(tokens)


@pytest.mark.parametrize("micro_batch", [0, 4])
def test_a_training_step_has_the_gradients_of_padded_captions(micro_batch):
    """Each micro-batch is packed by itself."""
    c = Config(
        algorithm="fastclip-v3",
        batch_size=8,
        micro_batch=micro_batch,
        precision="fp32",
        lr=0.0,
        warmup_steps=1,
    )
    torch.manual_seed(1)
    packed_model = tiny("vit").double()
    padded_model = copy.deepcopy(packed_model)
    padded_model.forward = types.MethodType(forward_padded, padded_model)

    lengths = torch.tensor([3, 20, 5, 2, 2, 9, 11, 4])
    batch = data.Batch(
        images=pictures(8, packed_model.image_size),
        tokens=captions(lengths, 20, 1000),
        lengths=lengths,
        ids=torch.arange(8),
        bad={},
        global_ids=torch.arange(8),
    )
    packed = gradients_of_a_training_step(packed_model, c, batch)
    padded = gradients_of_a_training_step(padded_model, c, batch)

    # The loss is computed in float32.
    assert_same(packed, padded, atol=1e-7)


# ---- Compilation ----


def test_no_recompiles_after_the_first_batch():
    """Other lengths, T and L, compile nothing."""
    torch._dynamo.reset()
    model = tiny("vit")
    compiled = copy.deepcopy(model)

    # inductor would compile as often, but take longer.
    compiled.compile_blocks(backend="aot_eager")

    def compare(lengths):
        args = packed_captions(lengths)
        found = gradients(compiled, *args)
        assert_same(found, gradients(model, *args), atol=1e-4, rtol=1e-3)
        compiled.encode_image(pictures(8, model.image_size)).sum().backward()

    try:
        compare([3, 9, 12, 7, 5, 6, 8, 4])

        torch._dynamo.utils.counters.clear()
        with torch._dynamo.config.patch(error_on_recompile=True):
            compare([3, 19, 5, 2, 2, 17, 16, 15])
            for seed in range(2, 12):
                generator = torch.Generator().manual_seed(seed)
                compare(torch.randint(2, 21, (8,), generator=generator).tolist())
            compare([20] * 8)
            compare([2] * 8)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    finally:
        torch._dynamo.reset()


# ---- On a GPU ----


def attend_segment_by_segment(q, k, v, starts_q, starts_k, is_causal):
    """What varlen attention computes, in plain torch.

    q: (queries, heads, w/heads) -> the same shape. k, v: (T, heads, w/heads).
    """
    outputs = []
    per_query = starts_q.diff().tolist()
    per_key = starts_k.diff().tolist()
    for segment in zip(q.split(per_query), k.split(per_key), v.split(per_key)):
        q1, k1, v1 = (x.transpose(0, 1) for x in segment)  # (heads, length, w/heads) each
        out = F.scaled_dot_product_attention(q1, k1, v1, is_causal=is_causal)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


def test_how_varlen_attention_is_called(monkeypatch):
    """Without a GPU: a stand-in attends within one segment after the other.

    Three positions of padding are kept. Neither features nor gradients depend on them.
    """
    model = tiny("vit").bfloat16()
    lengths = torch.tensor(LENGTHS["one long"])
    tokens = captions(lengths, 20, 1000)
    token_index = models.pack(lengths, 20)
    num_queries = []

    def varlen_attn(q, k, v, starts_q, starts_k, longest_q, longest_k, window_size=(-1, -1)):
        num_queries.append(len(q))
        assert k.shape == v.shape == (len(token_index), 3, 16)
        assert q.shape[1:] == k.shape[1:]
        assert starts_q.dtype == starts_k.dtype == torch.int32
        assert starts_q[-1] == len(q)
        assert starts_k[-1] == len(k)
        assert longest_q >= starts_q.diff().max()
        assert longest_k >= starts_k.diff().max()

        is_causal = window_size == (-1, 0)
        assert is_causal or window_size == (-1, -1)
        return attend_segment_by_segment(q, k, v, starts_q, starts_k, is_causal)

    monkeypatch.setattr(models, "varlen_attn", varlen_attn, raising=False)
    x = torch.randn(len(token_index), 48, dtype=torch.bfloat16)

    def features_and_gradient(varlen):
        packing = models.make_packing(tokens, token_index, varlen)
        inputs = x.clone().requires_grad_()
        features = model.transformer(inputs, packing)
        features.float().sin().sum().backward()
        return features, inputs.grad

    expected = features_and_gradient(varlen=False)
    assert not num_queries

    # The last of the two layers has one query per caption.
    found = features_and_gradient(varlen=True)
    assert num_queries == [len(token_index), len(lengths)]
    assert found[0].shape == (5, 48)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    is_padding = token_index % 20 >= lengths[token_index // 20]
    assert is_padding.sum() == 3
    assert not found[1][is_padding].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", LENGTHS)
def test_on_a_gpu_packing_changes_no_gradient_and_does_not_wait(precision, name):
    """float32 attends to padded captions, bfloat16 uses varlen attention where there is one."""
    device = torch.device("cuda")
    dtype = hardware.precision(precision, device)
    autocast = hardware.autocast(dtype, device)

    model = tiny("vit").cuda()
    lengths = torch.tensor(LENGTHS[name])
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
        packed = gradients(model, tokens, models.pack(lengths, 20, "cuda"))
    tolerance = 1e-4 if precision == "fp32" else 5e-2
    for key, expected in padded.items():
        assert packed[key].isfinite().all(), key
        assert (packed[key] - expected).norm() <= tolerance * expected.norm() + 1e-6, key
