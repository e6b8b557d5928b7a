"""All that is sent between ranks: process group, gathers, and the overlapped gradient all-reduce.

A rank is one process of a distributed run, started by torchrun. K is the number of ranks, b the
samples of one rank, B = K b those of the global batch. Without torchrun there is one process, and
every collective is the identity.

No collective in this file is differentiated: loss.py computes the gradients of the features
explicitly. So this file contains everything that is sent in a training step.
"""

import contextlib
import datetime
import os
from collections import Counter
from functools import partial

import torch
import torch.distributed as c10d

from config import ConfigError

# Bytes that this rank has sent, by purpose ("features", "gradients", ...), counted for the usual
# ring algorithms: an all-gather sends K-1 times the local part, an all-reduce 2(K-1)/K times the
# tensor.
traffic = Counter()

# Number of collectives that this rank has begun, by purpose. A rank that hangs has begun fewer
# than the others: see runtime/watchdog.py.
calls = Counter()


# ---- process group ----


def rank():
    return c10d.get_rank() if c10d.is_initialized() else 0


def world_size():
    return c10d.get_world_size() if c10d.is_initialized() else 1


def local_world_size():
    """Number of ranks on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def init(device="auto", timeout=600.0):
    """Join the process group that torchrun describes -> this rank's torch.device.

    Without torchrun the process stays alone. NCCL carries CUDA tensors, gloo CPU tensors.

    device: "auto", "cuda" or "cpu".
    timeout: seconds without progress after which the watchdog ends a rank (runtime/watchdog.py).
    Raises ConfigError if a GPU is asked for and there is none for this local rank.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    check_gpu(device, local_rank, gpus)
    if gpus:
        set_up_gpu(local_rank)

    if "RANK" in os.environ and not c10d.is_initialized():
        # The watchdog ends a rank after `timeout` and says why. The time-out of the backends gives
        # no reason, so it is set to come later.
        c10d.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo",
            timeout=datetime.timedelta(seconds=timeout + 60),
        )
    return torch.device("cuda", local_rank) if gpus else torch.device("cpu")


def check_gpu(device, local_rank, gpus):
    """ConfigError if this local rank cannot have the GPU that it asks for. gpus: their number."""
    if device.startswith("cuda") and not gpus:
        raise ConfigError(
            "device = 'cuda', but torch sees no GPU here; use --device=cpu, or check the driver "
            "with nvidia-smi"
        )
    if gpus and local_rank >= gpus:
        raise ConfigError(
            f"local rank {local_rank} has no GPU: there are {gpus}; "
            f"lower --nproc_per_node to {gpus}"
        )


def set_up_gpu(local_rank):
    """Select this rank's GPU and its fastest safe kernels."""
    torch.cuda.set_device(local_rank)

    # A convolution has the same shape in every step, so the search for its fastest algorithm pays.
    torch.backends.cudnn.benchmark = True

    # cuDNN's attention, torch's first choice on an H100 or H200, has open bugs for a single query
    # and for masks that make NaN gradients (github.com/NVIDIA/cudnn-frontend/issues/1072,
    # github.com/pytorch/pytorch/issues/196678), and it plans anew for each sequence length.
    torch.backends.cuda.enable_cudnn_sdp(False)


# ---- collectives ----


class NoWork:
    """The handle of a collective that did not have to be started."""

    def wait(self):
        pass


def barrier():
    """Wait for all ranks."""
    if world_size() == 1:
        return
    calls["barrier"] += 1
    # A sum on the CPU by gloo: it needs no GPU, and a GPU cannot reorder it.
    c10d.all_reduce(torch.zeros(1))


def all_gather(x, purpose):
    """x (b, ...) of every rank -> (K b, ...), in rank order. b must be equal on all ranks."""
    if world_size() == 1:
        return x
    calls[purpose] += 1
    traffic[purpose] += (world_size() - 1) * num_bytes(x)

    out = x.new_empty((world_size() * x.shape[0], *x.shape[1:]))
    c10d.all_gather_into_tensor(out, x.contiguous())
    return out


