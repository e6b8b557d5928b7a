"""Shards to batches. The order of samples is a pure function, so a run can stop, move and resume at any step.

the order   (seed, epoch, index, lanes, block) -> which ids make up the global batch of any step
a sample    decoded, cropped and captioned by draws from (seed, epoch, id): the same pixels in whatever process
reading     each lane reads its shards forwards, a block at a time; resuming skips, and decodes nothing that went before
the loader  workers yield their lanes' share of every step, the consumer joins the shares

"""

import sys
from collections import Counter
from functools import lru_cache, partial
from itertools import chain, islice
from random import Random
from typing import NamedTuple

import numpy as np
import torch

from config import ConfigError
from ingest.images import (
    BadSample,
    Encoded,
    batched,
    check_decoder,
    decoded_on_device,
    encoded,
    encoded_crop,
    on_device,
    training_image,
)
from ingest.reader import Reader, ShardError
from ingest.tar import captions
from ingest.tokenizer import Tokenizer
from ingest.workers import default_workers, run_workers, start_server

SHARDS, BLOCK = range(2)  # what random numbers are for, so that no two uses share draws


def rng(*key):
    """Non-negative ints -> a numpy generator of their own. Philox by name, as numpy's default may change."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def sample_rng(seed, epoch, sample_id):
    """A generator for one sample of one epoch: Python's, which starts and draws in a tenth of the time of numpy's. It promises the
    same random() for a seed for ever, so nothing else is drawn."""
    return Random(f"{seed} {epoch} {sample_id}")


def lanes_and_block(batch_size, lanes="auto", block="auto"):
    """-> (lanes, samples in a shuffled block). ConfigError if lanes does not divide batch_size.
    lanes = auto: the largest divisor of batch_size up to 512. More lanes mix better and divide among more ranks x workers, but each
    keeps a shard open (of a pipe: a running command), and begins an epoch by skipping to its place in its first shard.
    block = auto: all lanes together shuffle 65,536 samples, held compressed: 2 GB over all ranks, at 30 kB each."""
    if lanes == "auto":
        lanes = max(d for d in range(1, min(512, batch_size) + 1) if batch_size % d == 0)
    if batch_size % lanes:
        raise ConfigError(f"lanes = {lanes} does not divide batch_size = {batch_size}")
    return lanes, max(1, 65536 // lanes) if block == "auto" else block


class Order:
    """Which samples make up the global batch of every step: a pure function of these arguments and of nothing else.

    In each epoch the shards are permuted and laid end to end: a line of num_samples places, turned by a random amount so that no
    sample sits at an edge in every epoch. The line is cut into `lanes` of equal length, which may begin and end inside a shard; less
    than one global batch is left over. Within a lane, blocks are shuffled. Each step takes batch_size / lanes samples from every
    lane. Ranks, and in them workers, own neighbouring lanes: their numbers decide who reads a sample, never when it comes."""

    def __init__(self, index, batch_size, lanes="auto", block="auto", seed=0):
        """Raises ConfigError if the samples do not fill one global batch, or lanes does not divide it."""
        self.index, self.batch_size, self.seed, self.num_samples = (
            index,
            batch_size,
            seed,
            index.num_samples,
        )
        self.offsets = np.cumsum(index.counts) - index.counts  # each shard's first id
        self.lanes, self.block_length = lanes_and_block(batch_size, lanes, block)
        self.per_lane = batch_size // self.lanes  # samples of a lane in a step
        self.steps_per_epoch = self.num_samples // batch_size
        self.lane_length = self.steps_per_epoch * self.per_lane
        if not self.steps_per_epoch:
            raise ConfigError(
                f"{self.num_samples} samples in {len(index.shards)} shards do not fill one global batch: {self.num_samples} "
                f"// batch_size = {batch_size} is 0 steps an epoch; lower batch_size or add data"
            )

    @lru_cache(maxsize=2)
    def shards(self, epoch):
        """-> (the shards' permutation, the end of each on the line, by how much the line is turned)."""
        random = rng(self.seed, epoch, SHARDS)
        shards = random.permutation(len(self.index.counts))
        return shards, np.cumsum(self.index.counts[shards]), random.integers(self.num_samples)

    def line(self, epoch, lane, start, end):
        """The places start..end of a lane (or behind it, then round the corner) -> ids, int64 [end - start]."""
        shards, ends, turn = self.shards(epoch)
        place = (lane * self.lane_length + np.arange(start, end) + turn) % self.num_samples
        nth = np.searchsorted(ends, place, side="right")
        return self.offsets[shards[nth]] + self.index.counts[shards[nth]] - ends[nth] + place

    def block(self, epoch, lane, start, end):
        """The same places as one block -> ids, int64 [end - start], in the order in which they are handed out."""
        return rng(self.seed, epoch, BLOCK, lane, start).permutation(
            self.line(epoch, lane, start, end)
        )

    def parts(self, step, lane):
        """What a lane gives to a global step: yield (epoch, block's start, its end, first, last), all places in the lane.
        The lanes' first blocks differ in length, so that they do not all come to read the next one in the same step."""
        epoch, step = divmod(step, self.steps_per_epoch)
        first_block = -(-self.block_length * (lane + 1) // self.lanes)
        place, stop = step * self.per_lane, (step + 1) * self.per_lane
        while place < stop:
            number = 0 if place < first_block else 1 + (place - first_block) // self.block_length
            end = min(first_block + number * self.block_length, self.lane_length)
            yield (
                epoch,
                max(0, first_block + (number - 1) * self.block_length),
                end,
                place,
                min(end, stop),
            )
            place = min(end, stop)


def batch_ids(order, step):
    """A step, counted from 0 over all epochs -> the ids of its global batch, int64 [batch_size], lane after lane: what the loaders
    of all ranks yield, except that they replace bad samples."""
    return np.concatenate(
        [
            order.block(epoch, lane, start, end)[first - start : last - start]
            for lane in range(order.lanes)
            for epoch, start, end, first, last in order.parts(step, lane)
        ]
    )


def training_sample(files, random, image_size, crop_scale, caption_key, decoder="torchvision"):
    """{extension: bytes}, a generator -> (image uint8 [3, S, S], caption str). BadSample says why not. nvjpeg: images.encoded_crop's."""
    image, texts = encoded(files), captions(files, caption_key)
    text = texts[int(random.random() * len(texts))]
    if decoder == "nvjpeg":
        return encoded_crop(*image, random, image_size, crop_scale), text
    return training_image(*image, random, image_size, crop_scale, decoder), text


class Lane:
    """A lane of an order and its current block, read whole but still compressed."""

    def __init__(self, order, lane, prepare):
        self.order, self.lane, self.prepare, self.reader, self.at = (
            order,
            lane,
            prepare,
            Reader(order.index),
            None,
        )

    def take(self, step, bad):
        """Yield the lane's (id, image, caption)s of a global step; bad samples are counted by reason in the Counter `bad`."""
        for epoch, start, end, first, last in self.order.parts(step, self.lane):
            if self.at != (epoch, start):
                self.at, self.held = (epoch, start), None  # the old block makes room first
                self.held = {
                    i: self.reader.read(i)
                    for i in self.order.line(epoch, self.lane, start, end).tolist()
                }
                self.ids = self.order.block(epoch, self.lane, start, end).tolist()
            for place in range(first - start, last - start):
                yield self.good_sample(epoch, end, place, bad)

    def good_sample(self, epoch, end, place, bad):
        """The sample at a place of the block or, in a bad one's stead, the next good one of the block, or of the line behind it."""
        reasons = []
        behind = (
            i
            for k in range(min(1000, self.order.num_samples))
            for i in self.order.line(epoch, self.lane, end + k, end + k + 1).tolist()
        )
        for i in chain(self.ids[place:], self.ids[:place], behind):
            try:
                files = self.held[i] if i in self.held else self.reader.read(i)
                sample = i, *self.prepare(files, sample_rng(self.order.seed, epoch, i))
                bad.update(reasons[:1])  # the others are counted in their own places
                return sample
            except BadSample as error:
                reasons.append(str(error))
        raise ShardError(
            f"{len(reasons)} bad samples in a row, from sample {self.ids[place]} on: {dict(Counter(reasons))}"
        )


class Batch(NamedTuple):
    """A rank's share of a global batch: images uint8 [b, 3, S, S] in channels_last, tokens int64 [b, L] zero-padded, lengths int64 [b] of
    the captions, on the CPU as are ids int64 [b], bad {reason: how many samples were replaced}."""

    images: torch.Tensor
    tokens: torch.Tensor
    lengths: torch.Tensor
    ids: torch.Tensor
    bad: dict


class Loader:
    """An iterable of Batch: what rank `rank` of `world_size` gets of the steps start_step..num_steps - 1, over all epoch borders.

    order: an Order. image_size: pixels. context_length: tokens; L is the batch's longest caption, rounded up to a multiple of 8, and
    at most this. crop_scale: (smallest, largest) share of the area. caption_key: as in load_index. workers: processes of this rank,
    0 for none, lowered until they divide its lanes. device: where images and tokens go. decoder: of JPEGs, see images.py.
    Raises ConfigError if the lanes cannot be dealt to the ranks, or the decoder is not installed; while iterating, ShardError."""

    def __init__(
        self,
        order,
        image_size,
        context_length=77,
        crop_scale=(0.9, 1.0),
        caption_key="",
        rank=0,
        world_size=1,
        workers="auto",
        device="cpu",
        start_step=0,
        num_steps=0,
        decoder="torchvision",
    ):
        self.device, self.image_size, self.context_length, self.steps = (
            torch.device(device),
            image_size,
            context_length,
            range(start_step, num_steps),
        )
        check_decoder(decoder, self.device)
        lanes, rest = divmod(order.lanes, world_size)
        if rest:
            fits = [
                d
                for d in range(world_size, order.batch_size + 1, world_size)
                if order.batch_size % d == 0
            ]
            raise ConfigError(
                f"lanes = {order.lanes} cannot be dealt to {world_size} ranks, {order.lanes} / {world_size} leaves {rest}: "
                + (
                    f"lanes = {max([d for d in fits if d <= 512] or fits[:1])} would work"
                    if fits
                    else f"make batch_size = {order.batch_size} a multiple of {world_size}"
                )
            )
        asked = default_workers() if workers == "auto" else workers
        self.workers = max((w for w in range(1, asked + 1) if lanes % w == 0), default=0)
        if self.workers != asked and rank == 0:
            print(
                f"workers = {self.workers}, not {asked}: they must divide the {lanes} lanes of a rank",
                file=sys.stderr,
            )
        if self.workers:
            start_server()
        prepare = partial(
            training_sample,
            image_size=image_size,
            crop_scale=crop_scale,
            caption_key=caption_key,
            decoder=decoder,
        )
        self.shares = partial(
            shares,
            order,
            range(rank * lanes, (rank + 1) * lanes),
            self.steps,
            prepare,
            context_length,
        )

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        shares = run_workers(self.shares, self.workers, self.device.type == "cuda")
        # On a GPU, copies go beside the step before: this stream does not wait for it, only the next step waits for this stream.
        beside = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        for _ in self.steps:
            images, tokens, lengths, ids, bad = zip(
                *islice(shares, max(1, self.workers))
            )  # the workers take turns
            lengths, ids, bad = (
                torch.cat(lengths),
                torch.cat(ids),
                sum(map(Counter, bad), Counter()),
            )
            longest = min(-(-int(lengths.max()) // 8) * 8, self.context_length)
            with torch.cuda.stream(beside):
                tokens = on_device(tokens, self.device)[:, :longest].contiguous()
                if isinstance(images[0], Encoded):
                    images, source = decoded_on_device(images, self.image_size, self.device)
                    tokens, lengths, ids = (x[source.to(x.device)] for x in (tokens, lengths, ids))
                    bad["corrupt image"] += (source != torch.arange(len(source))).sum().item()
                else:
                    images = on_device(images, self.device)
            if beside:
                step = torch.cuda.current_stream(self.device)
                step.wait_stream(beside)
                images.record_stream(step)  # whose memory was taken for the other stream
                tokens.record_stream(step)
            yield Batch(images, tokens, lengths, ids, dict(+bad))


def shares(order, lanes, steps, prepare, context_length, worker, workers):
    """What one worker of a rank with these lanes does: yield, for every step, a Batch of its own lanes' samples."""
    mine = len(lanes) // workers
    lanes = [Lane(order, lane, prepare) for lane in lanes[worker * mine : (worker + 1) * mine]]
    tokenize = Tokenizer(context_length)
    for step in steps:
        bad = Counter()
        ids, images, texts = zip(*(sample for lane in lanes for sample in lane.take(step, bad)))
        tokens = tokenize(texts)
        lengths = 1 + tokens.argmax(1)  # <end_of_text> is the largest id
        yield Batch(batched(images), tokens, lengths, torch.tensor(ids), dict(bad))
