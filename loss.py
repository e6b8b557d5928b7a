"""The seven algorithms: one kernel in log space, and the u-state.

Notation. A global batch holds B pairs on K ranks, b = B/K on each. e1, e2 are L2-normalised image and text features,
s_ij = e1_i . e2_j, and tau1_i, tau2_i the temperatures of image i and text i (equal, if the temperature is global).

Contrast of one anchor with the other samples, as a logarithm (nothing here overflows, even at tau = 0.01):

    log g1_i = logsumexp_{j != i} (s_ij - s_ii) / tau1_i - log(B-1)            image i against the texts
    log g2_i = logsumexp_{j != i} (s_ji - s_ii) / tau2_i - log(B-1)            text i against the images

A global contrastive loss wants g over the whole data set. Its estimate u_i is a moving average over the visits of sample i:

    u_i <- g_i on the first visit,    u_i <- (1 - gamma) u_i + gamma g_i afterwards                              (1)

    GCL     tau/N sum_i [log(eps + g1_i) + log(eps + g2_i)]                                 sogclr, fastclip-v1
    RGCL    1/N sum_i [tau1_i (log(eps + g1_i) + rho) + tau2_i (log(eps + g2_i) + rho)]     isogclr, fastclip-v2
    RGCL-g  tau/N sum_i [log(eps + g1_i) + log(eps + g2_i)] + 2 rho tau                     fastclip-v3
    (fastclip-v0 is GCL without its factor tau, which is then learned.)

Mini-batch contrastive loss (MBCL, openclip) is the same expression with the positive j = i kept in the sum, no
log(B-1), eps = 0 and gamma = 1: log g is then the cross-entropy of anchor i, and there is no state.

Gradient. With v = eps + u, the weights of the negatives and h, the derivative of log(eps + g) by tau at g = u, are

    P1_ij = exp((s_ij - s_ii) / tau1_i) / ((B-1) v1_i)          h1_i = - sum_j P1_ij (s_ij - s_ii) / tau1_i^2     (2)

and with W = c P, c from the table below, the gradient of *half* the objective (so that MBCL's is the usual one) is

    image i:  K/2B [ sum_j (W1_ij + W2_ji) e2_j - r_i e2_i ]          r_i = sum_j (W1_ij + W2_ij)                 (3)
    text j:   K/2B [ sum_i (W1_ij + W2_ji) e1_i - r_j e1_j ]

where the factor K makes the *mean* over ranks of the parameters' gradients the gradient of the global batch.

Communication. Rank k needs row block s_ij of its images against all texts, and of its texts against all images. In (3) its
features are negatives of remote anchors too, and for those it needs only their v, s_ii and tau: numbers, not vectors.
So a step gathers the features once, [b, 2d], and five numbers per sample; nothing of size B x d ever flows back.

Memory. The row blocks are b x B and gone through twice, `tile` columns at a time: for log g and the mean of s_ij - s_ii, added
up on the way (`contrast`), and, once v is known, for the sums over j in (3) (`weighted_sum`). A single tile is kept for the
second time; several are computed again, so that memory is O(b tile), for six matrix products in a step instead of four.
"""

import math
from typing import NamedTuple, Optional

import torch

import dist


class Algorithm(NamedTuple):
    loss: str  # which objective
    state: bool  # keeps u per sample; otherwise log g is used as it is
    tau: str  # "global" or "sample"
    learned: bool  # is tau?
    c: str  # factor of the weights W = c P: the objective's factor tau times the 1/tau of d(s/tau)/ds
    gamma: str  # its usual schedule


ALGORITHMS = {
    #                        loss      u      tau       learned  c        gamma
    "openclip": Algorithm("MBCL", False, "global", True, "1/tau", "constant"),
    "sogclr": Algorithm("GCL", True, "global", False, "1", "constant"),
    "isogclr": Algorithm("RGCL", True, "sample", True, "1", "constant"),
    "fastclip-v0": Algorithm("GCL/tau", True, "global", True, "1/tau", "cosine"),
    "fastclip-v1": Algorithm("GCL", True, "global", False, "1", "cosine"),
    "fastclip-v2": Algorithm("RGCL", True, "sample", True, "1", "cosine"),
    "fastclip-v3": Algorithm("RGCL-g", True, "global", True, "1", "cosine"),
}

