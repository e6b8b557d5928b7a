"""The training step on a GPU, tested without one: on fake CUDA tensors.

Fake tensors have a shape, a dtype and a device, but no data. They raise an error where a GPU would
refuse these, such as for an operand on the wrong device, and where the host would have to wait for
the GPU. Only the backward pass cannot run on them: in its place, each gradient is checked to fit
its feature, and parameters get gradients of zero.
"""

import contextlib
import functools
import types
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import config
import data
import loss
import model as models
import train
from bench import made_data
from helpers import words_of
from runtime import log

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
pytestmark = pytest.mark.skipif(
    TORCH < (2, 11),
    reason="in old torch (seen in 2.6, not in 2.11) fake CUDA tensors need a driver to be filled",
)

DEVICE = torch.device("cuda", 0)
BATCH = 8
LENGTH = 24  # tokens of a padded caption
CAPTION = 12  # tokens of each caption


plain_create = models.create


def fake_pack(lengths, longest, device):
    """token_index of the right length. The true one is computed from data, on the host."""
    return torch.zeros(CAPTION * len(lengths), dtype=torch.int64, device=device)


def create_on_the_gpu(*args, **kwargs):
    """model.create on the device, since a module cannot be moved to a fake one."""
    with DEVICE:
        return plain_create(*args, **kwargs)


def stay(module, *args, **kwargs):
    """In place of Module.to."""
    return module


def fake_backward(model, features, gradients):
    """Check that each gradient fits its feature; give parameters gradients of zero."""
    if isinstance(features, torch.Tensor):
        features = [features]
        gradients = [gradients]

    assert len(features) == len(gradients)
    for feature, gradient in zip(features, gradients):
        assert feature.shape == gradient.shape
        assert feature.dtype == gradient.dtype
        assert feature.device == gradient.device

    for p in model.parameters():
        p.grad = None if p is model.logit_scale else torch.zeros_like(p)


@contextlib.contextmanager
def fake_gpu():
    """Inside, tensors are fake and torch finds an H100. Yields varlen_attn, counting its calls."""
    varlen_attn = mock.Mock(wraps=getattr(models, "varlen_attn", None))
    stand_ins = [
        (torch.cuda.amp.common, "amp_definitely_not_available", mock.Mock(return_value=False)),
        (torch.cuda, "get_device_capability", mock.Mock(return_value=(9, 0))),
        (torch.cuda, "is_bf16_supported", mock.Mock(return_value=True)),
        (models, "varlen_attn", varlen_attn),
        (models, "pack", fake_pack),
        (loss.SampleState, "check_ids", mock.Mock()),  # of the host's data, which are fake, too
        (torch.Tensor, "pin_memory", stay),
        (models, "create", create_on_the_gpu),
        (models.CLIP, "to", stay),
    ]
    with FakeTensorMode(), contextlib.ExitStack() as patches:
        for module, name, stand_in in stand_ins:
            patches.enter_context(mock.patch.object(module, name, stand_in, create=True))
        yield varlen_attn


def fake_batch():
    return data.Batch(
        images=torch.zeros(BATCH, 3, 224, 224, dtype=torch.uint8, device=DEVICE),
        tokens=torch.zeros(BATCH, LENGTH, dtype=torch.int64, device=DEVICE),
        lengths=torch.full((BATCH,), CAPTION),
        ids=torch.zeros(BATCH, dtype=torch.int64, device=DEVICE),
        bad={},
        global_ids=torch.zeros(BATCH, dtype=torch.int64),
    )


