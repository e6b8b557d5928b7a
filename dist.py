"""Many processes as one: start-up, the few collectives that the method needs, and the overlapped gradient all-reduce.

Without torchrun there is one process and every collective is the identity. No collective here is ever differentiated:
loss.py hands out feature gradients explicitly, so all that is sent in a step stands in this file to be read.
"""

import contextlib
import datetime
import os
from collections import Counter

import torch
import torch.distributed as c10d

from config import ConfigError

# Bytes that this rank has sent, by purpose ("features", "gradients", ...), counted where they are sent, for the usual ring
# algorithms: an all-gather sends (K-1) times the local part, an all-reduce 2(K-1)/K times the tensor.
traffic = Counter()
# How many collectives this rank has begun, by purpose: a rank that hangs has begun fewer than the others.
calls = Counter()


def rank():
    return c10d.get_rank() if c10d.is_initialized() else 0


def world_size():
    return c10d.get_world_size() if c10d.is_initialized() else 1


def local_world_size():
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def init(device="auto", timeout=600.0):
    """Join the process group that torchrun describes in the environment (none: stay alone) -> this rank's torch.device.

    device: "auto", "cuda" or "cpu"; NCCL carries CUDA tensors, gloo CPU tensors. timeout: see watchdog.py, seconds. Raises ConfigError if a GPU is asked for and there is none for this local rank.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device.startswith("cuda") and not gpus:
        raise ConfigError(
            "device = 'cuda', but torch sees no GPU here; use --device=cpu, or check the driver with nvidia-smi"
        )
    if gpus and local_rank >= gpus:
        raise ConfigError(
            f"local rank {local_rank} has no GPU: there are {gpus}; lower --nproc_per_node to {gpus}"
        )
    if gpus:
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.benchmark = True  # a convolution meets the same shape in every step: find its fastest algorithm once
        # cuDNN's attention, torch's first choice on an H100 or H200, has open bugs for one query and for masks that make NaN gradients
        # (github.com/NVIDIA/cudnn-frontend/issues/1072, github.com/pytorch/pytorch/issues/196678), and plans anew for each length.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if "RANK" in os.environ and not c10d.is_initialized():
        # The watchdog ends a rank after `timeout`, and says why. The backends' own time-outs come later: they say nothing.
        c10d.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo",
            timeout=datetime.timedelta(seconds=timeout + 60),
        )
    return torch.device("cuda", local_rank) if gpus else torch.device("cpu")


def barrier():
    """Wait for all ranks."""
    if world_size() > 1:
        calls["barrier"] += 1
        c10d.all_reduce(
            torch.zeros(1)
        )  # on the CPU, by gloo: needs no device and cannot be reordered by one


class NoWork:
    """The handle of a collective that there was no need to start."""

    def wait(self):
        pass


def all_gather(x, purpose):
    """[b, ...] of every rank -> [K*b, ...], in rank order. Not differentiable; b must be equal on all ranks."""
    if world_size() == 1:
        return x
    calls[purpose] += 1
    traffic[purpose] += (world_size() - 1) * x.numel() * x.element_size()
    out = x.new_empty((world_size() * x.shape[0], *x.shape[1:]))
    c10d.all_gather_into_tensor(out, x.contiguous())
    return out


def all_reduce(x, purpose):
    """Start summing x over the ranks, in place -> a handle; x holds the sum after handle.wait()."""
    if world_size() == 1:
        return NoWork()
    calls[purpose] += 1
    traffic[purpose] += 2 * (world_size() - 1) * x.numel() * x.element_size() // world_size()
    return c10d.all_reduce(x, async_op=True)


def all_gather_objects(x):
    """One picklable object of every rank -> the list of them, in rank order (evaluation, checks; not for the step)."""
    if world_size() == 1:
        return [x]
    calls["objects"] += 1
    out = [None] * world_size()
    c10d.all_gather_object(out, x)
    return out


class GradReducer:
    """Average gradients over the ranks while the backward pass is still running.

    Parameters are laid, last first (the order in which their gradients arrive), into flat buckets of about `bucket_mb`
    MB. Every `p.grad` is a view into its bucket, so nothing is copied: when the last gradient of a bucket has been
    accumulated, the bucket's all-reduce starts, and runs beside the rest of the backward pass. With `wire=torch.bfloat16`
    a bucket travels as bfloat16, half the bytes, and is added up in it.

        reducer.zero()                          # before the step
        reducer.arm()                           # before the *last* backward pass of a step (micro-batches: earlier ones only add)
        torch.autograd.backward(...)
        reducer.wait()                          # gradients are now the mean over all ranks
    """

    def __init__(self, parameters, bucket_mb=25.0, wire=torch.float32):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.wire, self.buckets, self.armed = wire, [], False
        self.finite = torch.zeros(
            (), dtype=torch.bool
        )  # after wait(): was this rank's own gradient finite? (not looked at if alone)
        if world_size() == 1:
            return  # p.grad is left to autograd
        group, size = [], 0
        for p in reversed(self.parameters):
            if group and size + p.numel() * p.element_size() > bucket_mb * 1e6:
                self.buckets.append(Bucket(group))
                group, size = [], 0
            group.append(p)
            size += p.numel() * p.element_size()
        self.buckets.append(Bucket(group))
        for bucket in self.buckets:
            for p in bucket.parameters:
                p.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self.arrived(bucket))

    def zero(self):
        for bucket in self.buckets:
            bucket.flat.zero_()
        if not self.buckets:
            for p in self.parameters:
                p.grad = None

    def arm(self):
        self.armed, self.launched = True, 0
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters)

    def arrived(self, bucket):
        if self.armed:
            bucket.missing -= 1
            # Launch strictly in order: all ranks must start the same collectives in the same sequence.
            while self.launched < len(self.buckets) and self.buckets[self.launched].missing == 0:
                self.launch(self.buckets[self.launched])

    def launch(self, bucket):
        bucket.sum = (
            bucket.flat.sum()
        )  # tells, after the sum over ranks has spread it, where a NaN came from
        bucket.flat.div_(
            world_size()
        )  # first divide, then add: a sum in bfloat16 or float16 stays in range
        bucket.sent = bucket.flat if bucket.flat.dtype == self.wire else bucket.flat.to(self.wire)
        bucket.work = all_reduce(bucket.sent, "gradients")
        self.launched += 1

    def wait(self):
        while self.launched < len(
            self.buckets
        ):  # parameters that took no part in this backward pass
            self.launch(self.buckets[self.launched])
        for bucket in self.buckets:
            bucket.work.wait()
            if bucket.sent is not bucket.flat:
                bucket.flat.copy_(bucket.sent)
            bucket.sent = bucket.work = None
        if self.buckets:
            self.finite = torch.isfinite(torch.stack([bucket.sum for bucket in self.buckets])).all()
        self.armed = False


class Bucket:
    """Some parameters, and one flat tensor of which their gradients are views (with the parameters' own strides)."""

    def __init__(self, parameters):
        self.parameters = list(parameters)
        self.flat = self.parameters[0].new_zeros(sum(p.numel() for p in self.parameters))
        offset = 0
        for p in self.parameters:
            p.grad = self.flat[offset : offset + p.numel()].as_strided(p.shape, p.stride())
            offset += p.numel()


def broadcast_weights(model):
    """Give every rank rank 0's parameters and buffers."""
    if world_size() > 1:
        for x in model.state_dict().values():
            c10d.broadcast(x, 0)


def check_same_weights(model):
    """RuntimeError naming the first parameter that is not the same on all ranks, bit for bit, and the ranks that differ."""
    named = [(name, p.detach()) for name, p in model.named_parameters()]
    # The sum of the bits as integers is exact, so it does not depend on the order in which a device adds.
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = torch.stack(
        [
            p.contiguous().view(-1).view(words[p.element_size()]).sum(dtype=torch.int64)
            for _, p in named
        ]
    )
    sums = all_gather(sums[None], "checks")  # (K, parameters)
    wrong = (sums != sums[0]).nonzero().tolist()
    if wrong:
        name = named[min(column for _, column in wrong)][0]
        raise RuntimeError(
            f"the ranks' weights have drifted apart: {name} on ranks {sorted({row for row, _ in wrong})} differs from rank 0"
        )


def batchnorm(model):
    """BatchNorm's running statistics, which each rank gathers from its own samples -> list of tensors."""
    return [
        x for name, x in model.named_buffers() if name.endswith(("running_mean", "running_var"))
    ]


@contextlib.contextmanager
def averaged_batchnorm(model):
    """Inside, every rank has the mean of all ranks' statistics, to evaluate and to save; afterwards its own again: when a run is saved
    must not change how it goes on."""
    stats = batchnorm(model)
    if not stats or world_size() == 1:
        yield
        return
    own = torch.cat([x.flatten() for x in stats])
    flat = own / world_size()
    all_reduce(flat, "batchnorm").wait()

    def put(values):
        for x, value in zip(stats, values.split([x.numel() for x in stats])):
            x.copy_(value.view_as(x))

    put(flat)
    try:
        yield
    finally:
        put(own)