TAU_MIN, TAU_MAX = 0.01, 1.0
TAU_REFERENCE = (
    0.07  # at which every algorithm also reports the in-batch MBCL, so that runs can be compared
)
EXCLUDED = -1e30  # the similarity put where j = i does not count: exp makes it 0, and 0 times it is 0 (not so for -inf)


class LossOutput(NamedTuple):
    grad_image: torch.Tensor  # [b, d]  d(objective)/d(local image features), see (3)
    grad_text: torch.Tensor  # [b, d]
    grad_logit_scale: Optional[
        torch.Tensor
    ]  # []      d(objective)/d(ln 1/tau), same on all ranks; None: not learned here
    objective: (
        torch.Tensor
    )  # []      the algorithm's own estimate of its objective over the global batch
    mbcl: torch.Tensor  # []      in-batch contrastive loss at TAU_REFERENCE
    tau: torch.Tensor  # []      temperature used in this step (per-sample: the batch's mean)
    finite: torch.Tensor  # [b]     bool: are this rank's samples' features finite?
    gamma: float = 1.0


class ContrastiveLoss:
    """One of the seven algorithms, with its state. Needs no model: features, ids and gamma go in, gradients come out.

        rows = loss.lookup(ids)                                    # asynchronous: call it before the towers run
        out = loss(image_features, text_features, logit_scale, rows, gamma)
        torch.autograd.backward((image_features, text_features), (out.grad_image, out.grad_text))

    equations: "paper" is the gradient of the objectives above. "release" is what the published code computes: the tau-part of
    the temperature gradient of v0 and v3 is doubled (kappa = 1, not 1/2); RGCL's weights lack the factor tau_i; v3 takes log u
    without eps; Adam for per-sample tau has beta = 0 in epoch 0 and corrects its bias by epoch, not by visits. (One thing is not
    reproduced: with per-sample tau that code adds eps to u / exp(m_i), m_i the largest exponent that sample i has ever met.)

    num_samples: N, ids run from 0 to N-1. dtype: of state and arithmetic, float32 (or float64 to check it). tile: columns of the
    b x B similarities that are in memory at a time; 0: all. Raises ValueError for an unknown algorithm or an id outside [0, N).
    """

    def __init__(
        self,
        algorithm,
        num_samples,
        equations="paper",
        rho=6.5,
        eps_u=1e-14,
        tau_init=0.03,
        device="cpu",
        dtype=torch.float32,
        tile=0,
    ):
        if algorithm not in ALGORITHMS:
            raise ValueError(f"unknown algorithm {algorithm!r}; there are {', '.join(ALGORITHMS)}")
        if equations not in ("paper", "release"):
            raise ValueError(f"equations = {equations!r} must be 'paper' or 'release'")
        if tile < 0:
            raise ValueError(f"tile = {tile} must not be negative")
        self.algorithm, self.release, self.rho, self.tile = (
            ALGORITHMS[algorithm],
            equations == "release",
            rho,
            tile,
        )
        self.log_eps = math.log(eps_u) if eps_u > 0 and self.algorithm.state else -math.inf
        columns = {"log_u1": -math.inf, "log_u2": -math.inf} if self.algorithm.state else {}
        if self.algorithm.tau == "sample":
            columns.update(tau1=tau_init, tau2=tau_init, m1=0.0, m2=0.0, v1=0.0, v2=0.0, visits=0.0)
        self.state = SampleState(num_samples, columns, device, dtype)

    def lookup(self, ids):
        """This rank's sample ids, int64 [b], on the CPU -> a Lookup of the global batch's rows, under way."""
        return self.state.lookup(ids)

    @torch.no_grad()
    def __call__(
        self, image_features, text_features, logit_scale, lookup, gamma=1.0, epoch=0, lr_tau=0.0
    ):
        """image_features, text_features: [b, d], L2-normalised, any float dtype. logit_scale: ln(1/tau), 0-dim; per-sample
        algorithms ignore it. gamma: inner learning rate in (0, 1]. epoch, lr_tau: for per-sample tau. -> LossOutput"""
        algorithm, dtype = self.algorithm, self.state.table.dtype
        b, B, K = len(image_features), len(image_features) * dist.world_size(), dist.world_size()
        if B < 2:
            raise ValueError("a global batch of one pair has no negatives")
        mine = slice(
            dist.rank() * b, (dist.rank() + 1) * b
        )  # this rank's anchors in the global batch
        has_positive = not algorithm.state  # MBCL keeps j = i in the sum
        log_n = 0.0 if has_positive else math.log(B - 1)

        # Features of the global batch.
        e1, e2 = image_features.detach().to(dtype), text_features.detach().to(dtype)  # (b, d)
        E1, E2 = dist.all_gather(torch.cat([e1, e2], 1), "features").chunk(2, 1)  # (B, d)
        width = self.tile or B
        tiles = [slice(j, min(j + width, B)) for j in range(0, B, width)]
        s = torch.cat([(E1[tile] * E2[tile]).sum(1) for tile in tiles])  # (B,) s_ii
        sim1 = Similarities(e1, E2, tiles, mine, has_positive)  # (b, B) my images
        sim2 = Similarities(e2, E1, tiles, mine, has_positive)  #        my texts

        # Rows of the global batch; their look-up has been under way since before the towers ran.
        rows = lookup.finish()  # column name -> (B,)
        if algorithm.tau == "sample":
            tau1, tau2 = rows["tau1"], rows["tau2"]
        else:
            tau1 = tau2 = torch.exp(-logit_scale.detach()).to(dtype).expand(B)

        # Contrast of my anchors; from here on every rank knows five numbers of every anchor, and that is enough.
        log_g1, gap1, mbcl1 = contrast(sim1, s[mine], tau1[mine], has_positive)
        log_g2, gap2, mbcl2 = contrast(sim2, s[mine], tau2[mine], has_positive)
        numbers = torch.stack(
            [log_g1 - log_n, log_g2 - log_n, gap1, gap2, (mbcl1 + mbcl2) / 2], 1
        )  # (b, 5)
        log_g1, log_g2, gap1, gap2, mbcl = dist.all_gather(numbers, "scalars").unbind(
            1
        )  # (B,) each

        # The moving average (1), and v = eps + u.
        log_u1 = moving_average(rows["log_u1"], log_g1, gamma) if algorithm.state else log_g1
        log_u2 = moving_average(rows["log_u2"], log_g2, gamma) if algorithm.state else log_g2
        log_v1, log_v2 = log_add(log_u1, self.log_eps), log_add(log_u2, self.log_eps)

        # Feature gradients (3). W_ij = exp(s_ij / tau_i - z_i), of which every rank now knows tau and z of every anchor i.
        c1, c2 = self.weight_factor(tau1), self.weight_factor(tau2)
        z1, z2 = s / tau1 + log_v1 + log_n - c1.log(), s / tau2 + log_v2 + log_n - c2.log()  # (B,)
        ratio1, ratio2 = torch.exp(log_g1 - log_v1), torch.exp(log_g2 - log_v2)  # sum_j P_ij = g/v
        r = (c1 * ratio1 + c2 * ratio2)[mine, None]
        grad_image = (weighted_sum(sim1, tau1[mine], z1[mine], tau2, z2) - r * e2) * (K / (2 * B))
        grad_text = (weighted_sum(sim2, tau2[mine], z2[mine], tau1, z1) - r * e1) * (K / (2 * B))

        # Temperature, and what the state remembers.
        h1, h2 = -ratio1 * gap1 / tau1**2, -ratio2 * gap2 / tau2**2  # (2), (B,)
        grad_logit_scale, new = None, dict(rows, log_u1=log_u1, log_u2=log_u2)
        if algorithm.tau == "sample":
            self.update_sample_tau(
                new, log_v1 + self.rho + tau1 * h1, log_v2 + self.rho + tau2 * h2, epoch, lr_tau
            )
        elif algorithm.learned:
            kappa = 1.0 if self.release and algorithm.state else 0.5
            grad_tau = kappa * (h1 + h2).mean()
            if algorithm.loss == "RGCL-g":
                log1, log2 = (log_u1, log_u2) if self.release else (log_v1, log_v2)
                grad_tau = (log1 + log2).mean() / 2 + self.rho + tau1[0] * grad_tau
            grad_logit_scale = (-tau1[0] * grad_tau).to(
                logit_scale.dtype
            )  # d tau / d ln(1/tau) = -tau
        if algorithm.state:
            self.state.store(lookup, new)

        return LossOutput(
            grad_image.to(image_features.dtype),
            grad_text.to(text_features.dtype),
            grad_logit_scale,
            self.objective(log_v1, log_v2, tau1, tau2),
            mbcl.mean(),
            (tau1 + tau2).mean() / 2,
            torch.isfinite(s[mine]),
            gamma,
        )

    def weight_factor(self, tau):
        """c of the table, (B,)."""
        inverse = self.algorithm.c == "1/tau" or (self.release and self.algorithm.loss == "RGCL")
        return 1 / tau if inverse else torch.ones_like(tau)

    def objective(self, log_v1, log_v2, tau1, tau2):
        """The objective of the table over the global batch, with the moving average in place of g."""
        if self.algorithm.loss == "MBCL":
            return (log_v1 + log_v2).mean() / 2
        if self.algorithm.loss == "GCL/tau":
            return (log_v1 + log_v2).mean()
        rho = 0.0 if self.algorithm.loss == "GCL" else self.rho
        return (tau1 * (log_v1 + rho) + tau2 * (log_v2 + rho)).mean()

    def update_sample_tau(self, rows, grad1, grad2, epoch, lr_tau):
        """One Adam step on tau1 and tau2 of the batch's samples, on their gradients clamped to +-5; rows are changed."""
        visits = rows["visits"] = rows["visits"] + 1
        beta1, beta2, t = 0.9, 0.999, visits
        if self.release:
            beta1, beta2, t = (
                (0.0, 0.0, visits)
                if epoch < 1
                else (0.9, 0.999, torch.full_like(visits, int(epoch) + 1))
            )
        for side, grad in (("1", grad1), ("2", grad2)):
            grad = grad.clamp(-5, 5)
            m = rows["m" + side] = beta1 * rows["m" + side] + (1 - beta1) * grad
            v = rows["v" + side] = beta2 * rows["v" + side] + (1 - beta2) * grad**2
            step = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + 1e-8)
            rows["tau" + side] = (rows["tau" + side] - lr_tau * step).clamp(TAU_MIN, TAU_MAX)