def step_on_a_fake_gpu(model="ViT-B-32", **settings):
    """One train_step -> how often varlen_attn was called."""
    words = words_of(
        train_data="x",
        model=model,
        text_layers=3,
        vision_layers=(1, 1, 1, 1) if model == "RN50" else 2,
        batch_size=BATCH,
        compile=False,
        **settings,
    )
    c = config.load(words)

    with fake_gpu() as varlen_attn:
        trainer = train.build(
            c,
            num_samples=100,
            steps_per_epoch=10,
            total_steps=100,
            device=DEVICE,
        )
        backward = functools.partial(fake_backward, trainer.model)
        with mock.patch.object(torch.autograd, "backward", backward):
            out, grad_norm = train.train_step(trainer, fake_batch(), step=0)

        assert out.objective.device == DEVICE
        assert grad_norm.device == DEVICE
        for p in trainer.model.parameters():
            assert p.device == DEVICE
    return varlen_attn.call_count


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(precision="bf16"),
        dict(precision="fp32"),
        dict(model="RN50"),
        dict(model="ViT-B-16", grad_checkpointing=True),
        dict(micro_batch=2),
        dict(grad_clip=1.0),
        dict(loss_tile=4),
        dict(equations="release"),
        *(dict(algorithm=name) for name in loss.ALGORITHMS),
        *(dict(optimizer=name) for name in ("lamb", "lion", "sgdm")),
    ],
    ids=str,
)
def test_a_step_does_nothing_that_a_gpu_would_refuse_or_the_host_would_wait_for(settings):
    calls = step_on_a_fake_gpu(**settings)
    if not models.VARLEN or settings.get("precision") == "fp32":
        assert calls == 0
        return

    # With micro-batches, each is computed twice: without gradients, then with them.
    micro_batch = settings.get("micro_batch")
    passes = 2 * BATCH // micro_batch if micro_batch else 1

    # In each of the three text layers; in the last one with one query per caption.
    assert calls == 3 * passes


def test_a_report_does_not_wait_for_the_gpu(tmp_path, monkeypatch):
    """Of steps 1 and 2, which are not read before step 4."""
    monkeypatch.setattr(log, "peak_flops", lambda dtype, device: 1.0)
    monkeypatch.setattr(torch.cuda, "Event", mock.Mock())
    with FakeTensorMode():
        number = torch.zeros((), device=DEVICE)

    trainer = types.SimpleNamespace(
        config=config.load(words_of(train_data="x", out_dir=tmp_path, log_steps=2)),
        device=DEVICE,
        dtype=torch.bfloat16,
        model=torch.nn.Linear(1, 1),
        optimizer=types.SimpleNamespace(param_groups=[dict(name="decay", lr=1e-3)]),
        reducer=types.SimpleNamespace(finite=number),
        steps_per_epoch=10,
        total_steps=100,
        flops=lambda: dict(image=1.0, token=1.0),
    )
    batch = data.Batch(None, None, torch.ones(BATCH), torch.arange(BATCH), {})
    out = loss.LossOutput(*[number] * len(loss.LossOutput._fields))._replace(gamma=0.9)

    run_log = log.Log(trainer, num_samples=100, step=0)
    for step in (1, 2, 3):
        run_log.step(step, batch, out, number)
    assert len(run_log.reports) == 1
    with pytest.raises(DataDependentOutputException):
        run_log.step(4, batch, out, number)


@pytest.mark.parametrize("precision, expected", [("bf16", "high"), ("fp32", "highest")])
def test_the_loss_multiplies_in_tf32_where_the_towers_are_not_float32(precision, expected):
    found = []
    plain_block = loss.Similarities.block

    def block(self, columns):
        found.append(torch.get_float32_matmul_precision())
        return plain_block(self, columns)

    with mock.patch.object(loss.Similarities, "block", block):
        step_on_a_fake_gpu(precision=precision)
    assert set(found) == {expected}
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_bench_puts_batches_on_the_gpu():
    batches = made_data.make_batches(32, 16, BATCH, count=1)
    theirs = [(batches[0].images.float(), batches[0].tokens)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        (ours,) = made_data.on_device(batches, DEVICE)
        ((images, tokens),) = made_data.on_device(theirs, DEVICE)

    assert ours.images.device == ours.tokens.device == images.device == tokens.device == DEVICE
    assert ours.images.is_contiguous(memory_format=torch.channels_last)
    # What the host works with stays there.
    assert ours.lengths.device == ours.ids.device == torch.device("cpu")


@pytest.mark.parametrize("settings", [dict(precision="fp16"), dict(skip_nonfinite=True)], ids=str)
def test_only_a_step_that_may_be_skipped_waits(settings):
    with pytest.raises(DataDependentOutputException):
        step_on_a_fake_gpu(**settings)
