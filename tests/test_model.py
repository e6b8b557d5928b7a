"""model.py against OpenCLIP: the same names, shapes, initial distributions and features; and what ours does beyond it."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from towers import TINY, TINY_TEXT, captions, perturb, pictures, tiny, tiny_batch

import model as models

open_clip = pytest.importorskip("open_clip")
NAMES = list(models.MODELS)


@functools.cache
def theirs(name):
    torch.manual_seed(1)
    return open_clip.create_model(name)


@functools.cache
def ours(name):
    torch.manual_seed(2)
    return models.create(name)


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_openclips(name):
    mine, other = ours(name).state_dict(), theirs(name).state_dict()
    assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {
        k: (v.shape, v.dtype) for k, v in other.items()
    }
    assert len(mine) == {"RN50": 489}.get(name, 302)


@pytest.mark.parametrize("name", NAMES)
def test_initial_distributions_are_openclips(name):
    other = dict(theirs(name).named_parameters())
    for key, p in ours(name).named_parameters():
        a, b = (
            x.detach().flatten()[:: p.numel() // 200_000 | 1] for x in (p, other[key])
        )  # enough of it
        n = len(a)
        if n == 1 or b.min() == b.max():
            assert torch.allclose(a, b, rtol=0, atol=1e-7), key  # constants: exactly
            continue
        assert abs(a.std() / b.std() - 1) < 6 / n**0.5, (
            key,
            a.std(),
            b.std(),
        )  # six standard errors
        assert abs(a.mean() - b.mean()) < 6 * b.std() * (2 / n) ** 0.5, (key, a.mean(), b.mean())
        if n > 5000:  # uniform has 1.8, normal 3
            kurtosis = [((x - x.mean()) / x.std()).pow(4).mean() for x in (a, b)]
            assert abs(kurtosis[0] - kurtosis[1]) < 0.5, (key, kurtosis)


def test_initial_temperature():
    assert ours("RN50").logit_scale.item() == pytest.approx(math.log(1 / 0.07), abs=1e-6)
    name, numbers = TINY["vit"]
    assert models.create(name, tau_init=0.03, **numbers).logit_scale.exp().item() == pytest.approx(
        1 / 0.03, rel=1e-6
    )


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_checkpoint_loads_in_openclip_with_equal_features(name, tmp_path):
    torch.manual_seed(3)
    mine, path = perturb(copy.deepcopy(ours(name))).eval(), tmp_path / "model.pt"
    torch.save({"state_dict": mine.state_dict()}, path)
    other = open_clip.create_model_and_transforms(name, pretrained=str(path))[0].eval()
    path.unlink()
    images, tokens = pictures(2, 224), captions([77, 9], 77, 49408)
    images = (images / 255 - mine.pixel_mean) / mine.pixel_std
    image_features, text_features = mine(images, tokens)
    torch.testing.assert_close(
        image_features, other.encode_image(images, normalize=True), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        text_features, other.encode_text(tokens, normalize=True), rtol=0, atol=1e-5
    )
    assert (
        image_features[0] - image_features[1]
    ).abs().max() > 1e-2  # the comparison has something to see
    assert (text_features[0] - text_features[1]).abs().max() > 1e-2
    mine.load_state_dict(theirs(name).state_dict(), strict=True)  # and back


@torch.no_grad()
def test_trimmed_captions_have_the_same_features():
    model = tiny("vit").double()
    tokens = captions([12, 3, 9], 20, 1000)
    padded = model.encode_text(tokens)
    torch.testing.assert_close(model.encode_text(tokens[:, :12]), padded, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.encode_text(tokens[1:2, :3]), padded[1:2], rtol=0, atol=1e-12)
    tokens[1, 3:] = 5  # whatever comes after the end
    torch.testing.assert_close(model.encode_text(tokens), padded, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", TINY)
def test_checkpointing_changes_neither_gradients_nor_running_statistics(kind):
    plain = tiny(kind).double().train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing(True)
    batch, kept = tiny_batch(plain), []
    for model in (plain, saving):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        ):
            image_features, text_features = model(*batch)
        (image_features @ text_features.T).pow(2).sum().backward()
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2  # it does save memory
    other = dict(saving.named_parameters())
    for key, p in plain.named_parameters():
        if key != "logit_scale":
            torch.testing.assert_close(other[key].grad, p.grad, rtol=1e-9, atol=1e-12, msg=key)
    other = saving.state_dict()
    for key, b in plain.state_dict().items():
        torch.testing.assert_close(other[key], b, rtol=0, atol=0, msg=key)


def test_frozen_batch_stats():
    model = tiny("batch").train()
    images, before = tiny_batch(model)[0], copy.deepcopy(model.state_dict())
    with models.frozen_batch_stats(model):
        features = model.encode_image(images)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    torch.testing.assert_close(
        model.encode_image(images), features
    )  # the batch's statistics were used
    assert model.visual.bn1.num_batches_tracked == 8 and model.visual.bn1.momentum == 0.1
    assert not torch.equal(model.visual.bn1.running_mean, before["visual.bn1.running_mean"])


@torch.no_grad()
@pytest.mark.parametrize("kind, coupled", [("group", False), ("vit", False), ("batch", True)])
def test_coupling_of_samples(kind, coupled):
    model = tiny(kind).double().train()
    images, _ = tiny_batch(model)
    others = torch.cat([images[:1], 255 - images[1:]])
    change = (model.encode_image(images)[0] - model.encode_image(others)[0]).abs().max()
    assert change > 1e-3 if coupled else change < 1e-12
    assert not coupled or models.is_resnet(model)


@torch.no_grad()
def test_bytes_are_normalised_like_openclips_floats():
    model = tiny("vit")
    images = tiny_batch(model)[0]
    mean, std = (
        torch.tensor(v).view(3, 1, 1)
        for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    torch.testing.assert_close(
        model.encode_image(images),
        model.encode_image((images / 255 - mean) / std),
        rtol=0,
        atol=1e-5,
    )
    assert not any("pixel" in key for key in model.state_dict())


@pytest.mark.parametrize("kind", TINY)
def test_dtypes(kind):
    model = tiny(kind)
    batch = tiny_batch(model)
    for dtype, features in [
        (torch.float32, model(*batch)),
        (torch.float64, copy.deepcopy(model).double()(*batch)),
    ]:
        assert all(f.dtype == dtype and f.shape == (4, 32) for f in features)
        assert all((f.norm(dim=-1) - 1).abs().max() < 1e-6 for f in features)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(*batch)
        assert model.encode_text(batch[1], normalize=False).dtype == torch.bfloat16
    for f, exact in zip(low, model(*batch)):
        assert f.dtype == torch.float32 and (f.norm(dim=-1) - 1).abs().max() < 1e-6
        assert F.cosine_similarity(f, exact).min() > 0.99
    (low[0] @ low[1].T).sum().backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32
        for k, p in model.named_parameters()
        if k != "logit_scale"
    )
    unscaled = model.encode_image(batch[0], normalize=False)
    torch.testing.assert_close(F.normalize(unscaled, dim=-1), model.encode_image(batch[0]))


@pytest.mark.parametrize("kind", ["vit", "batch"])
def test_compiled_blocks(kind):
    plain = tiny(kind).eval()
    compiled, graphs = copy.deepcopy(plain), []

    def backend(graph, inputs):
        graphs.append(any(isinstance(x, torch.SymInt) for x in inputs))  # is a size left open?
        return graph

    compiled.compile_blocks(backend=backend)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    batch = tiny_batch(plain)
    for a, b in zip(compiled(*batch), plain(*batch)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert models.forward_flops(compiled, 12) == models.forward_flops(plain, 12)
    graphs.clear()
    for images in (batch[0], batch[0][:1]):  # images are of fixed size in a training run
        compiled.encode_image(images)
    assert graphs and not any(graphs)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
@torch.no_grad()
def test_timm_towers_are_openclips(name):
    from open_clip.timm_model import TimmModel

    model = models.create("timm:" + name, image_size=64, **TINY_TEXT).eval()
    other = TimmModel(name, embed_dim=32, image_size=64, pool="", proj="linear").eval()
    other.set_input_size(64)
    assert all(
        key.startswith(("visual.trunk.", "visual.head.proj.weight"))
        for key in model.state_dict()
        if "visual" in key
    )
    other.load_state_dict(model.visual.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(
        model.encode_image(images, normalize=False), other(images), rtol=1e-5, atol=1e-6
    )
    assert models.forward_flops(model, 5)["image"] > 0 and not models.is_resnet(model)
    model.set_grad_checkpointing()


def test_timm_defaults():
    with torch.device("meta"):
        model = models.create("timm:resnet10t")
    text = models.num_parameters(ours("ViT-B-32"))["text"]
    assert (
        model.image_size == 176
        and model.embed_dim == 512
        and models.num_parameters(model)["text"] == text
    )


def test_costs():
    name, n = TINY["vit"]
    model, w, patches, L = tiny("vit"), 128, 9, 5
    block = lambda tokens, w: (
        2 * tokens * 12 * w * w + 4 * tokens * tokens * w
    )  # projections and MLP, attention
    last = lambda tokens, w: (
        2 * (2 * tokens + 10) * w * w + 4 * tokens * w
    )  # keys and values of all, the rest of one
    assert models.forward_flops(model, L) == dict(
        image=2 * patches * 3 * 16**2 * w
        + block(patches + 1, w)
        + last(patches + 1, w)
        + 2 * w * 32,
        text=block(L, 48) + last(L, 48) + 2 * 48 * 32,
    )
    count = models.num_parameters(ours("ViT-B-32"))
    assert count == dict(image=87849216, text=63428096, total=151277313)
    with torch.device("meta"):
        large = models.create("ViT-B-32")
    assert sum(models.forward_flops(large, 77).values()) / 1e9 == pytest.approx(
        13.77, abs=0.05
    )  # 14.8 with whole last blocks


@pytest.mark.parametrize(
    "name, overrides, words",
    [
        ("ViT-B32", {}, ["ViT-B-32", "RN50", "timm:NAME"]),
        ("timm:resnet10x", {}, ["resnet10t"]),
        ("ViT-B-32", dict(vision_widht=64), ["'vision_width'", "patch_size"]),
        ("ViT-B-32", dict(vision_norm="group"), ["vision_norm"]),
        ("RN50", dict(vision_norm="layer"), ["'batch' or 'group'"]),
        ("RN50", dict(vision_layers=3), ["vision_layers = 3", "four"]),
        ("RN50", dict(vision_layers=(3, 4)), ["vision_layers = (3, 4)"]),
        ("ViT-B-32", dict(vision_layers=(1, 1, 1, 1)), ["vision_layers"]),
        ("ViT-B-32", dict(text_layers=0), ["text_layers = 0", "positive"]),
        ("ViT-B-32", dict(image_size=100), ["100 = 32 * 3 + 4"]),
        ("RN50", dict(image_size=100), ["100 = 32 * 3 + 4"]),
        ("RN50", dict(vision_width=25), ["25 = 2 * 12 + 1"]),
        ("ViT-B-32", dict(text_width=100), ["100 = 8 * 12 + 4"]),
        ("ViT-B-32", dict(vision_width=200), ["200 = 3 * 66 + 2"]),
        ("ViT-B-32", dict(tau_init=0.0), []),
    ],
)
def test_errors_of_create(name, overrides, words):
    with pytest.raises(ValueError) as error, torch.device("meta"):
        models.create(name, **overrides)
    assert all(word in str(error.value) for word in words), error.value


def test_errors_of_inputs():
    model = tiny("vit")
    with pytest.raises(ValueError, match="48, 48"):
        model.encode_image(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="21 tokens.*20"):
        model.encode_text(torch.zeros(1, 21, dtype=torch.long))
