"""CLIP's byte pair tokenizer: captions in, a LongTensor of token ids out.

A caption is cleaned, a regular expression cuts it into pieces, and the UTF-8 bytes of each piece
are merged pairwise into tokens, the earliest learnt merge first. The ids are those of OpenAI's
CLIP and of open_clip's default tokenizer; tests/test_tokenizer.py holds them to that.

Vocabulary: 256 bytes | the same bytes where they end a piece | 48894 merges | 2 special tokens.
"""

import gzip
import html
import re
from heapq import heappop, heappush
from itertools import pairwise
from pathlib import Path

import ftfy
import regex
import torch

VOCAB_FILE = Path(__file__).parent.parent / "assets" / "bpe_simple_vocab_16e6.txt.gz"
VOCAB_SIZE = 49408
SOT, EOT = VOCAB_SIZE - 2, VOCAB_SIZE - 1
SPECIAL = {"<start_of_text>": SOT, "<end_of_text>": EOT}

# IGNORECASE still matters on lowercased text: "ſ" is lowercase and matches "s" (in "'ſ").
PIECE = regex.compile(
    r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)

# Text that cleaning cannot change but for whitespace: printable ASCII without "&", \t \n \f \r.
# On ASCII, ftfy only decodes "&...;", drops control characters and terminal escapes (which start
# with one) and turns \r into \n; html.unescape acts on "&" alone. \v and \x1c-\x1f are no part of
# this: split() below takes them for whitespace, but ftfy deletes them, gluing their neighbours.
IS_CLEAN = re.compile(r"[\t\n\f\r -%'-~]*").fullmatch

# Web captions never run out of new words. A full cache is emptied: the common words are back at
# once. Long "words" (URLs, scripts without spaces) hardly recur and are not kept.
CACHE_WORDS, CACHE_WORD_LENGTH = 1 << 16, 32


class Tokenizer:
    """A callable with a fixed context_length (int >= 2, else ValueError); it can be pickled."""

    def __init__(self, context_length=77):
        if not isinstance(context_length, int) or context_length < 2:
            raise ValueError(f"context_length must be an int >= 2, got {context_length!r}")
        self.context_length = context_length
        self.cache = {}  # word -> its token ids

        # The file spells each byte as one visible character: itself where it is printable Latin-1,
        # else the next one from U+0100 on. Byte ids follow that order: the printable ones first.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        spelling = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
        ids = {s: i for i, s in enumerate(spelling + [s + "</w>" for s in spelling])}
        self.byte_id = {b: i for i, b in enumerate(printable + others)}
        self.token_bytes = [bytes([b]) for b in printable + others]  # id -> bytes, for decode
        self.token_bytes += [b + b" " for b in self.token_bytes]
        self.merges = {}  # (left id, right id) -> merged id; the lower that is, the earlier learnt
        with gzip.open(VOCAB_FILE, "rt", encoding="utf-8") as f:
            next(f)  # a version line
            for new in range(512, SOT):
                left, right = next(f).split()
                ids[left + right] = self.merges[ids[left], ids[right]] = new
                self.token_bytes.append(self.token_bytes[ids[left]] + self.token_bytes[ids[right]])

    def __call__(self, texts):
        """Token ids of a str or a list (or tuple) of n str: LongTensor [n, context_length].

        A row is <start_of_text>, the caption, <end_of_text>, zeros. A caption that is too long
        loses its tail, never <end_of_text>. One str gives n = 1. Anything else: TypeError.
        """
        if isinstance(texts, str):
            texts = [texts]
        if not isinstance(texts, (list, tuple)):
            raise TypeError(f"need a str or list of str, got {type(texts).__name__}: {texts!r:.80}")
        out = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        rows = out.numpy()  # the same memory; much faster to assign to
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
        ids = []
        for word in text.lower().split():  # no piece spans whitespace, so words are independent
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
        ids = ids[: ids.index(EOT)] if EOT in ids else ids
        text = b"".join(self.token_bytes[i] for i in ids if i != SOT)
        return text.decode(errors="replace").strip()

    def _encode_word(self, word):
        ids = []
        for piece in PIECE.findall(word):
            ids += [SPECIAL[piece]] if piece in SPECIAL else self._merge(piece.encode())
        if len(word) <= CACHE_WORD_LENGTH:
            if len(self.cache) >= CACHE_WORDS:
                self.cache.clear()
            self.cache[word] = ids
        return ids

    def _merge(self, piece):
        # A merged id is higher than its parts, so a merge only adds work behind it in the queue:
        # a heap is exact. And near-linear: one endless word must not stall a DataLoader worker.
        merges, ids, end = self.merges, [self.byte_id[b] for b in piece], len(piece)
        ids[-1] += 256  # the last byte ends the piece
        heap = sorted((merges[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in merges)
        ids.append(None)  # at both ends of the linked lists: None is in no merge
        left, right = [end, *range(end)], [*range(1, end + 1)]  # neighbours of what is not merged
        while heap:
            new, i = heappop(heap)
            j = right[i]
            if merges.get((ids[i], ids[j])) != new:  # one of them went into another merge
                continue
            ids[i], ids[j] = new, None
            right[i] = right[j]
            left[right[i]] = i
            for a, b in (left[i], i), (i, right[i]):
                if (ids[a], ids[b]) in merges:
                    heappush(heap, (merges[ids[a], ids[b]], a))
        return [i for i in ids if i is not None]