def all_reduce(x, purpose):
    """Start to sum x over the ranks, in place -> a handle. x is the sum after handle.wait()."""
    if world_size() == 1:
        return NoWork()
    calls[purpose] += 1
    traffic[purpose] += 2 * (world_size() - 1) * num_bytes(x) // world_size()

    return c10d.all_reduce(x, async_op=True)


def all_gather_objects(x, group=None):
    """One picklable object of every rank -> list of them, in rank order.

    For evaluation and checks, not for the training step. group: of background_group(), if this is
    called in a thread; None: the process group of the main thread.
    """
    if world_size() == 1:
        return [x]
    if group is None:
        calls["objects"] += 1

    out = [None] * world_size()
    c10d.all_gather_object(out, x, group)
    return out


def background_group():
    """All ranks call this -> a second process group, for one thread beside the training.

    Collectives of a group must begin in the same order on all ranks. So a thread that works at its
    own pace needs a group of its own. Its collectives wait for each other for up to a day: ranks
    may write to a slow disk for long, and one that has died is reported by the watchdog.
    """
    if world_size() == 1:
        return None
    return c10d.new_group(backend="gloo", timeout=datetime.timedelta(days=1))


def num_bytes(x):
    return x.numel() * x.element_size()


# ---- gradients ----


class GradReducer:
    """Average gradients over the ranks while the backward pass is still running.

    Layout: the parameters are packed into flat buckets of about `bucket_mb` MB, the last
    parameter first, because this is the order in which the backward pass computes their
    gradients. Every p.grad is a view of its bucket, so nothing has to be copied.

    Launch: when the last gradient of a bucket has been accumulated, the bucket's all-reduce
    starts, and runs beside the rest of the backward pass. With wire=torch.bfloat16 a bucket is
    sent and summed in bfloat16, half the bytes.

        reducer.zero()                 # before the step
        reducer.arm()                  # before the last backward pass of the step; the earlier ones
                                       # (of micro-batches) only accumulate
        torch.autograd.backward(...)
        reducer.wait()                 # now every gradient is the mean over all ranks

    After wait(), `finite` (a 0-dim bool tensor) says whether this rank's own gradients were
    finite. On a single rank it is not computed, and p.grad is left to autograd.
    """

    def __init__(self, parameters, bucket_mb=25.0, wire=torch.float32):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.wire = wire
        self.finite = torch.zeros((), dtype=torch.bool)
        self.buckets = []
        self.armed = False
        self.launched = 0  # buckets whose all-reduce has started, always the first ones

        if world_size() > 1:
            self.buckets = make_buckets(self.parameters, bucket_mb * 1e6)
            self.add_hooks()

    def add_hooks(self):
        """Ask autograd for a call after it has accumulated a parameter's gradient."""
        for bucket in self.buckets:
            for p in bucket.parameters:
                p.register_post_accumulate_grad_hook(partial(self.gradient_is_ready, bucket))

    def zero(self):
        """Start a step without gradients."""
        if self.buckets:
            for bucket in self.buckets:
                bucket.flat.zero_()
        else:
            for p in self.parameters:
                p.grad = None

    def arm(self):
        """From now on a bucket is launched when its last gradient arrives."""
        self.armed = True
        self.launched = 0
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters)

    def gradient_is_ready(self, bucket, parameter):
        """The hook: launch what is complete, in the order of the buckets.

        All ranks must start the same collectives in the same order. So a bucket that is complete
        before the one in front of it waits.
        """
        if not self.armed:
            return
        bucket.missing -= 1
        while self.launched < len(self.buckets) and self.buckets[self.launched].missing == 0:
            self.launch_next()

    def launch_next(self):
        bucket = self.buckets[self.launched]
        self.launched += 1

        # The all-reduce spreads a NaN to all ranks. This rank's own sum tells where it came from.
        bucket.own_sum = bucket.flat.sum()

        # Divide before the addition, so that a sum in bfloat16 or float16 stays in range.
        bucket.flat.div_(world_size())

        # This is bucket.flat itself where the dtypes agree.
        bucket.sent = bucket.flat.to(self.wire)
        bucket.work = all_reduce(bucket.sent, "gradients")

    def wait(self):
        """Finish: every p.grad is the mean over all ranks."""
        # A bucket is still incomplete if some parameter took no part in the backward pass.
        while self.launched < len(self.buckets):
            self.launch_next()

        for bucket in self.buckets:
            bucket.work.wait()
            if bucket.sent is not bucket.flat:
                bucket.flat.copy_(bucket.sent)
            bucket.sent = None
            bucket.work = None

        if self.buckets:
            own_sums = torch.stack([bucket.own_sum for bucket in self.buckets])  # (buckets,)
            self.finite = torch.isfinite(own_sums).all()
        self.armed = False


