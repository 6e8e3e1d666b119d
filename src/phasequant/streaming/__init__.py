"""Models larger than memory: read, transformed, quantized and written block by block.

A source is opened with its blocks on the meta device (`opening`), and which tensors of its files each is made of is
found from names and shapes (`conversion`): also of mixtures, whose experts stand in them otherwise. Whoever needs a
block makes it resident (`stream.resident`), as everywhere in this package, and a lazy block then reads its weights from
the files, goes through all changes that were made to the model so far, and is dropped again afterwards (`lazy`). So the
steps of the pipeline that go block by block stream as they are, as do the few tokens of a prefix that go through all of
the model (`stream.visiting`); peak memory is one block and what is computed of it. Finished blocks are artifacts in a
work directory beside the output (`work`), which become the checkpoint's shards (`shards`).
"""

from phasequant.streaming.choice import should_stream, unstreamable
from phasequant.streaming.lazy import LazyBlock, LazyMatrix, is_lazy, round_model
from phasequant.streaming.opening import open_lazily
from phasequant.streaming.shards import write_shards
from phasequant.streaming.work import Work

__all__ = [
    "LazyBlock",
    "LazyMatrix",
    "Work",
    "is_lazy",
    "open_lazily",
    "round_model",
    "should_stream",
    "unstreamable",
    "write_shards",
]
