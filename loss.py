"""The contrastive losses for CLIP of FastCLIP (arXiv 2407.01445) and its kin, in three chapters.

1. Definition: `loss_by_definition`, the losses as they are written on paper, on one process,
   differentiated by autograd.
2. Kernel: `ContrastiveLoss`, the same losses in log space on K ranks, in five stages of plain
   PyTorch, with the gradients written out. This is what training uses.
3. State: `SampleState`, the numbers that are kept per sample, sharded over the ranks.

Notation (1 stands for the image side, 2 for the text side)

    K, B, b         ranks; pairs in the global batch; pairs on each rank, b = B/K
    e1_i, e2_i      L2-normalised features of image i and of text i
    s_ij            similarity e1_i . e2_j
    tau1_i, tau2_i  temperatures of image i and of text i; all equal if the temperature is global
    g1_i            mean over j != i of exp((s_ij - s_ii) / tau1_i): image i against the texts
    g2_i            mean over j != i of exp((s_ji - s_ii) / tau2_i): text i against the images
    u1_i, u2_i      moving averages of g1_i and g2_i over the visits of sample i
    v               eps + u
    gamma           weight of the new g in the moving average, in (0, 1]
    P_ij            weight of negative j of anchor i, equation (2); W = c P
    gap_i           mean of s_ij - s_ii over the negatives, with weights proportional to P_ij

An anchor is an image or a text, and its candidates are all texts or all images. In functions that
serve both sides, s_ij is anchor i with candidate j: for text anchors that is s_ji above.

Objectives over N pairs, with g over the whole data set (the table ALGORITHMS says who has which)

    GCL      1/N sum_i tau [log(eps + g1_i) + log(eps + g2_i)]
    GCL/tau  1/N sum_i     [log(eps + g1_i) + log(eps + g2_i)]
    RGCL     1/N sum_i [tau1_i (log(eps + g1_i) + rho) + tau2_i (log(eps + g2_i) + rho)]
    RGCL-g   RGCL with one temperature tau for all samples
    MBCL     CLIP's mini-batch loss: the cross-entropy of each anchor with its batch

All algorithms have MBCL's scale: the training loss is half the objective (of MBCL, all of it).

Equations: (1) log_u_with_gradient and moving_average, (2) and (3) feature_gradients,
(4) global_tau_gradient, (5) step_sample_tau.
"""

import contextlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

import dist
from config import ConfigError, nearest

# Every temperature is kept in this range.
TAU_MIN = 0.01
TAU_MAX = 1.0

# Every algorithm also reports the in-batch MBCL at this temperature, so that runs can be compared.
TAU_REFERENCE = 0.07


class Algorithm(NamedTuple):
    """A row of ALGORITHMS."""

    loss: str  # its objective, see the top of this file
    state: bool  # does it keep u per sample? Otherwise this batch's g takes the place of u.
    tau: str  # "global" or "sample"
    learned: bool  # is tau learned?
    c: str  # factor of (2): d(s/tau)/ds = 1/tau, times the objective's factor tau if it has one
    gamma: str  # usual schedule of gamma, "constant" or "cosine"; unused without state
    lr_tau: str  # usual schedule of tau's learning rate: "constant", "cosine" or "threshold"


# The only list of the algorithms: a new row is a new value of `algorithm` in the config. What a row
# cannot say goes into ContrastiveLoss (the five stages), and into the definitions that the tests
# compare it with: log_u_with_gradient below, Loops in tests/test_loss.py.
# fmt: off
ALGORITHMS = {
    #                        loss       state  tau       learned  c        gamma       lr_tau
    "openclip":    Algorithm("MBCL",    False, "global", True,    "1/tau", "constant", "cosine"),
    "sogclr":      Algorithm("GCL",     True,  "global", False,   "1",     "constant", "cosine"),
    "isogclr":     Algorithm("RGCL",    True,  "sample", True,    "1",     "constant", "constant"),
    "fastclip-v0": Algorithm("GCL/tau", True,  "global", True,    "1/tau", "cosine",   "cosine"),
    "fastclip-v1": Algorithm("GCL",     True,  "global", False,   "1",     "cosine",   "cosine"),
    "fastclip-v2": Algorithm("RGCL",    True,  "sample", True,    "1",     "cosine",   "constant"),
    "fastclip-v3": Algorithm("RGCL-g",  True,  "global", True,    "1",     "cosine",   "threshold"),
}
# fmt: on


class Departure(NamedTuple):
    """A row of DEPARTURES."""

    losses: tuple  # the losses that it concerns
    paper: str  # what equations = "paper" computes
    release: str  # what equations = "release" computes


