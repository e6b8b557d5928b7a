"""From shards to batches: the order of samples, a training sample, the loader.

The order of samples is a pure function: the seed and the step determine the ids of a global batch.
Nothing else does, neither what was read before nor the number of ranks and workers. So a run
resumes exactly, by computing its position instead of reading up to it, and it sees the same batches
on any number of GPUs. An example:

    Three shards hold 14 samples. Ids count the samples through all shards:
        A = 0 1 2    B = 3 4 5 6 7    C = 8 9 10 11 12 13
    batch_size = 4, lanes = 2, block = 3, seed = 32, so an epoch has 14 // 4 = 3 steps. Epoch 0:

    1. Permute the shards and lay them end to end. This is the line.
            0  1  2 |  8  9 10 11 12 13 |  3  4  5  6  7          A, C, B

    2. Rotate the line by a random offset, here 4, so that over many epochs every sample is at the
       edge of a lane, and left over in step 3, equally often.
            9 10 11 12 13 |  3  4  5  6  7 |  0  1  2 |  8

    3. Cut it into lanes of equal length. What is left over does not fill a global batch, and is not
       used in this epoch.
            9 10 11 12 13  3 |  4  5  6  7  0  1 |  2  8          lane 0, lane 1, left over

    4. Cut the lanes into blocks, and shuffle each block. The first blocks differ in length, so that
       the lanes do not all have to read a new block in the same step.
           10  9/11 13 12/ 3 |  6  5  4/ 1  7  0

    5. Every step takes batch_size / lanes = 2 samples from each lane.
           10  9  6  5                                            step 0
           11 13  4  1                                            step 1
           12  3  7  0                                            step 2

Every epoch draws its own permutation, offset and shuffling of the blocks.

The lanes are parallel read positions, which the ranks divide among themselves, and the workers of a
rank its share. Here, one rank reads both lanes; of two ranks each reads one, and together they have
the same batches. Within a lane, shards are read forwards, and one block is in memory at a time.

This file in order: the order (Order, batch_ids), a sample (training_sample), a lane that reads its
blocks (LaneReader), a rank's loader (Loader), the ids of all ranks (with_global_ids). Shards,
images, captions, processes: see ingest/.
"""

import math
import sys
from collections import Counter
from functools import partial
from itertools import islice
from random import Random
from typing import NamedTuple

import numpy as np
import torch

import dist
from config import ConfigError
from ingest.images import (
    BadSample,
    EncodedBatch,
    check_decoder,
    decode_on_device,
    encoded_crop,
    encoded_image,
    on_device,
    stack_crops,
    training_image,
)
from ingest.reader import Reader, ShardError
from ingest.tar import captions
from ingest.tokenizer import Tokenizer
from ingest.workers import default_workers, in_a_thread, run_workers, start_server

MAX_AUTO_LANES = 512
AUTO_SHUFFLE = 65536  # samples that all lanes together shuffle
MAX_TRIES = 1000  # samples behind a block that may be tried in place of a bad one

# What random numbers are for: a part of the key of a generator, so that no two uses share draws.
FOR_SHARDS = 0
FOR_BLOCK = 1


# ---- random numbers ----


