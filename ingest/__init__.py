"""Bytes from strangers to tensors: shards, captions, images, evaluation sets.

The order of reading, each file using only those before it:

    images.py      encoded images to cropped tensors
    tokenizer.py   captions to tokens
    folders.py     folders that were given in place of shards
    urls.py        where shards lie, and how their bytes are opened
    left_out.py    what looks like a sample and is none
    tar.py         tar files to samples
    counting.py    how many samples a shard holds
    index.py       the counts of a set, kept in a file (`python -m ingest.index SHARDS`)
    reader.py      samples by id
    workers.py     processes that read and decode
    evaluation.py  evaluation sets

Shards may come from anywhere, so these files are mostly about what can be wrong with them. The
method is at the top level: to change it, nobody needs to read this folder.
"""
