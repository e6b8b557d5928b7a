"""python -m bench wire: bytes per step by purpose, counted as they are sent, for every algorithm.

Beside them the formula that runtime/plan.py uses, here and at 8 ranks.
"""

import gc
from itertools import cycle

import dist
from bench import baselines, harness, made_data, ours, report
from loss import ALGORITHMS
from runtime import plan

# (side, type in which its gradients travel); the first is what the others are compared with.
SIDES = [
    ("open_clip", "fp32"),
    *((algorithm, "fp32") for algorithm in ALGORITHMS),
    ("fastclip-v3", "bf16"),
]


def run(args):
    """Rows of results: one for each of SIDES."""
    shape = harness.model_shape(args)
    counts_of_ranks = harness.on_ranks(args.ranks, rank_worker, args, label="wire")
    usual_batch = args.global_batch // 8

    rows = []
    for (side, grad_wire), counts in zip(SIDES, zip(*counts_of_ranks)):
        sent, buffer_bytes = counts[0]
        expected = formula(side, grad_wire, shape, buffer_bytes, args.ranks, args.batch)
        at_8_ranks = formula(side, grad_wire, shape, buffer_bytes, 8, usual_batch)
        settings = dict(
            model=args.model,
            ranks=args.ranks,
            batch=args.batch,
            grad_wire=grad_wire,
            **args.numbers,
        )
        row = report.row(
            "wire",
            side,
            settings,
            "bytes",
            [sum(of_rank.values()) for of_rank, _ in counts],
            counted=sent,
            formula=expected,
            equal=equal(sent, expected),
            at_8_ranks={"batch": usual_batch, **at_8_ranks},
        )
        rows.append(row)

    for row in rows:
        row["share"] = row["median"] / rows[0]["median"]
        row["share_at_8_ranks"] = total_at_8_ranks(row) / total_at_8_ranks(rows[0])
    return rows


def formula(side, grad_wire, shape, buffer_bytes, num_ranks, batch_size):
    """The bytes that a rank should send in a step: {purpose: bytes}, without zeros."""
    if side == "open_clip":
        parts = baselines.traffic_formula(
            batch_size, shape.embed_dim, shape.parameters, buffer_bytes
        )
    else:
        # Every rank computes the gradient of the temperature, one parameter, itself.
        gradient_bytes = (shape.parameters - 1) * (2 if grad_wire == "bf16" else 4)
        columns = ours.columns_per_sample(side)
        parts = plan.traffic(batch_size * num_ranks, shape.embed_dim, columns, gradient_bytes)

    sent = {purpose: count(num_ranks) for purpose, count in parts.items()}
    return {purpose: count for purpose, count in sent.items() if count}


def equal(sent, expected):
    """Whether the counted bytes are the formula's.

    Counted, the share of each bucket of gradients is rounded down to a byte; in the formula, only
    that of their sum.
    """
    if sent.keys() != expected.keys():
        return False
    return all(0 <= expected[purpose] - sent[purpose] < 100 for purpose in expected)


def total_at_8_ranks(row):
    return sum(count for name, count in row["at_8_ranks"].items() if name != "batch")


def rank_worker(args):
    """One rank: yields for each of SIDES ({purpose: bytes sent in one step}, bytes of buffers)."""
    device = dist.init(args.device)
    shape = harness.model_shape(args)
    batches = made_data.make_batches(shape.image_size, shape.context_length, args.batch, count=1)

    counts = []
    for side, grad_wire in SIDES:
        if side == "open_clip":
            theirs = [baselines.batch_of(batch, shape.context_length) for batch in batches]
            trainer = baselines.Trainer(args, device, cycle(theirs), count=True)
        else:
            trainer = ours.Trainer(args, cycle(batches), side, grad_wire=grad_wire)

        # The second step is counted: the first sets things up.
        trainer.run(1)
        trainer.traffic.clear()
        trainer.run(1)
        sent = {purpose: count for purpose, count in trainer.traffic.items() if count}
        counts.append((sent, trainer.buffer_bytes))

        trainer.close()
        trainer = None
        gc.collect()
    yield counts