class Similarities:
    """s_ij of my b anchors with all B candidates, as blocks (columns, [b, tile]), to be gone through as often as one likes."""

    def __init__(self, e, E, tiles, mine, has_positive):
        self.e, self.E, self.tiles, self.mine, self.has_positive = e, E, tiles, mine, has_positive
        self.kept = self.block(tiles[0]) if len(tiles) == 1 else None

    def __iter__(self):
        for columns in self.tiles:
            yield columns, self.kept if self.kept is not None else self.block(columns)

    def block(self, columns):
        sim = self.e @ self.E[columns].T
        if not self.has_positive:  # my anchor i is column mine.start + i
            sim.diagonal(self.mine.start - columns.start).fill_(
                EXCLUDED
            )  # as far as it lies in these columns
        return sim


def contrast(sim, s, tau, has_positive):
    """My anchors, with s = s_ii and tau [b] -> logsumexp_j (s_ij - s_ii)/tau, mean_j (s_ij - s_ii) under its softmax, and the
    same logsumexp with j = i at TAU_REFERENCE, each [b].

    With w_ij = exp((s_ij - top_i) / tau_i), top_i the largest s_ij so far, the sums of w_ij and w_ij s_ij shrink as top rises.
    """
    top, total, weighted, reference = s.new_full(s.shape, -math.inf), 0.0, 0.0, 0.0
    for _, block in sim:
        reference = reference + (block / TAU_REFERENCE).exp_().sum(1)  # its exponents stay below 15
        before, top = top, torch.maximum(top, block.amax(1))
        shrink = torch.exp((before - top) / tau)
        w = (block - top[:, None]).div_(tau[:, None]).exp_()  # (b, tile)
        total = total * shrink + w.sum(1)
        weighted = weighted * shrink + w.mul_(block).sum(1)
    if not has_positive:
        reference = reference + torch.exp(s / TAU_REFERENCE)
    return total.log() + (top - s) / tau, weighted / total - s, reference.log() - s / TAU_REFERENCE