class Bucket:
    """Some parameters, and one flat tensor that holds their gradients.

    Each p.grad is a view of it with the strides of p, which need not be the default ones
    (channels_last).
    """

    def __init__(self, parameters):
        self.parameters = list(parameters)
        self.flat = self.parameters[0].new_zeros(sum(p.numel() for p in self.parameters))

        offset = 0
        for p in self.parameters:
            view = self.flat[offset : offset + p.numel()]
            p.grad = view.as_strided(p.shape, p.stride())
            offset += p.numel()


def make_buckets(parameters, max_bytes):
    """Divide parameters, the last first, into Buckets of at most `max_bytes`.

    A parameter that is larger than that has a bucket of its own.
    """
    buckets = []
    group = []
    size = 0

    for p in reversed(parameters):
        if group and size + num_bytes(p) > max_bytes:
            buckets.append(Bucket(group))
            group = []
            size = 0
        group.append(p)
        size += num_bytes(p)

    buckets.append(Bucket(group))
    return buckets


# ---- weights ----


def broadcast_weights(model):
    """Give every rank the parameters and buffers of rank 0."""
    if world_size() > 1:
        for x in model.state_dict().values():
            c10d.broadcast(x, 0)


def check_same_weights(model):
    """Check that all parameters are the same on all ranks, bit for bit.

    Raises RuntimeError that names the first parameter that differs, and the ranks where it does.
    """
    names = []
    sums = []
    for name, p in model.named_parameters():
        names.append(name)
        sums.append(sum_of_bits(p.detach()))

    sums = all_gather(torch.stack(sums)[None], "checks")  # (K, parameters)
    different = (sums != sums[0]).nonzero()  # pairs (rank, parameter)
    if len(different):
        ranks = sorted(set(different[:, 0].tolist()))
        name = names[different[:, 1].min()]
        raise RuntimeError(
            f"the ranks' weights have drifted apart: {name} on ranks {ranks} differs from rank 0"
        )


def sum_of_bits(x):
    """Sum the bit patterns of x as integers -> 0-dim int64.

    This sum is exact, so it does not depend on the order in which a device adds.
    """
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = x.contiguous().view(-1).view(integers[x.element_size()])
    return bits.sum(dtype=torch.int64)


def batchnorm(model):
    """BatchNorm's running statistics, which each rank has from its own samples -> list."""
    statistics = []
    for name, x in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            statistics.append(x)
    return statistics


@contextlib.contextmanager
def averaged_batchnorm(model):
    """Inside, BatchNorm's running statistics are the mean over all ranks: to evaluate and save.

    Each rank's own statistics are restored on exit, so that the save schedule cannot affect
    training.
    """
    statistics = batchnorm(model)
    if not statistics or world_size() == 1:
        yield
        return

    own = torch.cat([x.flatten() for x in statistics])
    mean = own / world_size()
    all_reduce(mean, "batchnorm").wait()

    copy_flat(mean, statistics)
    try:
        yield
    finally:
        copy_flat(own, statistics)


def copy_flat(flat, tensors):
    """Copy the consecutive parts of a flat tensor into tensors."""
    parts = flat.split([x.numel() for x in tensors])
    for x, part in zip(tensors, parts):
        x.copy_(part.view_as(x))
