"""CLIP's byte pair tokenizer: captions in, a LongTensor of token ids out.

A caption is cleaned, a regular expression cuts it into pieces, and the UTF-8 bytes of each piece
are merged pairwise into tokens, the earliest learnt merge first. The ids are those of OpenAI's
CLIP and of open_clip's default tokenizer (tests/test_tokenizer.py compares them).

Vocabulary: 256 bytes | the same bytes where they end a piece | 48894 merges | 2 special tokens.
"""

import gzip
import html
import re
from heapq import heappop, heappush
from itertools import islice, pairwise
from pathlib import Path

import ftfy
import regex
import torch

VOCAB_FILE = Path(__file__).parent.parent / "assets" / "bpe_simple_vocab_16e6.txt.gz"
VOCAB_SIZE = 49408
SOT = VOCAB_SIZE - 2  # <start_of_text>
EOT = VOCAB_SIZE - 1  # <end_of_text>
END_OF_PIECE = "</w>"  # at the end of a token in VOCAB_FILE
SPECIAL = {"<start_of_text>": SOT, "<end_of_text>": EOT}

# The pieces of a caption. IGNORECASE matters even on lowercased text: "ſ" is lowercase and matches
# "s" (in "'ſ").
PIECE = regex.compile(
    r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)

# Matches text in which cleaning changes nothing but whitespace: printable ASCII without "&", and
# \t \n \f \r. In ASCII, ftfy only decodes "&...;", drops control characters and terminal escapes
# (which start with one) and turns \r into \n; html.unescape only acts on "&". \v and \x1c-\x1f are
# excluded: str.split takes them for whitespace, but ftfy deletes them, joining their neighbours.
IS_CLEAN = re.compile(r"[\t\n\f\r -%'-~]*").fullmatch

# Captions from the web always bring new words, so the cache of words is bounded. A full cache is
# emptied; the common words are soon in it again. Long "words" (URLs, scripts without spaces) hardly
# recur and are not kept.
CACHE_WORDS = 1 << 16
CACHE_WORD_LENGTH = 32


