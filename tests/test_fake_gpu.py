"""The training step of a GPU, where there is none: on fake CUDA tensors, which have shapes, dtypes and a device, but no data.

They refuse whatever a GPU would refuse of those, such as an operand on the wrong device, and whatever the host would have to wait for the
GPU for. Only the backward pass cannot run so: in its place, every gradient is checked to fit its feature, and parameters get zeros.
"""

from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import config
import data
import dist
import loss
import model as models
import optim
import train
from runtime import hardware

pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11),
    reason="in old torch (seen in 2.6, not in 2.11) fake CUDA tensors need a driver to be filled",
)
BATCH, LENGTH, TOKENS = 8, 24, 8 * 12


def step_on_a_fake_gpu(name="ViT-B-32", **settings):
    """One train_step of 8 pairs -> how often varlen_attn was called."""
    device = torch.device("cuda", 0)
    numbers = dict(vision_layers=(1, 1, 1, 1)) if name == "RN50" else dict(vision_layers=2)
    c = config.load(
        [
            "--train_data=x",
            f"--model={name}",
            f"--batch_size={BATCH}",
            *(f"--{key}={value}" for key, value in settings.items()),
        ]
    )
    varlen = mock.Mock(wraps=getattr(models, "varlen_attn", None))

    def backward(features, gradients):
        features, gradients = (
            [x] if isinstance(x, torch.Tensor) else x for x in (features, gradients)
        )
        assert [(x.shape, x.dtype, x.device) for x in features] == [
            (x.shape, x.dtype, x.device) for x in gradients
        ]
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p is not model.logit_scale else None

    with FakeTensorMode(), ExitStack() as patches:
        for target, attribute, stand_in in (
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            (torch.cuda, "is_bf16_supported", lambda *_: True),
            (torch.autograd, "backward", backward),
            (models, "varlen_attn", varlen),
            (
                models,
                "pack",
                lambda lengths, longest, device: torch.zeros(
                    TOKENS * len(lengths) // BATCH, dtype=torch.int64, device=device
                ),
            ),
        ):
            patches.enter_context(mock.patch.object(target, attribute, stand_in, create=True))
        with device:  # a module on the CPU cannot be moved to a fake device
            model = models.create(name, text_layers=3, **numbers)
        optimizer, dtype = optim.create(model, c), hardware.precision(c.precision, device)
        criterion = loss.ContrastiveLoss(
            c.algorithm, 100, c.equations, c.rho, c.eps_u, c.tau_init, device, tile=c.loss_tile
        )
        batch = data.Batch(
            torch.zeros(BATCH, 3, 224, 224, dtype=torch.uint8, device=device),
            torch.zeros(BATCH, LENGTH, dtype=torch.int64, device=device),
            torch.full((BATCH,), TOKENS // BATCH),
            torch.zeros(BATCH, dtype=torch.int64, device=device),
            {},
        )
        out, grad_norm = train.train_step(
            batch,
            model,
            criterion,
            optimizer,
            dist.GradReducer([p for p in model.parameters() if p is not model.logit_scale]),
            torch.amp.GradScaler("cuda", enabled=dtype == torch.float16),
            hardware.autocast(dtype, device),
            c,
            0,
            10,
            100,
        )
        assert {x.device for x in (out.objective, grad_norm, *model.parameters())} == {device}
    return varlen.call_count


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(precision="bf16"),
        dict(precision="fp32"),
        dict(name="RN50"),
        dict(name="ViT-B-16", grad_checkpointing=True),
        dict(micro_batch=2),
        dict(grad_clip=1.0),
        dict(loss_tile=4),
        dict(equations="release"),
        *(dict(algorithm=name) for name in loss.ALGORITHMS),
        *(dict(optimizer=name) for name in ("lamb", "lion", "sgdm")),
    ],
    ids=str,
)
def test_a_step_needs_nothing_that_a_gpu_would_refuse_or_the_host_would_wait_for(settings):
    layers = 2  # of the three: the last one answers one query
    passes = 2 * BATCH // settings["micro_batch"] if "micro_batch" in settings else 1
    assert step_on_a_fake_gpu(**settings) == (
        layers * passes if models.VARLEN and settings.get("precision") != "fp32" else 0
    )


@pytest.mark.parametrize("settings", [dict(precision="fp16"), dict(skip_nonfinite=True)], ids=str)
def test_only_a_step_that_may_be_skipped_waits(settings):
    with pytest.raises(DataDependentOutputException):
        step_on_a_fake_gpu(**settings)