# equations = "paper" is the gradient of the objectives above. equations = "release" is what the
# published code computes when it is run by its published commands; the paper's results were made
# with it. These are all the differences:
#
#   factor c      the released feature gradient lacks the objective's factor tau
#   kappa         the released gradient of a global tau counts d g / d tau twice
#   log u         the released gradient of v3's tau has no eps in the logarithm
#   first epoch   the released Adam of per-sample tau has no memory in epoch 0
#   bias          it corrects its bias by the epoch, not by the visits of the sample
# fmt: off
DEPARTURES = {
    # where                  losses                 paper                      release
    "factor c":    Departure(("GCL", "RGCL"),       "c = 1 in (2)",            "c = 1/tau"),
    "kappa":       Departure(("GCL/tau", "RGCL-g"), "kappa = 1/2 in (4)",      "kappa = 1"),
    "log u":       Departure(("RGCL-g",),           "log(eps + u) in (4)",     "log u"),
    "first epoch": Departure(("RGCL",),             "Adam's betas 0.9, 0.999", "0, 0 in epoch 0"),
    "bias":        Departure(("RGCL",),             "Adam corrects by visits", "by epoch + 1"),
}
# fmt: on
# One thing is not reproduced: with per-sample tau the published code adds eps to u / exp(m_i),
# where m_i is the largest exponent that sample i has met so far.


def get_algorithm(name):
    """The row of ALGORITHMS called `name`. ConfigError with the nearest name if there is none."""
    if name in ALGORITHMS:
        return ALGORITHMS[name]

    hint = nearest(str(name), ALGORITHMS, cutoff=0.3)
    names = ", ".join(ALGORITHMS)
    raise ConfigError(f"unknown algorithm {name!r}{hint} (loss.py has {names})")


# ------------------------------------------------------------------------------------------------
# 1. Definition
# ------------------------------------------------------------------------------------------------


def loss_by_definition(name, e1, e2, tau1, tau2, u1, u2, gamma, rho=6.5, eps=1e-14):
    """The loss of algorithm `name` on one batch, for autograd -> (loss, new u1, new u2).

    An objective contains log(eps + g), where g is a mean over the whole data set. A batch gives an
    estimate of g, from its B-1 negatives, and the logarithm of a poor estimate is biased. So each
    sample keeps a moving average u of its g. The loss returned here is the objective and the
    estimator of its gradient at once:

        its value     has log(eps + u)       in place of log(eps + g)
        its gradient  has (d g) / (eps + u)  in place of (d g) / (eps + g), d g of this batch

    With gamma = 1, u is g, and the gradient is that of the objective on this batch.

    e1, e2: (B, d) image and text features, L2-normalised.
    tau1, tau2: tensors () or (B,). Pass the same tensor twice for a global temperature.
    u1, u2: (B,) moving averages of these samples, nan for those that were never visited (openclip
    returns them unchanged).
    gamma: a number or (B,), in (0, 1].
    loss: (), half the objective (for openclip: the objective), so that all have MBCL's scale.
    The returned u1, u2 are to be kept until these samples are visited again.

        loss, u1[ids], u2[ids] = loss_by_definition(name, e1, e2, tau, tau, u1[ids], u2[ids], 0.9)
        loss.backward()

    These are the paper's equations. The exponentials overflow where (s_ij - s_ii) / tau exceeds 88
    (float32) or 709 (float64): one reason for the kernel below, which works with logarithms.
    """
    objective = get_algorithm(name).loss
    s = e1 @ e2.T  # (B, B), images in rows
    tau1 = tau1.expand(len(s))
    tau2 = tau2.expand(len(s))

    if objective == "MBCL":
        positives = torch.arange(len(s), device=s.device)
        image_loss = F.cross_entropy(s / tau1[:, None], positives)
        text_loss = F.cross_entropy(s.T / tau2[:, None], positives)
        return (image_loss + text_loss) / 2, u1, u2

    log1, u1 = log_u_with_gradient(s, tau1, u1, gamma, eps)  # image anchors, (B,)
    log2, u2 = log_u_with_gradient(s.T, tau2, u2, gamma, eps)  # text anchors, (B,)

    if objective == "GCL":
        pairs = tau1 * log1 + tau2 * log2
    elif objective == "GCL/tau":
        pairs = log1 + log2
    else:  # RGCL; RGCL-g if all temperatures are equal
        pairs = tau1 * (log1 + rho) + tau2 * (log2 + rho)
    return pairs.mean() / 2, u1, u2


def log_u_with_gradient(s, tau, u, gamma, eps):
    """log(eps + u) of B anchors, with the gradient of its estimator -> ((B,), new u (B,)).

    s: (B, B), anchors in rows and their positives on the diagonal. tau, u: (B,), u nan if new.

        g_i  =  1/(B-1) sum_{j != i} exp((s_ij - s_ii) / tau_i)
        u_i <-  g_i on the first visit,  (1 - gamma) u_i + gamma g_i afterwards               (1)
    """
    gaps = s - s.diagonal()[:, None]  # (B, B)
    p = torch.exp(gaps / tau[:, None])
    g = (p.sum(1) - p.diagonal()) / (len(s) - 1)  # (B,), differentiable

    later = (1 - gamma) * u + gamma * g
    u = torch.where(u.isnan(), g, later).detach()  # (1)

    value = torch.log(eps + u)  # the moving average, constant for autograd
    slope = (g - g.detach()) / (eps + u)  # zero; its gradient is this batch's (d g) / (eps + u)
    return value + slope, u