class Tokenizer:
    """A callable with a fixed context_length (int >= 2, else ValueError); it can be pickled."""

    def __init__(self, context_length=77):
        if not isinstance(context_length, int) or context_length < 2:
            raise ValueError(f"context_length must be an int >= 2, got {context_length!r}")
        self.context_length = context_length
        self.cache = {}  # word -> its token ids
        self.byte_id, self.merges, self.token_bytes = read_vocabulary()

    def __call__(self, texts):
        """Token ids of a str or a list (or tuple) of n str: LongTensor (n, context_length).

        A row is <start_of_text>, the caption, <end_of_text>, zeros. A caption that is too long
        loses its tail, never <end_of_text>. One str gives n = 1. Anything else: TypeError.
        """
        if isinstance(texts, str):
            texts = [texts]
        if not isinstance(texts, (list, tuple)):
            raise TypeError(f"need a str or list of str, got {type(texts).__name__}: {texts!r:.80}")

        out = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        rows = out.numpy()  # the same memory; numpy assigns to it much faster than torch
        for i, text in enumerate(texts):
            row = [SOT, *self.encode(text)[: self.context_length - 2], EOT]
            rows[i, : len(row)] = row
        return out

    def encode(self, text):
        """All token ids of one str, list[int] without the special tokens around a caption.

        A caption that spells out a special token gets it, as in open_clip. Not a str: TypeError.
        """
        if not isinstance(text, str):
            raise TypeError(f"a caption must be a str, got {type(text).__name__}: {text!r:.80}")
        if not IS_CLEAN(text):
            text = html.unescape(html.unescape(ftfy.fix_text(text)))

        # No piece spans whitespace, so every word can be encoded, and cached, by itself.
        ids = []
        for word in text.lower().split():
            ids += self.cache.get(word) or self._encode_word(word)
        return ids

    def decode(self, ids):
        """The str of a list or 1-d tensor of ints; ValueError for any outside [0, 49408).

        Special tokens are left out, and so is all that follows <end_of_text>. Pieces come out
        separated by spaces; bytes that are not UTF-8 (a cut character) as U+FFFD.
        """
        ids = [int(i) for i in ids]
        if not all(0 <= i < VOCAB_SIZE for i in ids):
            raise ValueError(f"token ids lie in [0, {VOCAB_SIZE}), got {min(ids)} to {max(ids)}")

        if EOT in ids:
            ids = ids[: ids.index(EOT)]
        text = b"".join(self.token_bytes[i] for i in ids if i != SOT)
        return text.decode(errors="replace").strip()

    def _encode_word(self, word):
        """The token ids of a word, lowercase text without whitespace; cached unless it is long."""
        ids = []
        for piece in PIECE.findall(word):
            if piece in SPECIAL:
                ids.append(SPECIAL[piece])
            else:
                ids += self._merge(piece.encode())

        if len(word) <= CACHE_WORD_LENGTH:
            if len(self.cache) >= CACHE_WORDS:
                self.cache.clear()
            self.cache[word] = ids
        return ids

    def _merge(self, piece):
        """The UTF-8 bytes of a piece -> its token ids: pairs are merged until no merge applies.

        The lowest merge comes first. A merged id is higher than its parts, so a merge can only add
        merges with a higher id than its own, and a heap yields them in the right order. In
        near-linear time: one endless word must not stall a data worker.
        """
        merges = self.merges
        end = len(piece)
        ids = [self.byte_id[byte] for byte in piece]
        ids[-1] += 256  # the last byte ends the piece

        # Candidates: (merged id, position of its left part). A sorted list is a heap.
        heap = []
        for i, pair in enumerate(pairwise(ids)):
            if pair in merges:
                heap.append((merges[pair], i))
        heap.sort()

        # Doubly linked list over the ids that remain: the neighbours of ids[i] are ids[left[i]]
        # and ids[right[i]]. ids[end] = None stands at both ends of it and is in no merge.
        ids.append(None)
        left = [end, *range(end)]
        right = [*range(1, end + 1)]

        while heap:
            new, i = heappop(heap)
            j = right[i]
            if merges.get((ids[i], ids[j])) != new:
                continue  # one of the two has gone into another merge

            # ids[j] leaves the list; ids[i] becomes the merged token.
            ids[i] = new
            ids[j] = None
            after = right[j]
            right[i] = after
            left[after] = i

            # The merged token can merge further, with each of its neighbours.
            before = left[i]
            pair = (ids[before], new)
            if pair in merges:
                heappush(heap, (merges[pair], before))
            pair = (new, ids[after])
            if pair in merges:
                heappush(heap, (merges[pair], i))

        return [i for i in ids if i is not None]


def read_vocabulary():
    """Read VOCAB_FILE -> (byte_id, merges, token_bytes).

    byte_id: {byte: token id} of single bytes, 0..255; + 256 where the byte ends a piece.
    merges: {(left id, right id): merged id}; the lower the merged id, the earlier it was learnt.
    token_bytes: list of the bytes of every token, with a space behind those that end a piece.
    """
    spelling = byte_spelling()
    byte_id = {byte: i for i, byte in enumerate(spelling)}
    token_bytes = [bytes([byte]) for byte in spelling]
    token_bytes += [byte + b" " for byte in token_bytes]

    token_id = {}
    for i, character in enumerate(spelling.values()):
        token_id[character] = i
        token_id[character + END_OF_PIECE] = 256 + i

    # The result of each merge is the next id.
    merges = {}
    for new, (left, right) in enumerate(read_merges(), 512):
        left_id = token_id[left]
        right_id = token_id[right]
        token_id[left + right] = new
        merges[left_id, right_id] = new
        token_bytes.append(token_bytes[left_id] + token_bytes[right_id])
    return byte_id, merges, token_bytes


def byte_spelling():
    """-> {byte: the character that VOCAB_FILE writes for it}, in the order of their token ids.

    It is the byte itself where that is printable Latin-1, else the next character from U+0100 on.
    The printable bytes come first.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]

    spelling = {byte: chr(byte) for byte in printable}
    for i, byte in enumerate(others):
        spelling[byte] = chr(256 + i)
    return spelling


def read_merges():
    """-> list of (left, right), the tokens of each merge in the spelling of VOCAB_FILE."""
    with gzip.open(VOCAB_FILE, "rt", encoding="utf-8") as f:
        next(f)  # a line with the version
        lines = islice(f, SOT - 512)
        return [tuple(line.split()) for line in lines]