def rng(*key):
    """Non-negative ints -> a numpy generator of their own.

    Philox is named because numpy's default may change, and with it the order of a resumed run.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def sample_rng(seed, epoch, sample_id):
    """The generator of one sample in one epoch.

    Python's, because it starts and draws in a tenth of the time that numpy's takes. Python promises
    that a seed gives the same random() in every version, so no other method is used.
    """
    return Random(f"{seed} {epoch} {sample_id}")


# ---- the order of samples ----


def largest_divisor(n, limit):
    """The largest divisor of n that is at most `limit`; 0 if the limit is 0."""
    return max((d for d in range(1, limit + 1) if n % d == 0), default=0)


def lanes_and_block(batch_size, lanes="auto", block="auto"):
    """Resolve "auto" -> (lanes, samples in a shuffled block).

    lanes = auto: the largest divisor of batch_size up to 512. More lanes mix the samples better and
    can be divided among more ranks and workers. But each lane keeps a shard open (of a pipe: a
    running command), and begins an epoch by skipping to its position in its first shard.

    block = auto: all lanes together shuffle 65,536 samples. They are in memory, compressed: 2 GB
    over all ranks, at 30 kB each.

    Raises ConfigError if lanes does not divide batch_size.
    """
    if lanes == "auto":
        lanes = largest_divisor(batch_size, MAX_AUTO_LANES)
    if batch_size % lanes != 0:
        raise ConfigError(f"lanes = {lanes} does not divide batch_size = {batch_size}")

    if block == "auto":
        block = max(1, AUTO_SHUFFLE // lanes)
    return lanes, block


class Line(NamedTuple):
    """The n shards of an epoch, laid end to end."""

    shards: np.ndarray  # int64 (n,), the permutation of the shards
    ends: np.ndarray  # int64 (n,), the position on the line at which each of them ends
    offset: int  # by how much the line is rotated


class Part(NamedTuple):
    """What one lane contributes to one step, as far as it lies in one block.

    Positions are counted from the beginning of the lane; an end is the position behind the last.
    """

    epoch: int
    block_start: int
    block_end: int
    start: int  # what the step takes of the block
    end: int


class Order:
    """Which samples make up the global batch of every step: the example at the top of this file.

    A pure function of the arguments: index.counts (samples per shard, an ingest.index.Index),
    batch_size (global), lanes, block (samples) and seed. Ranks and workers do not occur in it: they
    only divide the lanes among themselves.

    Attributes that others read: index, batch_size, seed, num_samples, lanes, steps_per_epoch.
    Raises ConfigError if the samples do not fill one global batch, or lanes does not divide it.
    """

    def __init__(self, index, batch_size, lanes="auto", block="auto", seed=0):
        self.index = index
        self.batch_size = batch_size
        self.seed = seed
        self.num_samples = index.num_samples
        self.lanes, self.block_length = lanes_and_block(batch_size, lanes, block)

        self.steps_per_epoch = self.num_samples // batch_size
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"{self.num_samples} samples in {len(index.shards)} shards do not fill one global "
                f"batch: {self.num_samples} // batch_size = {batch_size} is 0 steps an epoch; "
                "lower batch_size or add data"
            )
        self.per_lane = batch_size // self.lanes  # samples of a lane in a step
        self.lane_length = self.steps_per_epoch * self.per_lane

        self.first_ids = np.cumsum(index.counts) - index.counts  # the first id of each shard
        self.current_epoch = None
        self.current_line = None

    def line(self, epoch):
        """The Line of an epoch. The last one is kept, as every lane asks for it."""
        if self.current_epoch != epoch:
            random = rng(self.seed, epoch, FOR_SHARDS)
            shards = random.permutation(len(self.index.counts))
            ends = np.cumsum(self.index.counts[shards])
            offset = int(random.integers(self.num_samples))
            self.current_line = Line(shards, ends, offset)
            self.current_epoch = epoch
        return self.current_line

    def line_ids(self, epoch, lane, start, end):
        """The ids at the positions start..end - 1 of a lane, in the order of the line, unshuffled.

        int64 (end - start,). Positions behind the end of the lane are those of the next lane, and
        behind the end of the line those at its beginning.
        """
        line = self.line(epoch)
        first = line.offset + lane * self.lane_length
        positions = (first + np.arange(start, end)) % self.num_samples  # on the line

        nth = np.searchsorted(line.ends, positions, side="right")  # which shard of the line has it
        shards = line.shards[nth]
        shard_starts = line.ends[nth] - self.index.counts[shards]
        return self.first_ids[shards] + positions - shard_starts

    def block_ids(self, epoch, lane, block_start, block_end):
        """The ids of a block, shuffled: the order in which they are used. int64 (its length,)."""
        random = rng(self.seed, epoch, FOR_BLOCK, lane, block_start)
        return random.permutation(self.line_ids(epoch, lane, block_start, block_end))

    def block_around(self, lane, position):
        """The borders of the block around a position of a lane -> (block_start, block_end).

        The first block of the last lane has full length, those of the others are shorter in
        proportion, so that the lanes do not all have to read a new block in the same step.
        """
        first_end = math.ceil(self.block_length * (lane + 1) / self.lanes)
        if position < first_end:
            return 0, min(first_end, self.lane_length)

        number = (position - first_end) // self.block_length
        block_start = first_end + number * self.block_length
        return block_start, min(block_start + self.block_length, self.lane_length)

    def parts(self, step, lane):
        """What a lane contributes to a step, counted from 0 over all epochs: yield its Parts.

        One, or several where a block ends within the step.
        """
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        position = step_of_epoch * self.per_lane
        step_end = position + self.per_lane

        while position < step_end:
            block_start, block_end = self.block_around(lane, position)
            part_end = min(block_end, step_end)
            yield Part(epoch, block_start, block_end, position, part_end)
            position = part_end


def batch_ids(order, step):
    """The ids of the global batch of a step, counted from 0 over all epochs. int64 (batch_size,).

    Lane after lane. This is what the loaders of all ranks together yield, except that they replace
    bad samples.
    """
    ids = []
    for lane in range(order.lanes):
        for part in order.parts(step, lane):
            block = order.block_ids(part.epoch, lane, part.block_start, part.block_end)
            ids.append(block[part.start - part.block_start : part.end - part.block_start])
    return np.concatenate(ids)


# ---- a sample ----


def training_sample(
    files,
    random,
    image_size,
    crop_scale,
    caption_key,
    decoder="torchvision",
    caption_lines=False,
):
    """The files of a sample, {extension: bytes}, and its generator -> (image, caption).

    The caption, a str, is one of the sample's, drawn. The image is a random crop, uint8 (3, S, S)
    with S = image_size; with decoder = nvjpeg it is still encoded, an ingest.images.EncodedCrop.
    Both depend on nothing but the arguments: a sample gives the same pixels in every process.
    Raises BadSample with the reason if the sample cannot be used.
    """
    data, height, width = encoded_image(files)
    texts = captions(files, caption_key, caption_lines)
    text = texts[int(random.random() * len(texts))]

    if decoder == "nvjpeg":
        image = encoded_crop(data, height, width, random, image_size, crop_scale)
    else:
        image = training_image(data, height, width, random, image_size, crop_scale, decoder)
    return image, text


# ---- reading a lane ----


class LaneReader:
    """Reads one lane of an order, a block at a time: all files of a block, still compressed.

    prepare(files, random) makes a sample of the files, as training_sample does. A run that resumes
    reads the block around its position, and decodes nothing before that position.
    """

    def __init__(self, order, lane, prepare):
        self.order = order
        self.lane = lane
        self.prepare = prepare
        self.reader = Reader(order.index)

        self.block = None  # (epoch, block_start) of the block that is in the buffer
        self.block_ids = []  # its ids, in the order in which they are used
        self.buffer = {}  # id -> {extension: bytes}

    def take(self, step, bad):
        """Yield the lane's samples of a global step: (id, image, caption) each.

        Bad samples are replaced, and counted by reason in the Counter `bad`.
        """
        for part in self.order.parts(step, self.lane):
            if self.block != (part.epoch, part.block_start):
                self.read_block(part)
            for position in range(part.start, part.end):
                yield self.good_sample(part, position, bad)

    def read_block(self, part):
        """Read the block of a part into the buffer, in line order: shards are read forwards."""
        block = (part.epoch, self.lane, part.block_start, part.block_end)
        self.block = (part.epoch, part.block_start)
        self.block_ids = self.order.block_ids(*block).tolist()

        self.buffer = {}  # frees the block before
        for sample_id in self.order.line_ids(*block).tolist():
            self.buffer[sample_id] = self.reader.read(sample_id)

    def good_sample(self, part, position, bad):
        """The sample at a position or, if it is bad, the next good one: (id, image, caption).

        A bad sample is counted at its own position only, so `bad` gets at most one reason.
        Raises ShardError if there is no good sample among all candidates.
        """
        reasons = []
        for sample_id in self.candidates(part, position):
            try:
                image, text = self.read_sample(part.epoch, sample_id)
            except BadSample as error:
                reasons.append(str(error))
                continue

            if reasons:
                bad[reasons[0]] += 1
            return sample_id, image, text

        first_id = self.block_ids[position - part.block_start]
        raise ShardError(
            f"{len(reasons)} bad samples in a row, from sample {first_id} on: "
            f"{dict(Counter(reasons))}; look at the data: python -m ingest.index --verify SHARDS, "
            "with --caption_key if it is set"
        )

    def candidates(self, part, position):
        """Ids to try for a position: its own, the rest of the block, then those behind it."""
        i = position - part.block_start
        yield from self.block_ids[i:]
        yield from self.block_ids[:i]

        tries = min(MAX_TRIES, self.order.num_samples)
        for behind in range(part.block_end, part.block_end + tries):
            yield self.order.line_ids(part.epoch, self.lane, behind, behind + 1).item()

    def read_sample(self, epoch, sample_id):
        """-> (image, caption). Raises BadSample, or ShardError if a shard cannot be read."""
        if sample_id in self.buffer:
            files = self.buffer[sample_id]
        else:
            files = self.reader.read(sample_id)
        return self.prepare(files, sample_rng(self.order.seed, epoch, sample_id))


# ---- the loader ----


class Batch(NamedTuple):
    """A rank's share of a global batch: b samples. Images and tokens are on the device."""

    images: torch.Tensor  # uint8 (b, 3, S, S), in channels_last
    tokens: torch.Tensor  # int64 (b, L), zero-padded
    lengths: torch.Tensor  # int64 (b,), of the captions in tokens, on the CPU
    ids: torch.Tensor  # int64 (b,), on the CPU
    bad: dict  # {reason: how many samples were replaced}
    # int64 (B,), of all ranks' samples in rank order, on the CPU; None before with_global_ids.
    global_ids: torch.Tensor | None = None


