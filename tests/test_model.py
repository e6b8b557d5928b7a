"""model.py beside OpenCLIP: the same names, shapes, initial values, features; and what is ours."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F

import model as models
from towers import TINY, TINY_TEXT, captions, perturb, pictures, tiny, tiny_batch

open_clip = pytest.importorskip("open_clip")
pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = list(models.MODELS)


@functools.cache
def openclip_model(name):
    torch.manual_seed(1)
    return open_clip.create_model(name)


@functools.cache
def our_model(name):
    torch.manual_seed(2)
    return models.create(name)


def shapes_and_dtypes(model):
    return {key: (value.shape, value.dtype) for key, value in model.state_dict().items()}


# ---- The same as OpenCLIP ----


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_openclips(name):
    found = shapes_and_dtypes(our_model(name))
    assert found == shapes_and_dtypes(openclip_model(name))
    assert len(found) == (489 if name == "RN50" else 302)


def kurtosis(x):
    """1.8 for a uniform distribution, 3 for a normal one."""
    return ((x - x.mean()) / x.std()).pow(4).mean()


@pytest.mark.parametrize("name", NAMES)
def test_initial_distributions_are_openclips(name):
    """Constants are equal; other parameters have the same mean, standard deviation and kurtosis."""
    openclip_parameters = dict(openclip_model(name).named_parameters())
    for key, p in our_model(name).named_parameters():
        # About 200 000 elements are enough to compare. The stride is odd.
        stride = p.numel() // 200_000 | 1
        a = p.detach().flatten()[::stride]
        b = openclip_parameters[key].detach().flatten()[::stride]
        n = len(a)

        if n == 1 or b.min() == b.max():
            assert torch.allclose(a, b, rtol=0, atol=1e-7), key
            continue

        # Differences of up to six standard errors.
        assert abs(a.std() / b.std() - 1) < 6 / n**0.5, (key, a.std(), b.std())
        assert abs(a.mean() - b.mean()) < 6 * b.std() * (2 / n) ** 0.5, (key, a.mean(), b.mean())
        if n > 5000:
            assert abs(kurtosis(a) - kurtosis(b)) < 0.5, (key, kurtosis(a), kurtosis(b))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_checkpoint_loads_in_openclip_with_equal_features(name, tmp_path):
    torch.manual_seed(3)
    model = perturb(copy.deepcopy(our_model(name))).eval()
    path = tmp_path / "model.pt"
    torch.save({"state_dict": model.state_dict()}, path)
    openclip, *_ = open_clip.create_model_and_transforms(name, pretrained=str(path))
    openclip.eval()
    path.unlink()

    images = pictures(2, 224)
    images = (images / 255 - model.pixel_mean) / model.pixel_std
    tokens = captions([77, 9], 77, 49408)
    image_features, text_features = model(images, tokens)

    expected = openclip.encode_image(images, normalize=True)
    torch.testing.assert_close(image_features, expected, rtol=0, atol=1e-5)
    expected = openclip.encode_text(tokens, normalize=True)
    torch.testing.assert_close(text_features, expected, rtol=0, atol=1e-5)

    # The two samples differ, so equal features say something.
    assert (image_features[0] - image_features[1]).abs().max() > 1e-2
    assert (text_features[0] - text_features[1]).abs().max() > 1e-2

    # The other direction: our model loads OpenCLIP's weights.
    model.load_state_dict(openclip_model(name).state_dict(), strict=True)


@torch.no_grad()
def test_bytes_are_normalised_like_openclips_floats():
    model = tiny("vit")
    images, _ = tiny_batch(model)

    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)
    expected = model.encode_image((images / 255 - mean) / std)

    torch.testing.assert_close(model.encode_image(images), expected, rtol=0, atol=1e-5)
    assert not any("pixel" in key for key in model.state_dict())


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
@torch.no_grad()
def test_timm_towers_are_openclips(name):
    from open_clip.timm_model import TimmModel

    model = models.create("timm:" + name, image_size=64, **TINY_TEXT).eval()
    openclip = TimmModel(name, embed_dim=32, image_size=64, pool="", proj="linear").eval()
    openclip.set_input_size(64)

    visual_keys = [key for key in model.state_dict() if "visual" in key]
    prefixes = ("visual.trunk.", "visual.head.proj.weight")
    assert all(key.startswith(prefixes) for key in visual_keys)

    openclip.load_state_dict(model.visual.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    features = model.encode_image(images, normalize=False)
    torch.testing.assert_close(features, openclip(images), rtol=1e-5, atol=1e-6)

    assert models.forward_flops(model, 5)["image"] > 0
    assert not models.is_resnet(model)
    model.set_grad_checkpointing()


def test_timm_tower_has_the_image_size_of_timm_and_the_text_tower_of_vit_b_32():
    with torch.device("meta"):
        model = models.create("timm:resnet10t")
    assert model.image_size == 176
    assert model.embed_dim == 512

    expected = models.num_parameters(our_model("ViT-B-32"))["text"]
    assert models.num_parameters(model)["text"] == expected


# ---- Features ----


def test_initial_temperature():
    logit_scale = our_model("RN50").logit_scale
    assert logit_scale.item() == pytest.approx(math.log(1 / 0.07), abs=1e-6)

    name, numbers = TINY["vit"]
    logit_scale = models.create(name, tau_init=0.03, **numbers).logit_scale
    assert logit_scale.exp().item() == pytest.approx(1 / 0.03, rel=1e-6)


@torch.no_grad()
def test_trimmed_captions_have_the_same_features():
    model = tiny("vit").double()
    tokens = captions([12, 3, 9], 20, 1000)
    padded = model.encode_text(tokens)

    trimmed = model.encode_text(tokens[:, :12])
    torch.testing.assert_close(trimmed, padded, rtol=0, atol=1e-12)
    trimmed = model.encode_text(tokens[1:2, :3])
    torch.testing.assert_close(trimmed, padded[1:2], rtol=0, atol=1e-12)

    # What comes after the end does not matter.
    tokens[1, 3:] = 5
    torch.testing.assert_close(model.encode_text(tokens), padded, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("kind, coupled", [("group", False), ("vit", False), ("batch", True)])
def test_only_batch_norm_lets_a_sample_depend_on_others(kind, coupled):
    model = tiny(kind).double().train()
    images, _ = tiny_batch(model)
    other_images = torch.cat([images[:1], 255 - images[1:]])

    features = model.encode_image(images)
    other_features = model.encode_image(other_images)
    change = (features[0] - other_features[0]).abs().max()

    if coupled:
        assert change > 1e-3
        assert models.is_resnet(model)
    else:
        assert change < 1e-12


def assert_unit_length(features):
    assert (features.norm(dim=-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("kind", TINY)
def test_features_have_the_models_dtype_and_length_one(kind):
    model = tiny(kind)
    batch = tiny_batch(model)
    double = copy.deepcopy(model).double()

    for features in model(*batch):
        assert features.dtype == torch.float32
        assert features.shape == (4, 32)
        assert_unit_length(features)

    for features in double(*batch):
        assert features.dtype == torch.float64
        assert features.shape == (4, 32)
        assert_unit_length(features)

    images, _ = batch
    unscaled = model.encode_image(images, normalize=False)
    torch.testing.assert_close(F.normalize(unscaled, dim=-1), model.encode_image(images))


@pytest.mark.parametrize("kind", TINY)
def test_under_autocast_features_and_gradients_are_float32(kind):
    model = tiny(kind)
    images, tokens = tiny_batch(model)

    with torch.autocast("cpu", torch.bfloat16):
        image_features, text_features = model(images, tokens)
        assert model.encode_text(tokens, normalize=False).dtype == torch.bfloat16

    exact_features = model(images, tokens)
    for features, exact in zip((image_features, text_features), exact_features):
        assert features.dtype == torch.float32
        assert_unit_length(features)
        assert F.cosine_similarity(features, exact).min() > 0.99

    (image_features @ text_features.T).sum().backward()
    for key, p in model.named_parameters():
        if key != "logit_scale":
            assert p.grad is not None, key
            assert p.grad.dtype == torch.float32, key


# ---- Gradient checkpointing and compilation ----


def forward_counting_saved_numbers(model, batch):
    """-> (features of images, features of texts, how many numbers autograd saved for backward)."""
    sizes = []

    def save(tensor):
        sizes.append(tensor.numel())
        return tensor

    def load(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, load):
        image_features, text_features = model(*batch)
    return image_features, text_features, sum(sizes)


@pytest.mark.parametrize("kind", TINY)
def test_checkpointing_changes_neither_gradients_nor_running_statistics(kind):
    plain = tiny(kind).double().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing(True)

    batch = tiny_batch(plain)
    saved = []
    for model in (plain, checkpointed):
        image_features, text_features, count = forward_counting_saved_numbers(model, batch)
        (image_features @ text_features.T).pow(2).sum().backward()
        saved.append(count)

    # It does save memory.
    assert saved[1] < saved[0] / 2

    parameters = dict(checkpointed.named_parameters())
    for key, p in plain.named_parameters():
        if key != "logit_scale":
            grad = parameters[key].grad
            torch.testing.assert_close(grad, p.grad, rtol=1e-9, atol=1e-12, msg=key)

    state = checkpointed.state_dict()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=0, msg=key)


def test_frozen_batch_stats_leave_running_statistics_alone():
    model = tiny("batch").train()
    images, _ = tiny_batch(model)
    before = copy.deepcopy(model.state_dict())

    with models.frozen_batch_stats(model):
        features = model.encode_image(images)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key

    # Inside as outside, features are normalised by the batch's statistics.
    torch.testing.assert_close(model.encode_image(images), features)

    # Outside, statistics are counted again.
    assert model.visual.bn1.num_batches_tracked == 8
    assert model.visual.bn1.momentum == 0.1
    assert not torch.equal(model.visual.bn1.running_mean, before["visual.bn1.running_mean"])


@pytest.mark.parametrize(
    "kind, graphs",
    [
        ("vit", 3),  # pixels, patch embedding, a run of two blocks
        ("batch", 7),  # pixels, stem, four stages, attention pooling
    ],
)
def test_compiled_parts_compute_the_same_with_image_sizes_fixed(kind, graphs):
    plain = tiny(kind).eval()
    compiled = copy.deepcopy(plain)

    # For each graph compiled: whether any size in it is left open.
    has_open_size = []

    def backend(graph, inputs):
        has_open_size.append(any(isinstance(x, torch.SymInt) for x in inputs))
        return graph

    compiled.compile_blocks(backend=backend)
    assert list(compiled.state_dict()) == list(plain.state_dict())

    images, tokens = tiny_batch(plain)
    for features, expected in zip(compiled(images, tokens), plain(images, tokens)):
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    assert models.forward_flops(compiled, 12) == models.forward_flops(plain, 12)

    # Images of another batch size are compiled anew.
    has_open_size.clear()
    compiled.encode_image(images)
    compiled.encode_image(images[:1])
    one_more = torch.__version__ < "2.7" and kind == "batch"  # torch 2.6 makes one twice
    assert len(has_open_size) == graphs + one_more
    assert not any(has_open_size)


# ---- What a model costs ----


def test_forward_flops_of_a_tiny_vit_are_those_counted_by_hand():
    model = tiny("vit")

    def block(tokens, width):
        """Projections and MLP of all tokens, attention between all pairs of them."""
        return 2 * tokens * 12 * width**2 + 4 * tokens**2 * width

    def last_block(tokens, width):
        """Keys and values of all tokens; the query, its attention and the rest of one token."""
        return 2 * (2 * tokens + 10) * width**2 + 4 * tokens * width

    patches = 9
    patch_embedding = 2 * patches * 3 * 16**2 * 128
    image_blocks = block(patches + 1, 128) + last_block(patches + 1, 128)
    image_projection = 2 * 128 * 32
    text_blocks = block(5, 48) + last_block(5, 48)
    text_projection = 2 * 48 * 32

    assert models.forward_flops(model, text_len=5) == dict(
        image=patch_embedding + image_blocks + image_projection,
        text=text_blocks + text_projection,
    )


def test_parameters_and_flops_of_vit_b_32():
    count = models.num_parameters(our_model("ViT-B-32"))
    assert count == dict(image=87849216, text=63428096, total=151277313)

    with torch.device("meta"):
        model = models.create("ViT-B-32")
    flops = models.forward_flops(model, 77)

    # It would be 14.8 GFLOPs if the last blocks computed all tokens.
    assert (flops["image"] + flops["text"]) / 1e9 == pytest.approx(13.77, abs=0.05)


# ---- Refusals ----


@pytest.mark.parametrize(
    "name, overrides, words",
    [
        # Names.
        ("ViT-B32", {}, ["ViT-B-32", "RN50", "timm:NAME"]),
        ("timm:resnet10x", {}, ["resnet10t"]),
        ("ViT-B-32", dict(vision_widht=64), ["'vision_width'", "patch_size"]),
        ("ViT-B-32", dict(vision_norm="group"), ["vision_norm"]),
        # Values.
        ("RN50", dict(vision_norm="layer"), ["'batch' or 'group'"]),
        ("RN50", dict(vision_layers=3), ["vision_layers = 3", "four"]),
        ("RN50", dict(vision_layers=(3, 4)), ["vision_layers = (3, 4)"]),
        ("RN50", dict(vision_layers=(3, 4, 6, 0)), ["vision_layers = (3, 4, 6, 0)", "positive"]),
        ("ViT-B-32", dict(vision_layers=(1, 1, 1, 1)), ["vision_layers"]),
        ("ViT-B-32", dict(text_layers=0), ["text_layers = 0", "positive"]),
        ("ViT-B-32", dict(text_layers=True), ["text_layers = True", "positive"]),
        ("ViT-B-32", dict(tau_init=0.0), []),
        # Numbers that do not fit one another.
        ("ViT-B-32", dict(image_size=100), ["100 = 32 * 3 + 4"]),
        ("RN50", dict(image_size=100), ["100 = 32 * 3 + 4"]),
        ("RN50", dict(vision_width=25), ["25 = 2 * 12 + 1"]),
        ("ViT-B-32", dict(text_width=100), ["100 = 8 * 12 + 4"]),
        ("ViT-B-32", dict(vision_width=200), ["200 = 3 * 66 + 2"]),
    ],
)
def test_create_refuses_what_does_not_fit(name, overrides, words):
    with pytest.raises(ValueError) as error, torch.device("meta"):
        models.create(name, **overrides)
    for word in words:
        assert word in str(error.value)


def test_encoding_refuses_images_of_another_size_and_captions_that_are_too_long():
    model = tiny("vit")
    with pytest.raises(ValueError, match="48, 48"):
        model.encode_image(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="21 tokens.*20"):
        model.encode_text(torch.zeros(1, 21, dtype=torch.long))
