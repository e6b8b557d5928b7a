"""loss.py: the definition against loops, the kernel against both; float64, on 1, 2 and 4 ranks."""

import functools
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dist
import loss as losses
from config import ConfigError
from loss import ALGORITHMS, TAU_REFERENCE, ContrastiveLoss, loss_by_definition
from rank_server import run_ranks

N = 24  # samples
B = 8  # pairs in the global batch
D = 5  # dimension of the features
STEPS = 7
GAMMAS = [1.0, 0.9, 0.6, 0.5, 0.3, 0.3, 0.2]  # of each step
TAU_INIT = 0.05  # per-sample temperatures
RHO = 6.5
EPS = 1e-3
LR_TAU = 0.02
CASES = [(name, equations) for name in ALGORITHMS for equations in ("paper", "release")]


def batch(step, world_size=1, rank=0, duplicates=False):
    """This rank's part of a step's global batch, which is the same for every number of ranks.

    -> image features (b, D), text features (b, D), ids (b,)."""
    g = torch.Generator().manual_seed(step)
    e = F.normalize(torch.randn(2, B, D, generator=g, dtype=torch.float64), dim=-1)
    ids = torch.randperm(N, generator=g)[:B]
    if duplicates:
        ids[B - 1] = ids[0]
        ids[3] = ids[2]
    part = slice(rank * B // world_size, (rank + 1) * B // world_size)
    return e[0, part].clone(), e[1, part].clone(), ids[part]


def global_tau(step):
    """The global temperature of a step, float64 ()."""
    return torch.tensor(0.1 + 0.01 * step, dtype=torch.float64)


def cross_entropies(sim):
    """CLIP's loss of logits (B, B)."""
    positives = torch.arange(len(sim))
    return (F.cross_entropy(sim, positives) + F.cross_entropy(sim.T, positives)) / 2


def assert_near(value, expected, case):
    difference = (value - expected).abs().max()
    assert difference <= 1e-9 * max(1.0, expected.abs().max()), (case, value, expected)


# The method by loops --------------------------------------------------------------------------


class Gradients(NamedTuple):
    image: torch.Tensor  # (B, D)
    text: torch.Tensor  # (B, D)
    tau: torch.Tensor | None  # () if global, (B, 2) if per sample; None if it is not learned
    objective: torch.Tensor  # ()


class Loops:
    """The method as it is written on paper: dictionaries, loops over anchors and candidates.

    It computes what is summed up, and leaves derivatives to autograd.
    """

    def __init__(self, name, equations):
        self.algorithm = ALGORITHMS[name]
        self.release = equations == "release"
        self.u = {}  # id -> [u1, u2]
        self.tau = {i: [TAU_INIT, TAU_INIT] for i in range(N)}
        self.adam = {i: dict(m=[0.0, 0.0], v=[0.0, 0.0], visits=0) for i in range(N)}

    def step(self, e1, e2, ids, tau, gamma, epoch):
        """One step on the global batch. tau: the global temperature. -> Gradients"""
        e1 = e1.clone().requires_grad_()
        e2 = e2.clone().requires_grad_()
        tau = tau.clone().requires_grad_()
        if self.algorithm.loss == "MBCL":
            loss = cross_entropies(e1 @ e2.T / tau)
            return Gradients(*torch.autograd.grad(loss, (e1, e2, tau)), loss.detach())

        per_sample = self.algorithm.tau == "sample"
        if per_sample:
            tau = torch.tensor([self.tau[i] for i in ids.tolist()], dtype=torch.float64)
            tau.requires_grad_()
        taus = tau.expand(B, 2)

        feature_loss = 0.0
        tau_loss = 0.0
        objective = 0.0
        new_u = {}
        for k, i in enumerate(ids.tolist()):
            g = self.contrasts(e1, e2, k, taus[k])
            new_u[i] = self.averages(i, g, gamma)
            for side in (0, 1):
                t = taus[k, side]
                u = new_u[i][side]
                # The estimator of d log(eps + g): the outer derivative at u, the inner one of g.
                inner = g[side] / (EPS + u)
                feature_loss = feature_loss + self.feature_factor(t) * inner / (2 * B)
                tau_loss = tau_loss + self.tau_term(t, u, inner) / (2 * B)
                objective += self.objective_term(t.item(), u) / B
        self.u.update(new_u)

        d1, d2 = torch.autograd.grad(feature_loss, (e1, e2), retain_graph=True)
        d_tau = None
        if self.algorithm.learned:
            (d_tau,) = torch.autograd.grad(tau_loss, tau)
        if per_sample:
            d_tau = d_tau * 2 * B  # of the sample's own term, not of the mean
            for k, i in enumerate(ids.tolist()):
                self.adam_step(i, d_tau[k].clamp(-5, 5).tolist(), epoch)
        return Gradients(d1, d2, d_tau, torch.tensor(objective, dtype=torch.float64))

    def contrasts(self, e1, e2, k, taus):
        """[g1, g2] of the k-th pair."""
        positive = e1[k] @ e2[k]
        g1 = 0.0
        g2 = 0.0
        for j in range(B):
            if j != k:
                g1 = g1 + torch.exp((e1[k] @ e2[j] - positive) / taus[0]) / (B - 1)
                g2 = g2 + torch.exp((e1[j] @ e2[k] - positive) / taus[1]) / (B - 1)
        return [g1, g2]

    def averages(self, i, g, gamma):
        """[u1, u2] of sample i after this visit, equation (1)."""
        if i not in self.u:
            return [g[0].item(), g[1].item()]
        return [(1 - gamma) * u + gamma * x.item() for u, x in zip(self.u[i], g)]

    def feature_factor(self, t):
        """The objective's factor of log(eps + g), constant for the features."""
        if self.algorithm.loss == "GCL/tau":
            return 1.0
        if self.release and self.algorithm.loss in ("GCL", "RGCL"):
            return 1.0
        return t.detach()

    def tau_term(self, t, u, inner):
        """What is derived by the temperature."""
        doubled = 2 if self.release else 1
        if self.algorithm.loss == "GCL/tau":
            return doubled * inner
        if self.algorithm.loss == "RGCL-g":
            log = math.log(u) if self.release else math.log(EPS + u)
            return t * (log + RHO) + t.detach() * doubled * inner
        if self.algorithm.loss == "RGCL":
            return t * (math.log(EPS + u) + RHO) + t.detach() * inner
        return 0.0

    def objective_term(self, t, u):
        log = math.log(EPS + u)
        if self.algorithm.loss == "GCL/tau":
            return log
        if self.algorithm.loss == "GCL":
            return t * log
        return t * (log + RHO)

    def adam_step(self, i, d, epoch):
        """Adam on the temperatures of sample i. d: two gradients."""
        adam = self.adam[i]
        adam["visits"] += 1
        beta1, beta2 = (0.0, 0.0) if self.release and epoch == 0 else (0.9, 0.999)
        n = epoch + 1 if self.release else adam["visits"]
        for side in (0, 1):
            m = beta1 * adam["m"][side] + (1 - beta1) * d[side]
            v = beta2 * adam["v"][side] + (1 - beta2) * d[side] ** 2
            adam["m"][side] = m
            adam["v"][side] = v
            update = m / (1 - beta1**n) / (math.sqrt(v / (1 - beta2**n)) + 1e-8)
            self.tau[i][side] = min(1.0, max(0.01, self.tau[i][side] - LR_TAU * update))


# The kernel on one or several ranks -----------------------------------------------------------


class Run(NamedTuple):
    """What one rank has after STEPS steps of an algorithm."""

    outs: list  # LossOutput of each step
    rows: list  # of each step: the state of the global batch before it, {column name: (B,)}
    table: torch.Tensor  # this rank's part of the state at the end, (rows, columns)
    columns: list  # their names


def run_kernel(name, equations, dtype=torch.float64, tile=0, duplicates=False):
    """STEPS steps of one algorithm on this rank -> Run"""
    loss = ContrastiveLoss(name, N, equations, RHO, EPS, tau_init=TAU_INIT, dtype=dtype, tile=tile)
    outs = []
    rows = []
    for step in range(STEPS):
        e1, e2, ids = batch(step, dist.world_size(), dist.rank(), duplicates)
        log_scale = -global_tau(step).log().to(dtype)
        lookup = loss.lookup(dist.all_gather(ids, "ids"))
        out = loss(
            e1.to(dtype),
            e2.to(dtype),
            log_scale,
            lookup,
            gamma=GAMMAS[step],
            epoch=step // 3,
            lr_tau=LR_TAU,
        )
        outs.append(out)
        rows.append(lookup.finish())
    return Run(outs, rows, loss.state.table[:-1], loss.state.columns)


def run_cases(**settings):
    """{case: Run} of all algorithms and both kinds of equations, on this rank."""
    return {case: run_kernel(*case, **settings) for case in CASES}


def on_ranks(world_size, function, *args):
    """function(*args) on each of so many ranks -> list of results by rank."""
    if world_size == 1:
        return [function(*args)]
    return run_ranks(world_size, function, *args)


@functools.cache
def kernel_runs(world_size):
    """run_cases on each rank, computed once for all tests."""
    return on_ranks(world_size, run_cases)


def whole_gradient(outs, field):
    """A feature gradient of the global batch, from the LossOutputs of all ranks at one step.

    The factor K inside it makes a mean over ranks the sum over them; here it is taken out."""
    return torch.cat([getattr(out, field) for out in outs]) / len(outs)


# Definition, loops and kernel are equal -------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_definition_equals_loops(name):
    loops = Loops(name, "paper")
    u1 = torch.full((N,), math.nan, dtype=torch.float64)
    u2 = torch.full((N,), math.nan, dtype=torch.float64)
    for step in range(STEPS):
        e1, e2, ids = batch(step)
        tau1 = tau2 = global_tau(step).requires_grad_()
        if ALGORITHMS[name].tau == "sample":
            taus = torch.tensor([loops.tau[i] for i in ids.tolist()], dtype=torch.float64)
            tau1 = taus[:, 0].clone().requires_grad_()
            tau2 = taus[:, 1].clone().requires_grad_()
        expected = loops.step(e1, e2, ids, tau1.detach(), GAMMAS[step], step // 3)

        e1.requires_grad_()
        e2.requires_grad_()
        loss, u1[ids], u2[ids] = loss_by_definition(
            name, e1, e2, tau1, tau2, u1[ids], u2[ids], GAMMAS[step], RHO, EPS
        )
        loss.backward()

        case = f"{name}, step {step}"
        assert_near(e1.grad, expected.image, case)
        assert_near(e2.grad, expected.text, case)
        objective = loss.detach() * (1 if name == "openclip" else 2)
        assert_near(objective, expected.objective, case)
        if ALGORITHMS[name].tau == "sample":
            assert_near(torch.stack([tau1.grad, tau2.grad], 1) * 2 * B, expected.tau, case)
        elif ALGORITHMS[name].learned:
            assert_near(tau1.grad, expected.tau, case)

    for i, expected_u in loops.u.items():
        assert [u1[i].item(), u2[i].item()] == pytest.approx(expected_u, rel=1e-9)
    if name != "openclip":
        visited = sorted(loops.u)
        assert (~u1.isnan()).nonzero().flatten().tolist() == visited


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_kernel_equals_definition(world_size):
    """With per-sample temperatures, the definition takes those that the kernel has at this step."""
    runs = kernel_runs(world_size)
    for name, algorithm in ALGORITHMS.items():
        u1 = torch.full((N,), math.nan, dtype=torch.float64)
        u2 = torch.full((N,), math.nan, dtype=torch.float64)
        for step in range(STEPS):
            e1, e2, ids = batch(step)
            e1.requires_grad_()
            e2.requires_grad_()
            tau1 = tau2 = global_tau(step).requires_grad_()
            if algorithm.tau == "sample":
                rows = runs[0][name, "paper"].rows[step]
                tau1 = rows["tau1"]
                tau2 = rows["tau2"]
            loss, u1[ids], u2[ids] = loss_by_definition(
                name, e1, e2, tau1, tau2, u1[ids], u2[ids], GAMMAS[step], RHO, EPS
            )
            loss.backward()

            case = f"{name}, step {step}"
            outs = [run[name, "paper"].outs[step] for run in runs]
            assert_near(whole_gradient(outs, "grad_image"), e1.grad, case)
            assert_near(whole_gradient(outs, "grad_text"), e2.grad, case)
            objective = loss.detach() * (1 if name == "openclip" else 2)
            for out in outs:
                assert_near(out.objective, objective, case)
                if out.grad_logit_scale is not None:
                    assert_near(out.grad_logit_scale, -tau1.detach() * tau1.grad, case)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_kernel_equals_loops(world_size):
    runs = kernel_runs(world_size)
    for name, equations in CASES:
        loops = Loops(name, equations)
        for step in range(STEPS):
            e1, e2, ids = batch(step)
            tau = global_tau(step)
            expected = loops.step(e1, e2, ids, tau, GAMMAS[step], step // 3)
            mbcl = cross_entropies(e1 @ e2.T / TAU_REFERENCE)

            case = f"{name}, {equations}, step {step}"
            outs = [run[name, equations].outs[step] for run in runs]
            assert_near(whole_gradient(outs, "grad_image"), expected.image, case)
            assert_near(whole_gradient(outs, "grad_text"), expected.text, case)
            learns_global_tau = ALGORITHMS[name].learned and ALGORITHMS[name].tau == "global"
            for out in outs:
                assert_near(out.objective, expected.objective, case)
                assert_near(out.mbcl, mbcl, case)
                assert (out.grad_logit_scale is not None) == learns_global_tau, case
                if learns_global_tau:
                    assert_near(out.grad_logit_scale, -tau * expected.tau, case)
        assert_same_state([run[name, equations] for run in runs], loops)


def assert_same_state(runs, loops):
    """The sharded state at the end, row by row: id i on rank i mod K, in row i // K."""
    world_size = len(runs)
    for i in range(N):
        run = runs[i % world_size]
        row = dict(zip(run.columns, run.table[i // world_size].tolist()))
        if "log_u1" in row:
            u = [math.exp(row["log_u1"]), math.exp(row["log_u2"])]
            assert u == pytest.approx(loops.u.get(i, [0.0, 0.0]), rel=1e-9, abs=0), i
        if "tau1" in row:
            adam = loops.adam[i]
            assert [row["tau1"], row["tau2"]] == pytest.approx(loops.tau[i], rel=1e-9), i
            assert row["visits"] == adam["visits"], i
            assert [row["m1"], row["m2"]] == pytest.approx(adam["m"], rel=1e-9), i
            assert [row["v1"], row["v2"]] == pytest.approx(adam["v"], rel=1e-9), i


@pytest.mark.parametrize("name", ALGORITHMS)
def test_at_gamma_one_it_is_the_gradient_of_the_objective(name):
    """With gamma = 1, u = g: the estimator is then the gradient of half the objective itself."""
    e1, e2, ids = batch(3)
    tau = torch.tensor(0.2, dtype=torch.float64)
    loss = ContrastiveLoss(name, N, "paper", RHO, EPS, tau_init=0.2, dtype=torch.float64)
    out = loss(e1, e2, -tau.log(), loss.lookup(ids), gamma=1.0)

    for x in (e1, e2, tau):
        x.requires_grad_()
    half = half_objective(name, e1 @ e2.T, tau)
    d1, d2, d_tau = torch.autograd.grad(half, (e1, e2, tau))

    assert_near(out.grad_image, d1, name)
    assert_near(out.grad_text, d2, name)
    if out.grad_logit_scale is not None:
        assert_near(out.grad_logit_scale, -tau.detach() * d_tau, name)
    assert_near(out.objective, half.detach() * (1 if name == "openclip" else 2), name)


def half_objective(name, s, tau):
    """Half the objective (openclip's: the objective) of one batch, with its own g."""
    if name == "openclip":
        return cross_entropies(s / tau)
    others = ~torch.eye(B, dtype=torch.bool)
    g1 = (torch.exp((s - s.diagonal()[:, None]) / tau) * others).sum(1) / (B - 1)
    g2 = (torch.exp((s - s.diagonal()[None, :]) / tau) * others).sum(0) / (B - 1)
    half = (torch.log(EPS + g1) + torch.log(EPS + g2)).mean() / 2
    if ALGORITHMS[name].loss == "GCL/tau":
        return half
    if ALGORITHMS[name].loss == "GCL":
        return tau * half
    return tau * (half + RHO)


# What "release" computes otherwise ------------------------------------------------------------


@pytest.mark.parametrize("name", ["sogclr", "fastclip-v1"])
def test_the_released_gradient_of_gcl_lacks_the_factor_tau(name):
    (runs,) = kernel_runs(1)
    for step in range(STEPS):
        paper = runs[name, "paper"].outs[step]
        release = runs[name, "release"].outs[step]
        tau = global_tau(step)
        assert_near(release.grad_image, paper.grad_image / tau, name)
        assert_near(release.grad_text, paper.grad_text / tau, name)
        assert torch.equal(release.objective, paper.objective)
    assert torch.equal(runs[name, "release"].table, runs[name, "paper"].table)


def test_departures_concern_the_losses_that_they_name():
    """Paper and release give the same numbers for the losses that no row of DEPARTURES names."""
    concerned = set()
    for departure in losses.DEPARTURES.values():
        concerned.update(departure.losses)

    (runs,) = kernel_runs(1)
    for name, algorithm in ALGORITHMS.items():
        equal = []
        for paper, release in zip(runs[name, "paper"].outs, runs[name, "release"].outs):
            for field in ("grad_image", "grad_text", "grad_logit_scale"):
                a = getattr(paper, field)
                b = getattr(release, field)
                equal.append(a is None or torch.equal(a, b))
        assert all(equal) == (algorithm.loss not in concerned), name


# gamma per sample -----------------------------------------------------------------------------


def test_gamma_may_be_a_number_or_a_tensor():
    log_u = torch.tensor([-math.inf, -3.0, 0.0, 40.0], dtype=torch.float64)
    log_g = torch.tensor([1.0, 2.0, -50.0, 39.0], dtype=torch.float64)
    for gamma in (0.2, 0.5, 0.9):
        expected = losses.moving_average(log_u, log_g, gamma)
        u = (1 - gamma) * log_u.exp() + gamma * log_g.exp()
        torch.testing.assert_close(expected[1:], u.log()[1:], rtol=1e-12, atol=1e-12)
        assert expected[0] == log_g[0]
        for tensor in (torch.tensor(gamma), torch.full((4,), gamma)):
            found = losses.moving_average(log_u, log_g, tensor.double())
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    for gamma in (1.0, torch.tensor(1.0), torch.ones(4)):
        assert torch.equal(losses.moving_average(log_u, log_g, gamma), log_g)


def run_with_gamma_per_sample():
    """Two steps with a gamma for each sample of the global batch -> (LossOutput, state)"""
    loss = ContrastiveLoss("fastclip-v3", N, "paper", RHO, EPS, dtype=torch.float64)
    for _ in range(2):  # the same batch twice: gamma counts in the second step only
        e1, e2, ids = batch(0, dist.world_size(), dist.rank())
        gamma = torch.linspace(0.1, 1.0, B)
        lookup = loss.lookup(dist.all_gather(ids, "ids"))
        out = loss(e1 * 0.9, e2, -global_tau(0).log(), lookup, gamma)
    return out, loss.state.table[:-1]


@pytest.mark.parametrize("world_size", [1, 2])
def test_gamma_per_sample_equals_definition(world_size):
    runs = on_ranks(world_size, run_with_gamma_per_sample)

    gamma = torch.linspace(0.1, 1.0, B).double()
    u1 = u2 = torch.full((B,), math.nan, dtype=torch.float64)
    for _ in range(2):
        e1, e2, ids = batch(0)
        e1.requires_grad_()
        e2.requires_grad_()
        tau = global_tau(0)
        loss, u1, u2 = loss_by_definition(
            "fastclip-v3", e1 * 0.9, e2, tau, tau, u1, u2, gamma, RHO, EPS
        )
        loss.backward()

    outs = [out for out, _ in runs]
    assert_near(whole_gradient(outs, "grad_image") * 0.9, e1.grad, "image")
    assert_near(whole_gradient(outs, "grad_text"), e2.grad, "text")
    for i, u in zip(ids.tolist(), u1.tolist()):
        table = runs[i % world_size][1]
        assert table[i // world_size, 0].exp().item() == pytest.approx(u, rel=1e-7)
    for out in outs:
        assert out.gamma.item() == pytest.approx(gamma.mean().item())


def test_an_algorithm_may_compute_gamma_per_sample():
    """gamma_i = sigmoid(log u_i + 10) by logarithms: in float32 it is 1 from log u = 7 on."""

    class GammaOfU(ContrastiveLoss):
        def average(self, log_u, log_g, gamma):
            log_gamma = F.logsigmoid(log_u + 10)
            log_keep = F.logsigmoid(-log_u - 10)
            log_u = losses.log_moving_average(log_u, log_g, log_keep, log_gamma)
            return log_u, log_gamma.exp().mean()

    loss = GammaOfU("fastclip-v3", N, "paper", RHO, EPS, dtype=torch.float64)
    e1, e2, ids = batch(0)
    log_scale = -global_tau(0).log()
    loss(e1, e2, log_scale, loss.lookup(ids))
    first_table = loss.state.table[ids]
    first = first_table[:, 0].exp()
    out = loss(e1.flip(0), e2, log_scale, loss.lookup(ids))
    second = loss.state.table[ids, 0].exp()

    plain = ContrastiveLoss("fastclip-v3", N, "paper", RHO, EPS, dtype=torch.float64)
    plain(e1.flip(0), e2, log_scale, plain.lookup(ids))
    g = plain.state.table[ids, 0].exp()
    gamma = torch.sigmoid(first.log() + 10)
    torch.testing.assert_close(second, (1 - gamma) * first + gamma * g, rtol=1e-9, atol=0)

    # The log gets the mean over both sides of what was used, and nothing of the argument.
    first_u2 = first_table[:, 1].exp()
    used = (gamma + torch.sigmoid(first_u2.log() + 10)) / 2
    torch.testing.assert_close(out.gamma, used.mean(), rtol=1e-9, atol=0)


# Tiles, memory --------------------------------------------------------------------------------


def run_tiles():
    """{(tile, duplicates): {case: Run}}"""
    runs = {}
    for tile in (0, 1, 3, B - 1, B, B + 3):
        for duplicates in (False, True):
            runs[tile, duplicates] = run_cases(tile=tile, duplicates=duplicates)
    return runs


def assert_same_run(run, expected, label):
    """The same numbers but for rounding."""
    pairs = [(run.table, expected.table)]
    for out, expected_out in zip(run.outs, expected.outs):
        pairs.extend(zip(out, expected_out))
    for value, expected_value in pairs:
        assert (value is None) == (expected_value is None), label
        if value is not None:
            torch.testing.assert_close(
                value,
                expected_value,
                rtol=1e-12,
                atol=1e-12,
                msg=lambda text: f"{label}: {text}",
            )


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_tiles_change_nothing(world_size):
    for runs in on_ranks(world_size, run_tiles):
        for (tile, duplicates), tiled in runs.items():
            for case in CASES:
                assert_same_run(tiled[case], runs[0, duplicates][case], f"{case}, tile {tile}")


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside have had at one time."""

    def __init__(self):
        super().__init__()
        self.sizes = {}  # storage -> bytes
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.sizes[StorageWeakRef(x.untyped_storage())] = x.untyped_storage().nbytes()
        alive = {storage: size for storage, size in self.sizes.items() if not storage.expired()}
        self.sizes = alive
        self.peak = max(self.peak, sum(alive.values()))
        return out


def peak_bytes(monkeypatch, local, world_size, tile, device):
    """Of one call of the loss, on rank 0 of ranks that are said to exist and to hold the same."""

    def all_gather(x, purpose):
        return x.repeat(world_size, *[1] * (x.dim() - 1))

    monkeypatch.setattr(dist, "world_size", lambda: world_size)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    monkeypatch.setattr(dist, "all_reduce", lambda x, purpose: dist.NoWork())

    generator = torch.Generator().manual_seed(0)
    e1, e2 = F.normalize(torch.randn(2, local, 4, generator=generator), dim=-1).to(device)
    loss = ContrastiveLoss("fastclip-v3", local, device=device, tile=tile)
    lookup = loss.lookup(torch.arange(local).repeat(world_size))
    log_scale = torch.tensor(3.0, device=device)

    if device == "cuda":
        loss(e1, e2, log_scale, lookup)  # cuBLAS takes its workspace once
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss(e1, e2, log_scale, lookup)
        return torch.cuda.max_memory_allocated() - before

    with LiveBytes() as memory:
        loss(e1, e2, log_scale, lookup)
    return memory.peak


no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=no_gpu)])
def test_tiled_memory_does_not_grow_with_the_global_batch(monkeypatch, device):
    local = 512
    few_ranks = 2
    many_ranks = 16

    def growth(tile):
        """Numbers in memory for each pair that the global batch has more."""
        many = peak_bytes(monkeypatch, local, many_ranks, tile, device)
        few = peak_bytes(monkeypatch, local, few_ranks, tile, device)
        return (many - few) / (4 * local * (many_ranks - few_ranks))

    # In one piece: the similarities with all local samples, several times.
    assert growth(tile=0) > 3 * local
    # In tiles: the pair's gathered features (2d = 8) and a few numbers.
    assert growth(tile=256) < 100


# open_clip ------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """Our openclip beside open_clip's own distributed loss, on one rank."""

    out: losses.LossOutput
    grad_image: torch.Tensor
    grad_text: torch.Tensor
    grad_logit_scale: torch.Tensor
    loss: torch.Tensor


def compare_with_open_clip():
    from open_clip.loss import ClipLoss

    e1, e2, ids = batch(0, dist.world_size(), dist.rank())
    scale = torch.tensor(1 / 0.07, dtype=torch.float64, requires_grad=True)
    x1 = e1.clone().requires_grad_()
    x2 = e2.clone().requires_grad_()
    reference = ClipLoss(
        local_loss=True, gather_with_grad=True, rank=dist.rank(), world_size=dist.world_size()
    )
    value = reference(x1, x2, scale)
    value.backward()

    loss = ContrastiveLoss("openclip", N, dtype=torch.float64)
    out = loss(e1, e2, scale.detach().log(), loss.lookup(dist.all_gather(ids, "ids")))
    return Comparison(out, x1.grad, x2.grad, scale.grad * scale.detach(), value.detach())


@pytest.mark.parametrize("world_size", [1, 2])
def test_openclip_equals_open_clips_own_loss(world_size):
    pytest.importorskip("open_clip")
    ranks = on_ranks(world_size, compare_with_open_clip)
    for rank in ranks:
        # gather_with_grad sums over ranks: K times the mean, like ours.
        assert_near(rank.out.grad_image, rank.grad_image, "image")
        assert_near(rank.out.grad_text, rank.grad_text, "text")

    grad_logit_scale = torch.stack([rank.grad_logit_scale for rank in ranks]).mean()
    value = torch.stack([rank.loss for rank in ranks]).mean()
    assert_near(ranks[0].out.grad_logit_scale, grad_logit_scale, "logit_scale")
    assert_near(ranks[0].out.objective, value, "loss")


# Special batches ------------------------------------------------------------------------------


def run_duplicates():
    """Three steps with an id that stands in the batch twice -> (state, objectives (3,))"""
    loss = ContrastiveLoss(
        "fastclip-v2", N, "paper", RHO, EPS, tau_init=TAU_INIT, dtype=torch.float64
    )
    objectives = []
    for step in range(3):
        e1, e2, ids = batch(step, dist.world_size(), dist.rank(), duplicates=True)
        lookup = loss.lookup(dist.all_gather(ids, "ids"))
        out = loss(e1, e2, torch.tensor(0.0), lookup, gamma=0.5, lr_tau=LR_TAU)
        objectives.append(out.objective)
    return loss.state.table[:-1], torch.stack(objectives)


@pytest.mark.slow
def test_duplicate_ids_have_one_rule_on_any_number_of_ranks():
    """Both read the same old row; the last one in the global batch is remembered."""
    table, objectives = run_duplicates()
    for world_size in (2, 4):
        ranks = run_ranks(world_size, run_duplicates)
        for i in range(N):
            row = ranks[i % world_size][0][i // world_size]
            torch.testing.assert_close(row, table[i], rtol=1e-12, atol=0)
        torch.testing.assert_close(ranks[0][1], objectives, rtol=1e-12, atol=0)

    # The same batch, in which the last of the two has an id of its own.
    e1, e2, ids = batch(0, duplicates=True)
    distinct_ids = ids.clone()
    distinct_ids[B - 1] = next(i for i in range(N) if i not in ids)

    tables = []
    for some_ids in (ids, distinct_ids):
        loss = ContrastiveLoss("fastclip-v1", N, "paper", RHO, EPS, dtype=torch.float64)
        loss(e1, e2, torch.tensor(3.0), loss.lookup(some_ids))
        tables.append(loss.state.table)
    assert torch.equal(tables[0][ids[0]], tables[1][distinct_ids[B - 1]])


@pytest.mark.parametrize("tile", [0, 1])
@pytest.mark.parametrize("name,equations", CASES)
def test_extremes_stay_finite_and_right(name, equations, tile):
    """tau = 0.01 and exactly wrong features (exponent 200), float32, first and later visits."""

    def make_loss():
        return ContrastiveLoss(name, 2, equations, RHO, 1e-14, tau_init=0.01, tile=tile)

    e1 = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    ids = torch.tensor([0, 1])
    log_scale = torch.tensor(math.log(100.0))

    loss = make_loss()
    for gamma in (1.0, 0.5, 0.2):
        for e2 in (-e1, e1):  # all wrong (g = e^200), then all right (g = e^-200)
            out = loss(e1, e2, log_scale, loss.lookup(ids), gamma=gamma, lr_tau=0.01)
            for field, value in out._asdict().items():
                if value is not None:
                    assert torch.isfinite(torch.as_tensor(value)).all(), (field, gamma, out)
    assert torch.isfinite(loss.state.table[:-1]).all()

    # Exponent 200: log g = 200 to all figures and P = 1, so that image 0 is pulled by
    # c (K/2B)(2 e2_1 - 2 e2_0) = c [1, 0].
    first = make_loss()
    out = first(e1, -e1, log_scale, first.lookup(ids), gamma=1.0)
    algorithm = ALGORITHMS[name]
    released_factor = equations == "release" and algorithm.loss in ("GCL", "RGCL")
    c = 100.0 if algorithm.c == "1/tau" or released_factor else 1.0
    torch.testing.assert_close(out.grad_image[0], torch.tensor([c, 0.0]), rtol=1e-4, atol=1e-6)


def image_gradient_of_two_pairs():
    """Of this rank's part of a global batch of two pairs."""
    loss = ContrastiveLoss("fastclip-v3", 4, "paper", RHO, 1e-14)
    e = F.normalize(torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    b = 2 // dist.world_size()
    part = slice(dist.rank() * b, (dist.rank() + 1) * b)
    lookup = loss.lookup(torch.arange(2))
    return loss(e[0, part], e[1, part], torch.tensor(4.6), lookup, gamma=1.0).grad_image


def test_a_local_batch_of_one():
    on_two_ranks = torch.cat(run_ranks(2, image_gradient_of_two_pairs)) / 2
    on_one_rank = image_gradient_of_two_pairs()
    torch.testing.assert_close(on_two_ranks, on_one_rank, rtol=1e-5, atol=1e-7)


def test_float32_follows_float64():
    (double,) = kernel_runs(1)
    single = run_cases(dtype=torch.float32)
    for case in CASES:
        for a, b in zip(double[case].outs, single[case].outs):
            torch.testing.assert_close(b.grad_image.double(), a.grad_image, rtol=2e-3, atol=2e-5)
            torch.testing.assert_close(b.objective.double(), a.objective, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tile", [0, 7])
def test_a_compiled_loss_computes_the_same(tile):
    torch._dynamo.reset()
    results = []
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    for compiled in (False, True):
        loss = ContrastiveLoss("fastclip-v2", N, "paper", RHO, EPS, tile=tile)
        if compiled:
            loss.compile(backend=backend)
        for step in range(2):
            e1, e2, ids = batch(step)
            log_scale = torch.tensor(3.0)
            out = loss(e1.float(), e2.float(), log_scale, loss.lookup(ids), 0.5, lr_tau=LR_TAU)
        results.append(out)

    torch.testing.assert_close(results[1], results[0])
    # Two for each width of a tile: with tile = 7, eight columns are 7 and 1.
    assert len(graphs) == (4 if tile else 2)


# Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,nearest",
    [("fastclip-v33", "fastclip-v3"), ("v2", "fastclip-v2"), ("OpenCLIP", "openclip")],
)
def test_an_unknown_algorithm_is_refused_with_the_nearest_name(name, nearest):
    message = f"unknown algorithm '{name}'; did you mean '{nearest}'"
    with pytest.raises(ConfigError, match=message):
        losses.get_algorithm(name)
    with pytest.raises(ConfigError, match=message):
        ContrastiveLoss(name, 10)


def test_an_unknown_algorithm_is_refused_with_all_names():
    with pytest.raises(ConfigError, match="unknown algorithm 'xyz'") as error:
        losses.get_algorithm("xyz")
    for name in ALGORITHMS:
        assert name in str(error.value)
        assert losses.get_algorithm(name) is ALGORITHMS[name]


@pytest.mark.parametrize("wrong", [10, -1])
def test_a_sample_id_out_of_range_is_named(wrong):
    loss = ContrastiveLoss("fastclip-v3", 10)
    with pytest.raises(ValueError, match=rf"sample id {wrong} is outside \[0, 10\)"):
        loss.lookup(torch.tensor([1, wrong]))


@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(algorithm="v9"), "unknown algorithm 'v9'"),
        (dict(tile=-1), "tile = -1 must not be negative"),
        (dict(equations="papers"), "equations = 'papers' must be 'paper' or 'release'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveLoss(**{"algorithm": "fastclip-v3", "num_samples": 10, **settings})


def test_a_global_batch_of_one_pair_is_refused():
    loss = ContrastiveLoss("fastclip-v3", 10)
    lookup = loss.lookup(torch.tensor([0]))
    with pytest.raises(ValueError, match="no negatives"):
        loss(torch.ones(1, 2), torch.ones(1, 2), torch.tensor(1.0), lookup)


def test_gamma_of_another_shape_is_refused():
    loss = ContrastiveLoss("fastclip-v3", 10)
    lookup = loss.lookup(torch.arange(2))
    with pytest.raises(ValueError, match=r"gamma has shape \(3,\); it must be .* shape \(2,\)"):
        loss(torch.ones(2, 2), torch.ones(2, 2), torch.tensor(1.0), lookup, torch.ones(3))