class Loader:
    """What one rank gets of the steps start_step..num_steps - 1: a re-iterable of Batch.

    Steps are counted over all epochs. The lanes of the rank are divided among its workers. In
    every step, each worker yields its share (worker_shares, below), and the loader joins them and
    copies them to the device. It sends nothing to other ranks: see with_global_ids, below.

    order: an Order.
    image_size: S, pixels.
    context_length: tokens. A batch's L is its longest caption, rounded up to a multiple of 8, and
        at most this.
    crop_scale: (smallest, largest) share of the area of an image.
    caption_key, caption_lines: where the captions are, see ingest.tar.captions.
    rank, world_size: which share of the lanes.
    workers: processes of this rank, 0 for none; lowered until they divide its lanes.
    device: where images and tokens go.
    decoder: of JPEGs, see ingest/images.py.

    Raises ConfigError if the lanes cannot be divided among the ranks, or the decoder is not
    installed; while iterating, ShardError.
    """

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
        caption_lines=False,
    ):
        self.device = torch.device(device)
        self.image_size = image_size
        self.context_length = context_length
        self.steps = range(start_step, num_steps)
        check_decoder(decoder, self.device)

        lanes = lanes_per_rank(order, world_size)
        requested = default_workers() if workers == "auto" else workers
        self.workers = largest_divisor(lanes, requested)
        if self.workers != requested and rank == 0:
            print(
                f"workers = {self.workers}, not {requested}: they must divide the {lanes} lanes of "
                "a rank",
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
            caption_lines=caption_lines,
        )
        own_lanes = range(rank * lanes, (rank + 1) * lanes)
        self.generate = partial(
            worker_shares, order, own_lanes, self.steps, prepare, context_length
        )

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        if self.device.type == "cuda":
            return self.batches_on_gpu()
        return self.batches()

    def batches(self):
        """Yield a Batch for each step, made of one share from each worker."""
        shares = run_workers(self.generate, self.workers, pin_memory=self.device.type == "cuda")
        for _ in self.steps:
            of_step = islice(shares, max(1, self.workers))  # in the order of their lanes
            yield self.join(list(of_step))

    def batches_on_gpu(self):
        """As batches(), but each is made beside the step before, in a thread and on a stream.

        Copies and decoding on that stream do not wait for the step, and the thread, which has to
        wait for nvJPEG, does not keep this one from starting the next step.
        """
        stream = torch.cuda.Stream(self.device)
        for batch, is_complete in in_a_thread(on_stream(self.batches(), stream)):
            wait_for(is_complete, batch)
            yield batch

    def join(self, shares):
        """The shares of all workers -> one Batch on the device."""
        images = [share.images for share in shares]
        lengths = torch.cat([share.lengths for share in shares])  # (b,)
        ids = torch.cat([share.ids for share in shares])  # (b,)
        bad = Counter()
        for share in shares:
            bad.update(share.bad)

        longest = math.ceil(int(lengths.max()) / 8) * 8
        longest = min(longest, self.context_length)
        tokens = on_device([share.tokens for share in shares], self.device)
        tokens = tokens[:, :longest].contiguous()  # (b, L)

        if isinstance(images[0], EncodedBatch):
            return self.decode(images, Batch(None, tokens, lengths, ids, dict(bad)))
        images = on_device(images, self.device)  # (b, 3, S, S)
        return Batch(images, tokens, lengths, ids, dict(bad))

    def decode(self, encoded, batch):
        """GPU decoding: a Batch without images, and the workers' encoded ones -> the whole Batch.

        In place of a corrupt image comes the whole next sample of the batch: image, caption and id.
        """
        images, source = decode_on_device(encoded, self.image_size, self.device)

        bad = Counter(batch.bad)
        corrupt = int((source != torch.arange(len(source))).sum())
        if corrupt:
            bad["corrupt image"] += corrupt

        tokens = batch.tokens[source.to(self.device)]
        return Batch(images, tokens, batch.lengths[source], batch.ids[source], dict(bad))


