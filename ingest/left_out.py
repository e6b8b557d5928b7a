"""What looks like a sample in a set and is none: counted by extension and reason.

Counts are kept as {"EXTENSION REASON": number}, as in {"jpg without caption": 3}. A group of files
of one key looks like a sample if it has an image of any kind, or a file that would be a caption
here (config.caption_key decides which). An image with a dot in its name counts by itself.
"""

import math
import shlex
from collections import Counter

from config import ConfigError
from ingest.folders import OTHER_CAPTIONS
from ingest.images import IMAGES, OTHER_IMAGES
from ingest.urls import is_local

ALL_IMAGES = IMAGES | OTHER_IMAGES

# The reasons, and what to do about each.
NOT_READ = "of a kind that is not read"
NO_CAPTION = "without caption"
NO_SENTENCE = "without a sentence"
NO_IMAGE = "without image"
ONLY_JSON = "with KEY.json but without KEY.txt"
ONLY_TXT = "with KEY.txt but without KEY.json"
OTHER_NAME = "with KEY.caption, KEY.cap or KEY.text, but without KEY.txt"
DOTS = "with a dot in the name"
MULTILABEL = "with KEY.npy but without KEY.cls"
NOT_THERE = "not on the disk"
NO_LABEL = "without a label"
NO_CLASS_FOLDER = "outside of the class folders"
REMEDIES = {
    NOT_READ: f"convert them to one of {', '.join(sorted(IMAGES))}",
    NO_CAPTION: (
        "add it in the same folder, as KEY.txt or, with caption_key, in KEY.json; for eval_data, "
        "a class will do, KEY.cls"
    ),
    NO_SENTENCE: "add sentences to their entries in the JSON file, or take the entries out of it",
    NO_IMAGE: "add it in the same folder, as KEY.jpg",
    ONLY_JSON: "set caption_key to the entry that holds the caption",
    ONLY_TXT: "leave caption_key out",
    OTHER_NAME: "rename these to KEY.txt",
    DOTS: "a key ends at the first dot, so rename the files",
    MULTILABEL: "several classes of one image (multilabel) are not evaluated here",
    NOT_THERE: "fetch them, or take them out of the list",
    NO_LABEL: "add them to the list of labels",
    NO_CLASS_FOLDER: "move each into the folder of its class",
}

# So many keys of a shard are remembered, at most, and only their hashes: a stranger's shard may
# have many keys, and long ones.
MAX_KEYS = 1_000_000


class LeftOut:
    """What one shard holds beside its usable samples.

    counts: Counter {"EXTENSION REASON": number}. num_torn: samples whose image and caption are
    both there, but not beside each other.
    """

    def __init__(self, kinds):
        """kinds: the extensions of which a usable sample has one beside its image."""
        self.kinds = kinds
        self.counts = Counter()
        self.num_torn = 0

        # Hashes of the keys that had an image and no caption so far, and the reverse.
        self.images = set()
        self.captions = set()

    def look(self, key, extensions, is_usable):
        """Look at a group of files of one key. extensions: the set of theirs."""
        dotted = dotted_images(extensions)
        if not is_usable:
            self.add_group(key, extensions, dotted)

        for extension in dotted:
            stem, _, last = extension.rpartition(".")
            # Beside a usable sample, an image alone is what webdataset means by such names:
            # KEY.jpg and KEY.seg.png.
            if not is_usable or any(f"{stem}.{kind}" in extensions for kind in self.kinds):
                self.counts[f"{last} {DOTS}"] += 1

    def add_group(self, key, extensions, dotted):
        """Count a group that is not usable, but for its images with a dot in their names."""
        images = extensions & ALL_IMAGES
        captions = extensions.intersection(self.kinds)
        if images:
            self.counts[f"{min(images)} {self.reason_against(images, extensions)}"] += 1
            self.remember(key, self.images, self.captions)
        elif captions:
            self.remember(key, self.captions, self.images)
            if not dotted:
                self.counts[f"{min(captions)} {NO_IMAGE}"] += 1

    def reason_against(self, images, extensions):
        """Why a group with images is not usable."""
        if images.isdisjoint(IMAGES):
            return NOT_READ
        if "npy" in extensions and "cls" in self.kinds:
            return MULTILABEL
        if "json" in extensions and "json" not in self.kinds:
            return ONLY_JSON
        if "txt" in extensions and "txt" not in self.kinds:
            return ONLY_TXT
        if "txt" in self.kinds and not extensions.isdisjoint(OTHER_CAPTIONS):
            return OTHER_NAME
        return NO_CAPTION

    def remember(self, key, own, other):
        """Remember a key that has one half of a sample; count it if the other half came before."""
        if hash(key) in other:
            self.num_torn += 1
        elif len(own) < MAX_KEYS:
            own.add(hash(key))


def dotted_images(extensions):
    """Those of the extensions that are of images with a dot in their names: A.jpg of KEY.A.jpg."""
    return [e for e in extensions if "." in e and e.rpartition(".")[2] in ALL_IMAGES]


def check_order(url, left_out):
    """ConfigError if the shard's images and captions of the same key are apart from each other."""
    if not left_out.num_torn:
        return
    unpack = "unpack it into FOLDER"
    if is_local(url):
        unpack = f"mkdir FOLDER && tar -xf {shlex.quote(url)} -C FOLDER"
    raise ConfigError(
        f"{url} holds image and caption of {left_out.num_torn:,} samples apart from each other, "
        f"as plain tar writes a folder; shards are read forwards, so pack it again: {unpack}, then "
        "tar --sort=name -cf NEW.tar -C FOLDER ."
    )


# ---- over all shards ----


def summary(counts):
    """Counts -> one line: "12 jpg without caption, 3 txt without image"."""
    return ", ".join(f"{number:,} {text}" for text, number in counts.most_common())


def with_remedies(counts):
    """Counts -> lines "12 jpg without caption: what to do about it", the most frequent first."""
    lines = []
    for text, number in counts.most_common():
        line = f"{number:,} {text}"
        reason = text.partition(" ")[2]
        if reason in REMEDIES:  # an older index may word it differently
            line += f": {REMEDIES[reason]}"
        lines.append(line)
    return lines


def check_share(where, samples, allowed, what="shards"):
    """ConfigError if more than the share `allowed` of what looks like samples is left out, or all.

    samples: an Index or a source of samples, with num_samples and left_out. where they are, and
    what must be mended, are for the message.
    """
    number = samples.left_out.total()
    total = number + samples.num_samples
    if not samples.num_samples:
        reasons = with_remedies(samples.left_out)
        raise ConfigError("\n  ".join([f"{where}: no usable sample in these {what}", *reasons]))
    share = number / total
    if share <= allowed:
        return

    lines = [
        f"{where}: {number:,} of {total:,} samples ({share:.1%}) would be left out, more than "
        f"allow_left_out = {allowed:g}:",
        *with_remedies(samples.left_out),
    ]
    enough = math.ceil(100 * share) / 100
    lines.append(f"mend the {what}, or go on without these: --allow_left_out={enough:g}")
    raise ConfigError("\n  ".join(lines))