# ------------------------------------------------------------------------------------------------
# 2. Kernel
# ------------------------------------------------------------------------------------------------


class LossOutput(NamedTuple):
    """What one call of ContrastiveLoss gives back, for a rank's b pairs of the global batch."""

    # (b, d), gradients of the training loss with respect to this rank's features, see (3)
    grad_image: torch.Tensor
    grad_text: torch.Tensor
    # (), gradient with respect to ln(1/tau), equal on all ranks; None if no global tau is learned
    grad_logit_scale: torch.Tensor | None
    # (), the objective over the global batch, with u in place of g
    objective: torch.Tensor
    # (), in-batch contrastive loss at TAU_REFERENCE
    mbcl: torch.Tensor
    # (), temperature that this step used (per-sample: the batch's mean)
    tau: torch.Tensor
    # (b,) bool, are the features of this rank's samples finite?
    finite: torch.Tensor
    # a number or (), mean weight of the new g in (1) that this step used; 1 without state
    gamma: float | torch.Tensor


class Anchors(NamedTuple):
    """What every rank knows of all B anchors of one side, (B,) each, once u is updated."""

    tau: torch.Tensor
    log_u: torch.Tensor
    log_v: torch.Tensor  # v = eps + u
    ratio: torch.Tensor  # g_i / v_i = sum_j P_ij
    gap: torch.Tensor  # mean over j of s_ij - s_ii, with weights proportional to exp(s_ij / tau_i)