def on_stream(batches, stream):
    """Yield (batch, event): each batch is made on the CUDA stream, and complete at the event."""
    # A thread begins on GPU 0, where the other ranks of a host must not take memory.
    torch.cuda.set_device(stream.device)

    while True:
        with torch.cuda.stream(stream):
            batch = next(batches, None)
            is_complete = stream.record_event()
        if batch is None:
            return
        yield batch, is_complete


def wait_for(is_complete, batch):
    """Let the current stream, on which the training step runs, wait for a batch of another stream.

    The memory of the batch belongs to that stream. record_stream tells the allocator that the step
    uses it as well, so that it is not given away before the step has ended.
    """
    step = torch.cuda.current_stream(batch.images.device)
    step.wait_event(is_complete)
    batch.images.record_stream(step)
    batch.tokens.record_stream(step)


def with_global_ids(batches, gather=True):
    """Yield a rank's batches with their global_ids, each when the next one is already under way.

    While a step computes, the next batch is copied to the device, and all ranks gather its ids: on
    the CPU, by gloo, so that neither the host nor a GPU waits for them.

    gather: False where no ids are needed, for an algorithm without state.
    """
    waiting = None  # (batch, the gather of its ids)
    for batch in batches:
        gathering = dist.start_all_gather(batch.ids, "ids") if gather else None
        if waiting is not None:
            yield complete(*waiting)
        waiting = batch, gathering

    if waiting is not None:
        yield complete(*waiting)


