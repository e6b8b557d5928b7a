"""dist.py: the overlapped gradient mean, gathers, the byte counter, equal weights, BatchNorm."""

import warnings

import pytest
import torch
import torch.distributed as c10d
from torch import nn

import dist
from config import ConfigError
from rank_server import run_ranks


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
        nn.Linear(32, 5),
        nn.Linear(5, 1),
    )


# ---- process group ----


def test_two_ranks_share_a_gpu_only_by_the_switch_of_the_tests(monkeypatch):
    backends = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(dist, "set_up_gpu", lambda local_rank: None)
    monkeypatch.setattr(c10d, "init_process_group", lambda name, timeout: backends.append(name))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")

    with pytest.raises(ConfigError, match="local rank 1 has no GPU"):
        dist.init()
    monkeypatch.setenv("FASTCLIP_SHARE_GPUS", "1")
    assert dist.init() == torch.device("cuda", 0)

    monkeypatch.delenv("FASTCLIP_SHARE_GPUS")
    monkeypatch.setenv("LOCAL_RANK", "0")
    dist.init()
    assert backends == ["gloo", "cpu:gloo,cuda:nccl"]


# ---- gradients ----


def reduce_gradients(wire, bucket_mb, pieces):
    """Two steps on this rank's own batch -> (batch, gradients, number of buckets, bytes sent)."""
    model = network().to(memory_format=torch.channels_last)  # strides that are not the default
    unused = nn.Linear(3, 3)  # takes no part in the forward pass
    model.append(unused)
    reducer = dist.GradReducer(model.parameters(), bucket_mb, wire)

    # The second step shows that nothing of the first is left.
    generator = torch.Generator().manual_seed(dist.rank())
    for _ in range(2):
        x = torch.randn(4, 3, 6, 6, generator=generator)
        reducer.zero()
        for i, part in enumerate(x.chunk(pieces)):
            if i == pieces - 1:
                reducer.arm()
            loss = model[:-1].eval()(part).square().sum()
            loss.backward()
        reducer.wait()

    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return x, gradients, len(reducer.buckets), dist.traffic["gradients"]


@pytest.mark.parametrize(
    "wire, bucket_mb, pieces",
    [(torch.float32, 25.0, 1), (torch.float32, 1e-4, 2), (torch.bfloat16, 1e-3, 1)],
)
def test_gradients_are_the_mean_over_ranks(wire, bucket_mb, pieces):
    results = run_ranks(2, reduce_gradients, wire, bucket_mb, pieces)

    # The same on one process: half the gradient of the sum over both batches.
    model = network().eval()
    batches = torch.cat([x for x, *_ in results])
    (model(batches).square().sum() / 2).backward()

    narrow = wire == torch.bfloat16
    tolerance = dict(rtol=2e-2, atol=1e-2) if narrow else dict(rtol=1e-5, atol=1e-6)
    parameters = sum(p.numel() for p in model.parameters()) + 12  # 12: of the unused layer
    for _, gradients, buckets, bytes_sent in results:
        for p, grad in zip(model.parameters(), gradients):
            torch.testing.assert_close(grad, p.grad, **tolerance)
        for grad in gradients[-2:]:
            assert grad is None or not grad.any()
        assert (buckets > 3) == (bucket_mb < 1e-3)
        # 2 steps, each 2 (K-1)/K times the bytes, K = 2.
        assert bytes_sent == 2 * parameters * (2 if narrow else 4)


# ---- collectives ----


def test_on_one_rank_every_collective_is_the_identity():
    x = torch.arange(4.0)
    assert dist.world_size() == 1
    assert dist.all_gather(x, "x") is x
    dist.all_reduce(x, "x").wait()
    assert x.tolist() == [0, 1, 2, 3]
    assert dist.all_gather_objects("a") == ["a"]
    dist.barrier()
    assert dist.traffic["x"] == 0


def gather_rank_numbers():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a name that is deprecated would be a warning on every rank
        out = dist.all_gather(torch.full((2, 3), float(dist.rank())), "features")
    return out, dict(dist.traffic)


def test_a_gather_is_in_rank_order_and_counted():
    for out, traffic in run_ranks(2, gather_rank_numbers):
        assert out[:, 0].tolist() == [0, 0, 1, 1]
        assert traffic == {"features": 24}


@pytest.mark.parametrize("device, divided", [("cpu", True), ("cuda", False)])
def test_nccl_divides_gradients_itself(monkeypatch, device, divided):
    begun = []

    def c10d_all_reduce(x, operation, async_op):
        begun.append((x, operation))

    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(c10d, "all_reduce", c10d_all_reduce)
    monkeypatch.setattr(torch.Tensor, "device", torch.device(device))

    dist.all_reduce(torch.tensor(6.0), "gradients", mean=True)
    [(sent, operation)] = begun
    assert sent.item() == (3 if divided else 6)
    assert operation == (c10d.ReduceOp.SUM if divided else c10d.ReduceOp.AVG)


# ---- weights ----


def change_a_weight_on_one_rank():
    """-> (BatchNorm's mean while averaged, the message of the check)"""
    model = network()
    dist.check_same_weights(model)
    with torch.no_grad():
        model[1].running_mean += dist.rank()
        with dist.averaged_batchnorm(model):
            mean = model[1].running_mean.clone()
        # Afterwards it is this rank's own again.
        assert torch.equal(model[1].running_mean, torch.full((8,), float(dist.rank())))

        if dist.rank() == 1:
            weight = model[3].weight[0, 0, 0, 0]
            weight.copy_(torch.nextafter(weight, torch.tensor(9.0)))  # by one bit

    message = ""
    try:
        dist.check_same_weights(model)
    except RuntimeError as error:
        message = str(error)

    dist.broadcast_weights(model)
    dist.check_same_weights(model)
    return mean, message


def test_weights_are_checked_and_batchnorm_averaged():
    for mean, message in run_ranks(2, change_a_weight_on_one_rank):
        assert torch.equal(mean, torch.full((8,), 0.5))
        assert "3.weight on ranks [1]" in message