class ContrastiveLoss:
    """One of the algorithms, with its state. It needs no model: features, sample ids and
    gamma go in, gradients come out.

        lookup = loss.lookup(global_ids)    # asynchronous: call it before the towers run
        out = loss(image_features, text_features, logit_scale, lookup, gamma)
        torch.autograd.backward((image_features, text_features), (out.grad_image, out.grad_text))

    algorithm: a name of ALGORITHMS. equations: "paper" or "release", see DEPARTURES.
    num_samples: N; sample ids run from 0 to N-1. rho, eps_u: constants of the objectives.
    tau_init: initial per-sample temperature. dtype: of the state and of the arithmetic, float32
    (or float64, to check it). tile: columns of the (b, B) similarities that are in memory at a
    time; 0: all of them, see Similarities. tf32: whether a GPU may round what it multiplies to
    TF32, see products_in_tf32.

    Raises ConfigError for an unknown algorithm, ValueError for other bad arguments.
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
        tf32=False,
    ):
        self.algorithm = get_algorithm(algorithm)
        if equations not in ("paper", "release"):
            raise ValueError(f"equations = {equations!r} must be 'paper' or 'release'")
        if tile < 0:
            raise ValueError(f"tile = {tile} must not be negative")
        self.release = equations == "release"
        self.rho = rho
        self.tile = tile
        self.precision_of_products = products_in_tf32 if tf32 else contextlib.nullcontext

        # MBCL is the general expression with the positive j = i kept among the candidates, a sum
        # over them instead of a mean, eps = 0 and u = g: log g is then anchor i's cross-entropy.
        self.has_positive = self.algorithm.loss == "MBCL"
        no_eps = self.has_positive or eps_u == 0
        self.log_eps = -math.inf if no_eps else math.log(eps_u)

        columns = state_columns(self.algorithm, tau_init)
        self.state = SampleState(num_samples, columns, device, dtype)

        # What is computed of each number of the (b, B) similarities.
        self.add_block = add_block
        self.weights_of_block = weights_of_block

    def compile(self, **options):
        """Apply torch.compile, with `options`, to what goes through the (b, B) similarities.

        Then each is read a few times, not once for every operation.
        """
        self.add_block = torch.compile(add_block, dynamic=False, **options)
        self.weights_of_block = torch.compile(weights_of_block, dynamic=False, **options)

    def lookup(self, ids):
        """Start to fetch the state of the global batch -> Lookup, for __call__.

        ids: int64 (B,), the sample ids of the global batch, in rank order. Ids on the CPU are
        checked: ValueError if one lies outside [0, N). Without state, they are not looked at.
        """
        return self.state.lookup(ids)

    @torch.no_grad()
    def __call__(
        self, image_features, text_features, logit_scale, lookup, gamma=1.0, epoch=0, lr_tau=0.0
    ):
        """One step of the algorithm on the global batch -> LossOutput. The state is updated.

        image_features, text_features: (b, d), L2-normalised, any float dtype.
        logit_scale: (), ln(1/tau); algorithms with per-sample tau ignore it.
        lookup: from self.lookup(ids) with the ids of these samples and of the other ranks'.
        gamma: weight of the new g in (1), in (0, 1]. A number, or a tensor (B,) with a gamma for
        each sample of the *global* batch in rank order, because every rank updates all B rows.
        epoch, lr_tau: epoch (from 0) and learning rate, used for per-sample tau only.

        Raises ValueError if the global batch holds a single pair, or gamma has another shape.
        """
        B = len(image_features) * dist.world_size()
        if B < 2:
            raise ValueError("a global batch of one pair has no negatives")
        if torch.is_tensor(gamma) and gamma.shape not in ((), (B,)):
            raise ValueError(
                f"gamma has shape {tuple(gamma.shape)}; it must be a number or a tensor of shape "
                f"({B},), one for each sample of the global batch"
            )

        with self.precision_of_products():
            return self.five_stages(
                image_features, text_features, logit_scale, lookup, gamma, epoch, lr_tau
            )

    def five_stages(self, image_features, text_features, logit_scale, lookup, gamma, epoch, lr_tau):
        """What __call__ does, once its arguments are checked."""
        # 1. Gather the features of the global batch, and its rows of the state.
        image_sims, text_sims, s = self.gather(image_features, text_features)
        rows = lookup.finish()  # column name -> (B,)
        tau1, tau2 = self.temperatures(rows, logit_scale, len(s))  # (B,)

        # 2. Contrast every anchor with its negatives: log g, (B,).
        log_g1, log_g2, gap1, gap2, mbcl = self.contrast(image_sims, text_sims, s, tau1, tau2)

        # 3. Moving average: log u. With it, all is known of the anchors of both sides.
        log_u1, gamma1 = self.average(rows.get("log_u1"), log_g1, gamma)  # (B,), ()
        log_u2, gamma2 = self.average(rows.get("log_u2"), log_g2, gamma)
        anchors1 = self.describe_anchors(tau1, log_u1, log_g1, gap1)
        anchors2 = self.describe_anchors(tau2, log_u2, log_g2, gap2)

        # 4. Feature gradients.
        grad_image, grad_text = self.feature_gradients(image_sims, text_sims, s, anchors1, anchors2)

        # 5. Temperature: the gradient of a global one, the next value of per-sample ones.
        grad_logit_scale = None
        new_rows = {**rows, "log_u1": log_u1, "log_u2": log_u2}
        if self.algorithm.tau == "sample":
            new_rows.update(self.step_sample_tau(rows, anchors1, anchors2, epoch, lr_tau))
        elif self.algorithm.learned:
            grad_logit_scale = self.global_tau_gradient(anchors1, anchors2).to(logit_scale.dtype)

        if self.algorithm.state:
            self.state.store(lookup, new_rows)
        return LossOutput(
            grad_image=grad_image.to(image_features.dtype),
            grad_text=grad_text.to(text_features.dtype),
            grad_logit_scale=grad_logit_scale,
            objective=self.objective(anchors1, anchors2),
            mbcl=mbcl.mean(),
            tau=(tau1 + tau2).mean() / 2,
            # s_ii is not finite if a number of e1_i or e2_i is not.
            finite=torch.isfinite(s[image_sims.local]),
            gamma=(gamma1 + gamma2) / 2,
        )

    # Stage 1

    def gather(self, image_features, text_features):
        """Stage 1: send this rank's features, (b, 2d), to all ranks.

        A rank needs the similarities of its images with all texts and of its texts with all
        images. Its features are also negatives of remote anchors, but the gradient (3) needs only
        tau, s_ii and v of those: numbers, which stage 2 gathers. So the features travel once, and
        nothing of size B x d ever travels back.

        -> similarities of this rank's images with all texts, those of its texts with all images
        (Similarities, b x B), and s_ii of all pairs (B,).
        """
        dtype = self.state.table.dtype
        e1 = image_features.detach().to(dtype)  # (b, d)
        e2 = text_features.detach().to(dtype)  # (b, d)
        E = dist.all_gather(torch.cat([e1, e2], 1), "features")  # (B, 2d)
        E1, E2 = E.chunk(2, 1)  # (B, d)

        tiles = self.tiles(len(E))
        s = torch.cat([(E1[tile] * E2[tile]).sum(1) for tile in tiles])  # (B,)
        image_sims = Similarities(e1, E2, tiles, self.has_positive)
        text_sims = Similarities(e2, E1, tiles, self.has_positive)
        return image_sims, text_sims, s

    def tiles(self, B):
        """The columns that are in memory at a time -> list of slices that cover range(B)."""
        width = self.tile or B
        return [slice(start, min(start + width, B)) for start in range(0, B, width)]

    def temperatures(self, rows, logit_scale, B):
        """tau1, tau2 of the global batch, (B,) each: from its rows, or the global temperature."""
        if self.algorithm.tau == "sample":
            return rows["tau1"], rows["tau2"]
        tau = torch.exp(-logit_scale.detach()).to(self.state.table.dtype)  # ()
        return tau.expand(B), tau.expand(B)

    # Stage 2

    def contrast(self, image_sims, text_sims, s, tau1, tau2):
        """Stage 2: contrast of every anchor with its negatives, in logarithms, without overflow.

            log g1_i = logsumexp_{j != i} (s_ij - s_ii) / tau1_i - log(B-1)     images
            log g2_i = logsumexp_{j != i} (s_ji - s_ii) / tau2_i - log(B-1)     texts

        (MBCL: j = i is in the sum, and there is no log(B-1).) Each rank computes this for its own
        anchors, then gathers five numbers per sample.

        -> log_g1, log_g2, gap1, gap2 (see Anchors) and the in-batch MBCL at TAU_REFERENCE, (B,).
        """
        local = image_sims.local
        log_n = self.log_n(len(s))
        log_g1, gap1, mbcl1 = self.contrast_local_anchors(image_sims, s[local], tau1[local])  # (b,)
        log_g2, gap2, mbcl2 = self.contrast_local_anchors(text_sims, s[local], tau2[local])  # (b,)

        log_g1 = log_g1 - log_n  # of the sum -> of the mean
        log_g2 = log_g2 - log_n
        mbcl = (mbcl1 + mbcl2) / 2
        numbers = torch.stack([log_g1, log_g2, gap1, gap2, mbcl], 1)  # (b, 5)
        numbers = dist.all_gather(numbers, "scalars")  # (B, 5)
        return numbers.unbind(1)

    def contrast_local_anchors(self, similarities, s, tau):
        """Three sums over the candidates of this rank's anchors, in one pass over the tiles.

        s, tau: (b,), s_ii and the temperatures of the anchors. -> three tensors (b,):

            logsumexp_j (s_ij - s_ii) / tau_i
            gap: the mean of s_ij - s_ii with weights proportional to exp(s_ij / tau_i)
            logsumexp_j (s_ij - s_ii) / TAU_REFERENCE, with j = i

        Overflow is avoided as in every online softmax: w_ij = exp((s_ij - top_i) / tau_i), where
        top_i is the largest s_ij so far; when top rises, the sums made so far shrink accordingly.
        """
        top = torch.full_like(s, -math.inf)
        total = torch.zeros_like(s)  # sum_j w_ij
        weighted = torch.zeros_like(s)  # sum_j w_ij s_ij
        reference = torch.zeros_like(s)  # sum_j exp(s_ij / TAU_REFERENCE), no exponent above 14.3
        for _, block in similarities:
            sums = (top, total, weighted, reference)
            top, total, weighted, reference = self.add_block(sums, block, tau)

        if not similarities.has_positive:
            reference = reference + torch.exp(s / TAU_REFERENCE)
        log_sum = total.log() + (top - s) / tau
        gap = weighted / total - s
        mbcl = reference.log() - s / TAU_REFERENCE
        return log_sum, gap, mbcl

    def log_n(self, B):
        """Logarithm of the number of negatives in the mean g; 0 for MBCL, which is a sum."""
        return 0.0 if self.has_positive else math.log(B - 1)

    # Stage 3

    def average(self, log_u, log_g, gamma):
        """Stage 3: equation (1) for one side -> (log u (B,) after this visit, mean gamma ()).

        log_u: (B,) before this visit, -inf for a first one (None without state). log_g: (B,).
        gamma: as in __call__. An algorithm whose gamma is a function of u or g per sample computes
        it here; it may call log_moving_average if it knows gamma as a logarithm, and returns the
        mean gamma that it used, for the log.
        """
        if not self.algorithm.state:
            return log_g, 1.0
        mean_gamma = gamma.mean() if torch.is_tensor(gamma) else gamma
        return moving_average(log_u, log_g, gamma), mean_gamma

    def describe_anchors(self, tau, log_u, log_g, gap):
        """What stages 4 and 5 need of one side -> Anchors."""
        log_v = log_add(log_u, self.log_eps)
        ratio = torch.exp(log_g - log_v)
        return Anchors(tau, log_u, log_v, ratio, gap)

    # Stage 4

    def feature_gradients(self, image_sims, text_sims, s, anchors1, anchors2):
        """Stage 4: gradients of the training loss w.r.t. this rank's features, (b, d) each.

        With the weights of the negatives, for j != i (MBCL: for all j, without B-1, with v = g),

            P1_ij = exp((s_ij - s_ii) / tau1_i) / ((B-1) v1_i)
            P2_ij = exp((s_ji - s_ii) / tau2_i) / ((B-1) v2_i)       W = c P                 (2)

        and r_i = sum_j (W1_ij + W2_ij), the gradients are

            image i:  K/(2B) [ sum_j (W1_ij + W2_ji) e2_j - r_i e2_i ]
            text j:   K/(2B) [ sum_i (W1_ij + W2_ji) e1_i - r_j e1_j ]                       (3)

        The factor K makes the *mean* over the ranks of the parameters' gradients the gradient of
        the global batch.
        """
        local = image_sims.local
        tau1 = anchors1.tau
        tau2 = anchors2.tau
        c1 = self.feature_factor(tau1)  # (B,)
        c2 = self.feature_factor(tau2)

        # (2) in the form W_ij = exp(s_ij / tau_i - z_i): for W of a remote anchor, a rank needs
        # only its tau and z.
        log_n = self.log_n(len(s))
        z1 = s / tau1 + anchors1.log_v + log_n - c1.log()  # (B,)
        z2 = s / tau2 + anchors2.log_v + log_n - c2.log()
        r = c1 * anchors1.ratio + c2 * anchors2.ratio  # (B,)
        r = r[local, None]  # (b, 1)

        scale = dist.world_size() / (2 * len(s))
        image_sum = self.weighted_sum(image_sims, tau1[local], z1[local], tau2, z2)  # (b, d)
        text_sum = self.weighted_sum(text_sims, tau2[local], z2[local], tau1, z1)  # (b, d)
        e1 = image_sims.features  # (b, d)
        e2 = text_sims.features  # (b, d)
        grad_image = (image_sum - r * e2) * scale  # (3)
        grad_text = (text_sum - r * e1) * scale  # (3)
        return grad_image, grad_text

    def weighted_sum(self, similarities, tau, z, tau_candidates, z_candidates):
        """sum_j (W_ij + W'_ji) e_j of (3) for this rank's anchors, (b, d), one pass over the tiles.

        W_ij  = exp(s_ij / tau_i - z_i)     anchor i, here, against candidate j; tau, z: (b,)
        W'_ji = exp(s_ij / tau_j - z_j)     candidate j as an anchor of the other side, against
                                            sample i; tau_candidates, z_candidates: (B,)
        """
        out = torch.zeros_like(similarities.features)
        for columns, block in similarities:
            W = self.weights_of_block(block, tau, z, tau_candidates[columns], z_candidates[columns])
            out.addmm_(W, similarities.candidates[columns])
        return out

    def feature_factor(self, tau):
        """c of every anchor, (B,): from the table of algorithms, 1/tau where "release" departs."""
        if self.algorithm.c == "1/tau" or self.departs("factor c"):
            return 1 / tau
        return torch.ones_like(tau)

    # Stage 5

    def global_tau_gradient(self, anchors1, anchors2):
        """Stage 5, global temperature: gradient of the training loss w.r.t. ln(1/tau), ().

            h_i = d log(eps + g_i) / d tau at g = u, see tau_slope
            MBCL, GCL/tau:  d/dtau = kappa mean_i (h1_i + h2_i)
            RGCL-g:         d/dtau = mean_i (log v1_i + log v2_i) / 2 + rho
                                     + tau kappa mean_i (h1_i + h2_i)                        (4)

        with kappa = 1/2. By the chain rule, d/d ln(1/tau) = -tau d/dtau.
        """
        tau = anchors1.tau[0]
        kappa = 1.0 if self.departs("kappa") else 0.5
        h = tau_slope(anchors1) + tau_slope(anchors2)  # (B,)
        grad_tau = kappa * h.mean()

        if self.algorithm.loss == "RGCL-g":
            if self.departs("log u"):
                logs = anchors1.log_u + anchors2.log_u
            else:
                logs = anchors1.log_v + anchors2.log_v
            grad_tau = logs.mean() / 2 + self.rho + tau * grad_tau  # (4)
        return -tau * grad_tau

    def step_sample_tau(self, rows, anchors1, anchors2, epoch, lr_tau):
        """Stage 5, per-sample temperature: one step of Adam -> {column: its new values (B,)}.

        The gradient of sample i's own term of RGCL is, for each side,

            d/dtau_i = log v_i + rho + tau_i h_i, clamped to [-5, 5]                         (5)
        """
        visits = rows["visits"] + 1
        beta1 = 0.9
        beta2 = 0.999
        if self.departs("first epoch") and epoch < 1:
            beta1 = 0.0
            beta2 = 0.0

        count = visits
        if self.departs("bias"):
            count = torch.full_like(visits, int(epoch) + 1)

        new = {"visits": visits}
        for side, anchors in (("1", anchors1), ("2", anchors2)):
            grad = anchors.log_v + self.rho + anchors.tau * tau_slope(anchors)  # (5)
            grad = grad.clamp(-5, 5)

            moment1 = beta1 * rows["m" + side] + (1 - beta1) * grad
            moment2 = beta2 * rows["v" + side] + (1 - beta2) * grad**2
            unbiased1 = moment1 / (1 - beta1**count)
            unbiased2 = moment2 / (1 - beta2**count)
            tau = anchors.tau - lr_tau * (unbiased1 / (unbiased2.sqrt() + 1e-8))

            new["m" + side] = moment1
            new["v" + side] = moment2
            new["tau" + side] = tau.clamp(TAU_MIN, TAU_MAX)
        return new

    def objective(self, anchors1, anchors2):
        """The objective over the global batch with u in place of g, ()."""
        log_v1 = anchors1.log_v
        log_v2 = anchors2.log_v
        if self.algorithm.loss == "MBCL":
            return (log_v1 + log_v2).mean() / 2
        if self.algorithm.loss == "GCL/tau":
            return (log_v1 + log_v2).mean()
        rho = 0.0 if self.algorithm.loss == "GCL" else self.rho
        return (anchors1.tau * (log_v1 + rho) + anchors2.tau * (log_v2 + rho)).mean()

    def departs(self, where):
        """Does this loss compute the released form of a row of DEPARTURES?"""
        return self.release and self.algorithm.loss in DEPARTURES[where].losses


class Similarities:
    """Similarities of this rank's b anchors with all B candidates, in tiles. Re-iterable.

    Iterating yields (columns, block): a slice of the candidates, and s_ij with these, (b, tile).

    Memory: a step goes through the (b, B) similarities twice, once for log g (stage 2) and once for
    the gradient (stage 4). A single tile is kept in between. Several tiles are computed again, so
    that memory is O(b tile), at the price of six matrix products in a step instead of four.
    """

    # Similarity of an anchor with its own positive where that does not count. exp() makes it 0,
    # and 0 times it is 0 (which is not so for -inf).
    EXCLUDED = -1e30

    def __init__(self, features, candidates, tiles, has_positive):
        """features: (b, d), of this rank's anchors. candidates: (B, d), of the other side.

        tiles: slices that cover range(B). has_positive: does j = i count?
        """
        b = len(features)
        self.features = features
        self.candidates = candidates
        self.tiles = tiles
        self.has_positive = has_positive
        # The local anchors in the global batch: anchor i has candidate local.start + i as positive.
        self.local = slice(dist.rank() * b, (dist.rank() + 1) * b)
        self.kept = self.block(tiles[0]) if len(tiles) == 1 else None

    def __iter__(self):
        for columns in self.tiles:
            if self.kept is not None:
                yield columns, self.kept
            else:
                yield columns, self.block(columns)

    def block(self, columns):
        """s_ij of all anchors with some candidates, (b, tile)."""
        block = self.features @ self.candidates[columns].T
        if not self.has_positive:
            # The positives lie on a diagonal, of which this block may hold a part or nothing.
            block.diagonal(self.local.start - columns.start).fill_(self.EXCLUDED)
        return block


@contextlib.contextmanager
def products_in_tf32():
    """Inside, a GPU multiplies float32 matrices in TF32, about eight times as fast.

    With a large global batch, the products of the loss would else be a sixth of a step. They are of
    unit vectors, so an s_ij is off by about 2e-5: less than the features of towers in bfloat16 are.
    s_ii, to which all others are compared, is no matrix product and stays exact.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def add_block(sums, block, tau):
    """Add a tile of similarities to four sums of its anchors -> the new sums, (b,) each.

    sums: (top, total, weighted, reference), see contrast_local_anchors. block: (b, tile), s_ij.
    tau: (b,).
    """
    old_top, total, weighted, reference = sums
    reference = reference + (block / TAU_REFERENCE).exp_().sum(1)

    top = torch.maximum(old_top, block.amax(1))
    shrink = torch.exp((old_top - top) / tau)
    w = (block - top[:, None]).div_(tau[:, None]).exp_()  # (b, tile)
    total = total * shrink + w.sum(1)
    weighted = weighted * shrink + w.mul_(block).sum(1)
    return top, total, weighted, reference


def weights_of_block(block, tau, z, tau_candidates, z_candidates):
    """W_ij + W'_ji of a tile of similarities, see weighted_sum. All (b, tile).

    block: (b, tile), s_ij. tau, z: (b,), of the anchors. tau_candidates, z_candidates: (tile,).
    """
    W = (block / tau[:, None]).sub_(z[:, None]).exp_()
    W += (block / tau_candidates).sub_(z_candidates).exp_()
    return W


def tau_slope(anchors):
    """h_i = d log(eps + g_i) / d tau_i at g = u, (B,):

    h_i = - sum_j P_ij (s_ij - s_ii) / tau_i^2 = - (g_i / v_i) gap_i / tau_i^2
    """
    return -anchors.ratio * anchors.gap / anchors.tau**2


def moving_average(log_u, log_g, gamma):
    """Equation (1) for logarithms -> log u (B,).

        log u <- logaddexp(log(1 - gamma) + log u, log gamma + log g)

    log_u: (B,), -inf marks a sample that has not been visited. log_g: (B,).
    gamma: a number or a tensor, () or (B,), in (0, 1]; gamma = 1 gives log_g exactly.
    """
    if torch.is_tensor(gamma):
        gamma = gamma.to(log_u)
        log_keep = torch.log1p(-gamma)
        log_gamma = torch.log(gamma)
    else:
        log_keep = math.log(1 - gamma) if gamma < 1 else -math.inf
        log_gamma = math.log(gamma)
    return log_moving_average(log_u, log_g, log_keep, log_gamma)


def log_moving_average(log_u, log_g, log_keep, log_gamma):
    """moving_average with log_keep = log(1 - gamma) and log_gamma = log(gamma), numbers or (B,).

    For a gamma that would be rounded to 0 or 1: with gamma = sigmoid(x), pass logsigmoid(-x) and
    logsigmoid(x), because 1 - sigmoid(x) is 0 in float32 from x = 17 on.
    """
    later = torch.logaddexp(log_u + log_keep, log_g + log_gamma)
    return torch.where(log_u == -math.inf, log_g, later)  # (1)


def log_add(log_x, log_y):
    """log(x + y) for a tensor log_x and a number log_y."""
    return torch.logaddexp(log_x, torch.full_like(log_x, log_y))


# ------------------------------------------------------------------------------------------------
# 3. State
# ------------------------------------------------------------------------------------------------


def state_columns(algorithm, tau_init=0.03):
    """The numbers that an Algorithm keeps per sample -> {column name: initial value}."""
    columns = {}
    if algorithm.state:
        columns.update(log_u1=-math.inf, log_u2=-math.inf)  # not visited
    if algorithm.tau == "sample":
        # Temperatures, Adam's moments m and v of each, and the number of visits.
        columns.update(tau1=tau_init, tau2=tau_init, m1=0.0, m2=0.0, v1=0.0, v2=0.0, visits=0.0)
    return columns


class SampleState:
    """A table of numbers per sample, sharded: id i lives on rank i mod K, in row i // K.

    Reading: the ids of a step are known on all ranks before its forward pass. The look-up starts
    then and is finished after the towers have run. Each rank fills the rows that it owns into
    zeros, and one all-reduce (a sum) gives the rows of the global batch to every rank.

    Writing needs no communication: by then every rank knows every new row, and keeps its own.

    If an id stands in a global batch twice, both read the same old row, and the new row of the
    last one is kept. Memory: N x columns x 4 bytes / K on each rank.
    """

    def __init__(self, num_samples, columns, device="cpu", dtype=torch.float32):
        """columns: name -> initial value; without columns the state is empty."""
        self.num_samples = num_samples
        self.columns = list(columns)
        self.rows = math.ceil(num_samples / dist.world_size())
        # The table has one more row, never read, into which rows of other ranks are "written": this
        # way a write needs no branch, and no synchronisation of the host with the device.
        initial = torch.tensor(list(columns.values()), dtype=dtype, device=device)
        self.table = initial.repeat(self.rows + 1, 1)  # (rows + 1, columns)

    def lookup(self, ids):
        """Start to fetch the rows of the global batch -> Lookup.

        ids: int64 (B,) of the global batch, in [0, N). Ids on the CPU are checked (ValueError), ids
        on a GPU are trusted.
        """
        if not self.columns:
            return Lookup(self.columns, None, None, dist.NoWork())
        if ids.device.type == "cpu":
            self.check_ids(ids)

        if ids.device != self.table.device:
            ids = ids.pin_memory().to(self.table.device, non_blocking=True)
        rows = self.table[ids // dist.world_size()]  # (B, columns)
        rows = torch.where(self.owned(ids)[:, None], rows, 0)
        return Lookup(self.columns, ids, rows, dist.all_reduce(rows, "state"))

    def check_ids(self, ids):
        """ValueError with the first id, (B,) on the CPU, that is outside [0, N)."""
        outside = (ids < 0) | (ids >= self.num_samples)
        if outside.any():
            raise ValueError(
                f"sample id {ids[outside][0].item()} is outside [0, {self.num_samples}), "
                f"the samples this state was made for"
            )

    def store(self, lookup, new):
        """Keep the new rows that this rank owns.

        lookup: the batch's look-up, finished. new: {column name: (B,)}. A row in which anything is
        not finite is not taken: one bad step must not spoil what a sample has gathered over many
        epochs.
        """
        ids = lookup.ids
        rows = torch.stack([new[name] for name in self.columns], 1)  # (B, columns)
        is_finite = torch.isfinite(rows).all(1, keepdim=True)  # (B, 1)
        rows = torch.where(is_finite, rows, lookup.rows)

        # Of equal ids, the last one in the global batch is kept.
        ordered = torch.sort(ids, stable=True)
        is_last = torch.ones_like(ids, dtype=torch.bool)
        next_differs = ordered.values[:-1] != ordered.values[1:]
        is_last[ordered.indices[:-1]] = next_differs

        unread = self.rows  # the additional row
        index = torch.where(self.owned(ids) & is_last, ids // dist.world_size(), unread)  # (B,)
        self.table[index] = rows

    def owned(self, ids):
        """Which ids live on this rank, bool, the shape of ids."""
        return ids % dist.world_size() == dist.rank()


class Lookup:
    """A look-up under way. ids: (B,), of the global batch. rows: (B, columns), after finish()."""

    def __init__(self, columns, ids, rows, work):
        self.columns = columns
        self.ids = ids
        self.rows = rows
        self.work = work

    def finish(self):
        """Wait for the rows -> {column name: (B,)}; empty without state."""
        self.work.wait()
        if not self.columns:
            return {}
        return dict(zip(self.columns, self.rows.unbind(1)))