def complete(batch, gathering):
    """-> the batch with the gathered ids."""
    if gathering is None:
        return batch
    return batch._replace(global_ids=gathering.wait())


def lanes_per_rank(order, world_size):
    """How many lanes each rank reads. Raises ConfigError, with a remedy, if they do not divide."""
    lanes, rest = divmod(order.lanes, world_size)
    if rest == 0:
        return lanes

    possible = []  # numbers of lanes that both divide the batch and can be dealt to the ranks
    for number in range(world_size, order.batch_size + 1, world_size):
        if order.batch_size % number == 0:
            possible.append(number)

    if possible:
        usual = [number for number in possible if number <= MAX_AUTO_LANES]
        best = max(usual) if usual else possible[0]
        remedy = f"lanes = {best} would work"
    else:
        remedy = f"make batch_size = {order.batch_size} a multiple of {world_size}"
    raise ConfigError(
        f"lanes = {order.lanes} cannot be dealt to {world_size} ranks, "
        f"{order.lanes} / {world_size} leaves {rest}: {remedy}"
    )


def worker_shares(order, lanes, steps, prepare, context_length, worker, workers):
    """What one worker of a rank does: yield, for every step, a Batch of its own lanes' samples.

    lanes: those of the rank; each worker reads len(lanes) / workers neighbouring ones. In these
    batches, images may be EncodedBatch, and tokens have the full context_length.
    """
    per_worker = len(lanes) // workers
    own_lanes = lanes[worker * per_worker : (worker + 1) * per_worker]
    readers = [LaneReader(order, lane, prepare) for lane in own_lanes]
    tokenize = Tokenizer(context_length)

    for step in steps:
        bad = Counter()
        samples = []
        for reader in readers:
            samples += reader.take(step, bad)

        ids, images, texts = zip(*samples)
        tokens = tokenize(texts)
        lengths = 1 + tokens.argmax(1)  # <end_of_text>, at the end, has the largest id
        yield Batch(stack_crops(images), tokens, lengths, torch.tensor(ids), dict(bad))