def weighted_sum(sim, tau, z, tau_of, z_of):
    """sum_j (W_ij + W_ji) e_j [b, d]: W_ij with my anchors (tau, z [b]), W_ji with the candidates as anchors (tau_of, z_of [B])."""
    out = torch.zeros_like(sim.e)
    for columns, block in sim:
        W = (block / tau[:, None]).sub_(z[:, None]).exp_()  # (b, tile)
        W += (block / tau_of[columns]).sub_(z_of[columns]).exp_()
        out.addmm_(W, sim.E[columns])
    return out


def moving_average(log_u, log_g, gamma):
    """Equation (1) for logarithms; log_u = -inf marks a sample that has not been visited."""
    keep = math.log(1 - gamma) if gamma < 1 else -math.inf
    return torch.where(
        log_u == -math.inf, log_g, torch.logaddexp(log_u + keep, log_g + math.log(gamma))
    )


def log_add(log_x, log_y):
    """log(x + y) for a tensor log_x and a number log_y."""
    return torch.logaddexp(log_x, torch.full_like(log_x, log_y))


class SampleState:
    """Numbers kept per sample, sharded: id i lives on rank i mod K, in row i // K.

    The ids of a step are known before its forward pass, so their look-up is launched then and finished after the towers:
    each rank fills the rows that it owns into zeros and one all-reduce (a sum) gives the global batch to everyone. Writing
    needs no communication, because by then every rank knows every new row; each keeps its own. Memory: N x columns x
    4 bytes / K. If an id stands in a global batch twice, both read the same old row and the last one's new row is kept.
    """

    def __init__(self, num_samples, columns, device="cpu", dtype=torch.float32):
        """columns: name -> initial value; none, and the state is empty."""
        self.num_samples, self.columns = num_samples, list(columns)
        self.rows = -(-num_samples // dist.world_size())
        # One more row, never read, is where rows that another rank owns are "written": no branch, no synchronisation.
        initial = torch.tensor(list(columns.values()), dtype=dtype, device=device)
        self.table = initial.repeat(self.rows + 1, 1)  # (rows + 1, columns)

    def lookup(self, ids):
        """Launch: ids int64 [b] of this rank, in [0, N) -> Lookup. ids on the CPU are checked, on a GPU they are trusted."""
        if (
            ids.device.type == "cpu"
            and len(ids)
            and not (0 <= ids.min() and ids.max() < self.num_samples)
        ):
            wrong = ids[(ids < 0) | (ids >= self.num_samples)][0].item()
            raise ValueError(
                f"sample id {wrong} is outside [0, {self.num_samples}), the samples this state was made for"
            )
        if not self.columns:
            return Lookup(self.columns, None, None, dist.NoWork())
        ids = dist.all_gather(ids.to(self.table.device, non_blocking=True), "ids")  # (B,)
        rows = torch.where(
            self.owned(ids)[:, None], self.table[ids // dist.world_size()], 0
        )  # (B, columns)
        return Lookup(self.columns, ids, rows, dist.all_reduce(rows, "state"))

    def store(self, lookup, new):
        """The batch's look-up, finished, and its new columns, {name: [B]}: keep the rows that this rank owns. A row with anything
        non-finite in it is not taken: one bad step must not spoil what a sample has gathered in a hundred epochs."""
        ids, new = lookup.ids, torch.stack([new[name] for name in self.columns], 1)  # (B, columns)
        new = torch.where(torch.isfinite(new).all(1, keepdim=True), new, lookup.rows)
        order = torch.sort(ids, stable=True)
        last = torch.ones_like(ids, dtype=torch.bool)
        last[order.indices[:-1]] = order.values[:-1] != order.values[1:]  # the last of equal ids
        slot = torch.where(self.owned(ids) & last, ids // dist.world_size(), self.rows)
        self.table[slot] = new

    def owned(self, ids):
        return ids % dist.world_size() == dist.rank()


class Lookup:
    """A look-up under way: `ids` [B] of the global batch, and after finish() its rows."""

    def __init__(self, columns, ids, rows, work):
        self.columns, self.ids, self.rows, self.work = columns, ids, rows, work

    def finish(self):
        """-> {column name: [B]}"""
        self.work.wait()
        return dict(zip(self.columns, self.rows.unbind(1))) if self.columns else {}


def get_algorithm(name):
    return ALGORITHMS[name]
