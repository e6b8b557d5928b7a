"""loss.py against the written definition, computed by brute force and autograd in float64, on 1, 2 and 4 processes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dist
from helpers import run_ranks
from loss import ALGORITHMS, TAU_REFERENCE, ContrastiveLoss

N, B, D, STEPS = 24, 8, 5, 7
RHO, EPS, LR_TAU = 6.5, 1e-3, 0.02
GAMMAS = [1.0, 0.9, 0.6, 0.5, 0.3, 0.3, 0.2]
CASES = [(name, equations) for name in ALGORITHMS for equations in ("paper", "release")]


def batch(step, world_size=1, rank=0, duplicates=False):
    """The global batch of a step (the same for every world size), and this rank's part of it."""
    g = torch.Generator().manual_seed(step)
    e = F.normalize(torch.randn(2, B, D, generator=g, dtype=torch.float64), dim=-1)
    ids = torch.randperm(N, generator=g)[:B]
    if duplicates:
        ids[B - 1] = ids[0]
        ids[3] = ids[2]
    part = slice(rank * B // world_size, (rank + 1) * B // world_size)
    return e[0, part].clone(), e[1, part].clone(), ids[part]


class Definition:
    """The method as it is written on paper: linear space, dictionaries, loops over anchors, gradients by autograd."""

    def __init__(self, name, equations):
        self.a, self.release = ALGORITHMS[name], equations == "release"
        self.u = {}  # id -> (u1, u2)
        self.tau = {i: [0.05, 0.05] for i in range(N)}
        self.adam = {i: [[0.0, 0.0], [0.0, 0.0], 0] for i in range(N)}

    def step(self, e1, e2, ids, tau, gamma, epoch):
        """-> gradients of (e1, e2, tau), objective"""
        e1, e2, tau = (x.clone().requires_grad_() for x in (e1, e2, tau))
        if self.a.loss == "MBCL":
            loss = (
                F.cross_entropy(e1 @ e2.T / tau, torch.arange(B))
                + F.cross_entropy(e2 @ e1.T / tau, torch.arange(B))
            ) / 2
            return *torch.autograd.grad(loss, (e1, e2, tau)), loss.detach()
        sample_tau = self.a.tau == "sample"
        taus = (
            torch.tensor([self.tau[i] for i in ids.tolist()], dtype=torch.float64)
            if sample_tau
            else tau.expand(B, 2)
        )
        taus = taus.clone().requires_grad_() if sample_tau else taus
        features_loss, tau_loss, objective, new_u = 0.0, 0.0, 0.0, {}
        for k, i in enumerate(ids.tolist()):
            s_kk = e1[k] @ e2[k]
            others = [j for j in range(B) if j != k]
            g = [
                sum(torch.exp((e1[k] @ e2[j] - s_kk) / taus[k, 0]) for j in others) / (B - 1),
                sum(torch.exp((e1[j] @ e2[k] - s_kk) / taus[k, 1]) for j in others) / (B - 1),
            ]
            u = [
                gi.item() if i not in self.u else (1 - gamma) * self.u[i][side] + gamma * gi.item()
                for side, gi in enumerate(g)
            ]
            new_u[i] = u
            for side in range(2):
                t = taus[k, side]
                # The estimator of d log(eps + g): the outer derivative at u, the inner one at the batch's g.
                inner = g[side] / (EPS + u[side])
                factor = (
                    1.0 if self.a.loss == "GCL/tau" or (self.release and sample_tau) else t.detach()
                )
                features_loss = features_loss + factor * inner / (2 * B)
                if self.a.loss == "GCL/tau":
                    tau_loss = tau_loss + inner / (2 * B) * (2 if self.release else 1)
                    objective += math.log(EPS + u[side]) / B
                elif self.a.loss == "RGCL-g":
                    log = math.log(u[side] + (0 if self.release else EPS))
                    tau_loss = tau_loss + (
                        t * (log + RHO) + t.detach() * inner * (2 if self.release else 1)
                    ) / (2 * B)
                    objective += t.item() * (math.log(EPS + u[side]) + RHO) / B
                elif self.a.loss == "RGCL":
                    tau_loss = tau_loss + t * (math.log(EPS + u[side]) + RHO) + t.detach() * inner
                    objective += t.item() * (math.log(EPS + u[side]) + RHO) / B
                else:
                    objective += t.item() * math.log(EPS + u[side]) / B
        d1, d2 = torch.autograd.grad(features_loss, (e1, e2), retain_graph=True)
        d_tau = None
        if sample_tau:
            d = torch.autograd.grad(tau_loss, taus)[0].clamp(-5, 5)
            for k, i in enumerate(ids.tolist()):
                self.adam_step(i, d[k].tolist(), epoch)
        elif self.a.learned:
            (d_tau,) = torch.autograd.grad(tau_loss, tau)
        self.u.update(new_u)
        return d1, d2, d_tau, objective

    def adam_step(self, i, d, epoch):
        m, v, t = self.adam[i]
        b1, b2 = (0.0, 0.0) if self.release and epoch == 0 else (0.9, 0.999)
        t += 1
        n = epoch + 1 if self.release else t
        for side in range(2):
            m[side] = b1 * m[side] + (1 - b1) * d[side]
            v[side] = b2 * v[side] + (1 - b2) * d[side] ** 2
            update = m[side] / (1 - b1**n) / (math.sqrt(v[side] / (1 - b2**n)) + 1e-8)
            self.tau[i][side] = min(1.0, max(0.01, self.tau[i][side] - LR_TAU * update))
        self.adam[i][2] = t


def run_all(dtype=torch.float64, cases=CASES, tile=0, duplicates=False):
    """Several steps of every case on this rank -> {case: what came out}."""
    results = {}
    for name, equations in cases:
        loss = ContrastiveLoss(name, N, equations, RHO, EPS, tau_init=0.05, dtype=dtype, tile=tile)
        rows = []
        for step in range(STEPS):
            e1, e2, ids = batch(step, dist.world_size(), dist.rank(), duplicates)
            e1, e2 = e1.to(dtype), e2.to(dtype)
            logit_scale = torch.tensor(-math.log(0.1 + 0.01 * step), dtype=dtype)
            lookup = loss.lookup(ids)
            rows.append(
                loss(
                    e1, e2, logit_scale, lookup, gamma=GAMMAS[step], epoch=step // 3, lr_tau=LR_TAU
                )
            )
        results[name, equations] = rows, loss.state.table[:-1], loss.state.columns
    return results


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_equals_the_definition(world_size):
    ranks = run_ranks(world_size, run_all) if world_size > 1 else [run_all()]
    for name, equations in CASES:
        definition = Definition(name, equations)
        for step in range(STEPS):
            tau = torch.tensor(0.1 + 0.01 * step, dtype=torch.float64)
            e1, e2, ids = batch(step)
            d1, d2, d_tau, objective = definition.step(e1, e2, ids, tau, GAMMAS[step], step // 3)
            outs = [rank[name, equations][0][step] for rank in ranks]
            case = f"{name}, {equations}, step {step}"
            # The factor K inside grad_* makes a mean over ranks a sum over them.
            assert_near(torch.cat([o.grad_image for o in outs]) / world_size, d1, case)
            assert_near(torch.cat([o.grad_text for o in outs]) / world_size, d2, case)
            sim = e1 @ e2.T / TAU_REFERENCE
            mbcl = (
                F.cross_entropy(sim, torch.arange(B)) + F.cross_entropy(sim.T, torch.arange(B))
            ) / 2
            for o in outs:
                assert_near(o.objective, torch.as_tensor(objective, dtype=torch.float64), case)
                assert_near(o.mbcl, mbcl, case)
                assert (o.grad_logit_scale is None) == (d_tau is None), case
                if d_tau is not None:
                    assert_near(o.grad_logit_scale, -tau * d_tau, case)
        for i in range(N):  # the sharded state, row by row
            columns = ranks[0][name, equations][2]
            row = dict(
                zip(columns, ranks[i % world_size][name, equations][1][i // world_size].tolist())
            )
            if "log_u1" in row:
                u = definition.u.get(i, (0.0, 0.0))
                assert [math.exp(row["log_u1"]), math.exp(row["log_u2"])] == pytest.approx(
                    u, rel=1e-9, abs=0
                ), (name, i)
            if "tau1" in row:
                assert [row["tau1"], row["tau2"]] == pytest.approx(definition.tau[i], rel=1e-9), (
                    name,
                    i,
                )
                assert row["visits"] == definition.adam[i][2]
                assert [row["m1"], row["m2"], row["v1"], row["v2"]] == pytest.approx(
                    sum(definition.adam[i][:2], []), rel=1e-9
                )


def assert_near(ours, theirs, case):
    assert (ours - theirs).abs().max() <= 1e-9 * max(1.0, theirs.abs().max()), (case, ours, theirs)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_at_gamma_one_it_is_the_gradient_of_the_objective(name):
    """With gamma = 1, u = g: then the estimator is the exact gradient of half the objective, here straight from autograd."""
    e1, e2, ids = batch(3)
    loss = ContrastiveLoss(name, N, "paper", RHO, EPS, tau_init=0.2, dtype=torch.float64)
    tau = torch.tensor(0.2, dtype=torch.float64)
    out = loss(e1, e2, -tau.log(), loss.lookup(ids), gamma=1.0)
    x1, x2, t = (x.clone().requires_grad_() for x in (e1, e2, tau))
    s = x1 @ x2.T
    if name == "openclip":
        half = (
            F.cross_entropy(s / t, torch.arange(B)) + F.cross_entropy(s.T / t, torch.arange(B))
        ) / 2
    else:
        off = ~torch.eye(B, dtype=torch.bool)
        g1 = (torch.exp((s - s.diagonal()[:, None]) / t) * off).sum(1) / (B - 1)
        g2 = (torch.exp((s - s.diagonal()[None, :]) / t) * off).sum(0) / (B - 1)
        half = (torch.log(EPS + g1) + torch.log(EPS + g2)).mean() / 2
        if name != "fastclip-v0":
            half = t * half
        if ALGORITHMS[name].loss in ("RGCL", "RGCL-g"):
            half = half + RHO * t
    d1, d2, dt = torch.autograd.grad(half, (x1, x2, t))
    assert_near(out.grad_image, d1, name)
    assert_near(out.grad_text, d2, name)
    if out.grad_logit_scale is not None:
        assert_near(out.grad_logit_scale, -tau * dt, name)
    assert_near(out.objective, half.detach() * (1 if name == "openclip" else 2), name)


def run_tiles():
    """{tile: what came out, with duplicate ids and without}"""
    return {
        tile: [run_all(tile=tile, duplicates=duplicates) for duplicates in (False, True)]
        for tile in (0, 1, 3, B - 1, B, B + 3)
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_tiles_change_nothing(world_size):
    for rank in run_ranks(world_size, run_tiles) if world_size > 1 else [run_tiles()]:
        for tile in rank:
            for whole, tiled in zip(rank[0], rank[tile]):
                for case in CASES:
                    (expected, table, _), (outs, tiled_table, _) = whole[case], tiled[case]
                    same = lambda a, b: torch.testing.assert_close(
                        a, b, rtol=1e-12, atol=1e-12, msg=lambda m: f"{case}, tile {tile}: {m}"
                    )
                    same(tiled_table, table)
                    for out, wanted in zip(outs, expected):
                        for a, b in zip(out, wanted):
                            assert (a is None) == (b is None)
                            a is None or same(a, b)


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside have held at one time."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.sizes[StorageWeakRef(x.untyped_storage())] = x.untyped_storage().nbytes()
        self.sizes = {
            storage: size for storage, size in self.sizes.items() if not storage.expired()
        }
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


def peak_bytes(monkeypatch, local, world_size, tile, device):
    """Of one call of the loss, on rank 0 of ranks that are said to exist and to hold the same as this one."""
    monkeypatch.setattr(dist, "world_size", lambda: world_size)
    monkeypatch.setattr(
        dist, "all_gather", lambda x, purpose: x.repeat(world_size, *[1] * (x.dim() - 1))
    )
    monkeypatch.setattr(dist, "all_reduce", lambda x, purpose: dist.NoWork())
    e1, e2 = F.normalize(
        torch.randn(2, local, 4, generator=torch.Generator().manual_seed(0)), dim=-1
    ).to(device)
    loss = ContrastiveLoss("fastclip-v3", local, device=device, tile=tile)
    lookup = loss.lookup(torch.arange(local))
    if device == "cuda":
        loss(e1, e2, torch.tensor(3.0, device=device), lookup)  # cuBLAS takes its workspace once
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss(e1, e2, torch.tensor(3.0, device=device), lookup)
        return torch.cuda.max_memory_allocated() - before
    with LiveBytes() as memory:
        loss(e1, e2, torch.tensor(3.0), lookup)
    return memory.peak


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
        ),
    ],
)
def test_tiled_memory_does_not_grow_with_the_global_batch(monkeypatch, device):
    local, few, many = 512, 2, 16
    growth = {
        tile: (
            peak_bytes(monkeypatch, local, many, tile, device)
            - peak_bytes(monkeypatch, local, few, tile, device)
        )
        / (4 * local * (many - few))
        for tile in (0, 256)
    }
    assert (
        growth[0] > 3 * local
    )  # in one piece, per pair of the global batch: similarities with all of mine, some times
    assert (
        growth[256] < 100
    )  # in tiles: its gathered features (2d = 8) and a few numbers of its own


def open_clip_gradients():
    """Gradients of open_clip's own distributed loss and of ours, on this rank."""
    from open_clip.loss import ClipLoss

    e1, e2, ids = batch(0, dist.world_size(), dist.rank())
    scale = torch.tensor(1 / 0.07, dtype=torch.float64, requires_grad=True)
    x1, x2 = e1.clone().requires_grad_(), e2.clone().requires_grad_()
    theirs = ClipLoss(
        local_loss=True, gather_with_grad=True, rank=dist.rank(), world_size=dist.world_size()
    )(x1, x2, scale)
    theirs.backward()
    loss = ContrastiveLoss("openclip", N, dtype=torch.float64)
    out = loss(e1, e2, scale.detach().log(), loss.lookup(ids))
    return out, x1.grad, x2.grad, scale.grad * scale.detach(), theirs.detach()


@pytest.mark.parametrize("world_size", [1, 2])
def test_openclip_equals_open_clips_own_loss(world_size):
    pytest.importorskip("open_clip")
    ranks = (
        run_ranks(world_size, open_clip_gradients) if world_size > 1 else [open_clip_gradients()]
    )
    for out, d1, d2, _, _ in ranks:
        assert_near(
            out.grad_image, d1, "image"
        )  # gather_with_grad sums over ranks: K times the mean, as ours
        assert_near(out.grad_text, d2, "text")
    mean = lambda column: torch.stack([r[column] for r in ranks]).mean()
    assert_near(ranks[0][0].grad_logit_scale, mean(3), "logit_scale")
    assert_near(ranks[0][0].objective, mean(4), "loss")


def run_duplicates():
    loss = ContrastiveLoss("fastclip-v2", N, "paper", RHO, EPS, tau_init=0.05, dtype=torch.float64)
    outs = []
    for step in range(3):
        e1, e2, ids = batch(step, dist.world_size(), dist.rank(), duplicates=True)
        outs.append(loss(e1, e2, torch.tensor(0.0), loss.lookup(ids), gamma=0.5, lr_tau=LR_TAU))
    return loss.state.table[:-1], torch.stack([o.objective for o in outs])


def test_duplicate_ids_have_one_rule_on_any_number_of_ranks():
    """Both read the same old row; the last one in the global batch is remembered."""
    one, objectives = run_duplicates()
    for world_size in (2, 4):
        ranks = run_ranks(world_size, run_duplicates)
        for i in range(N):
            torch.testing.assert_close(
                ranks[i % world_size][0][i // world_size], one[i], rtol=1e-12, atol=0
            )
        torch.testing.assert_close(ranks[0][1], objectives, rtol=1e-12, atol=0)
    e1, e2, ids = batch(0, duplicates=True)
    alone = ContrastiveLoss("fastclip-v1", N, "paper", RHO, EPS, dtype=torch.float64)
    alone(e1, e2, torch.tensor(3.0), alone.lookup(ids))
    renamed = ids.clone()
    renamed[B - 1] = next(
        i for i in range(N) if i not in ids
    )  # the same batch with the last one told apart
    apart = ContrastiveLoss("fastclip-v1", N, "paper", RHO, EPS, dtype=torch.float64)
    apart(e1, e2, torch.tensor(3.0), apart.lookup(renamed))
    assert torch.equal(alone.state.table[ids[0]], apart.state.table[renamed[B - 1]])


@pytest.mark.parametrize("tile", [0, 1])
@pytest.mark.parametrize("name,equations", CASES)
def test_extremes_stay_finite_and_right(name, equations, tile):
    """tau = 0.01 and exactly wrong features (exponent 200), float32, first visits and later ones, B = 2."""
    e1 = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    e2 = -e1
    loss = ContrastiveLoss(name, 2, equations, RHO, 1e-14, tau_init=0.01, tile=tile)
    scale = torch.tensor(math.log(100.0))
    for gamma in (1.0, 0.5, 0.2):
        for sign in (1, -1):  # all wrong (g = e^200), then all right (g = e^-200)
            out = loss(
                e1, sign * e2, scale, loss.lookup(torch.tensor([0, 1])), gamma=gamma, lr_tau=0.01
            )
            for value in out:
                assert value is None or torch.isfinite(value).all(), (name, gamma, sign, out)
    assert torch.isfinite(loss.state.table[:-1]).all()
    first = ContrastiveLoss(name, 2, equations, RHO, 1e-14, tau_init=0.01, tile=tile)
    out = first(e1, e2, scale, first.lookup(torch.tensor([0, 1])), gamma=1.0)
    # Exponent 200: log g = 200 to all figures, P = 1, so image 0 is pulled by c (K/2B)(2 e2_1 - 2 e2_0) = c [1, 0].
    c = (
        100.0
        if ALGORITHMS[name].c == "1/tau"
        or (equations == "release" and ALGORITHMS[name].loss == "RGCL")
        else 1.0
    )
    torch.testing.assert_close(out.grad_image[0], torch.tensor([c, 0.0]), rtol=1e-4, atol=1e-6)


def run_one_per_rank():
    loss = ContrastiveLoss("fastclip-v3", 4, "paper", RHO, 1e-14)
    e = F.normalize(torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    part = slice(dist.rank(), dist.rank() + 1) if dist.world_size() == 2 else slice(0, 2)
    out = loss(
        e[0, part], e[1, part], torch.tensor(4.6), loss.lookup(torch.arange(2)[part]), gamma=1.0
    )
    return out.grad_image


def test_a_local_batch_of_one():
    torch.testing.assert_close(
        torch.cat(run_ranks(2, run_one_per_rank)) / 2, run_one_per_rank(), rtol=1e-5, atol=1e-7
    )


def test_float32_follows_float64():
    double, single = run_all(torch.float64), run_all(torch.float32)
    for case in CASES:
        for a, b in zip(double[case][0], single[case][0]):
            torch.testing.assert_close(b.grad_image.double(), a.grad_image, rtol=2e-3, atol=2e-5)
            torch.testing.assert_close(b.objective.double(), a.objective, rtol=1e-4, atol=1e-5)


def test_bad_input_is_named():
    loss = ContrastiveLoss("fastclip-v3", 10)
    for wrong in (10, -1):
        with pytest.raises(ValueError, match=rf"sample id {wrong} is outside \[0, 10\)"):
            loss.lookup(torch.tensor([1, wrong]))
    with pytest.raises(ValueError, match="unknown algorithm 'v9'"):
        ContrastiveLoss("v9", 10)
    with pytest.raises(ValueError, match="tile = -1 must not be negative"):
        ContrastiveLoss("fastclip-v3", 10, tile=-1)
    with pytest.raises(ValueError, match="no negatives"):
        loss(torch.ones(1, 2), torch.ones(1, 2), torch.tensor(1.0), loss.lookup(torch.tensor([0])))
