"""Tokens that a list names for every row. A row is one KV head of one request; where scores are by
the query head, one query head of it (`labels.TokenRows` says which)."""

from functools import partialmethod
from typing import NamedTuple

import tilelang.language as T
from tvm.tirx import Buffer, PrimExpr


class Row(NamedTuple):
    """One KV head of one request of seq_len tokens (None where nothing asks for them)."""

    batch: PrimExpr
    kv_head: PrimExpr
    seq_len: PrimExpr | None = None


def entry_tokens(kind: str, page_size: int) -> int:
    """Tokens that one entry of a list names."""
    return page_size if kind == "pages" else 1


def owns(heads: PrimExpr, head: PrimExpr) -> PrimExpr:
    """Whether a query head's bit is set."""
    return (heads >> head) & 1 == 1


class TokenList(NamedTuple):
    """What indices and counts hold goes by the kind: "tokens" (logical positions), "head_tokens"
    (the same, each of some of the group's query heads), "pages" (logical pages, the last of which
    may be part-filled), or "all" (every token of the request: neither of the two is read)."""

    kind: str
    page_size: int
    indices: Buffer  # [batch_size, num_kv_heads, width] i32
    counts: Buffer = None  # [batch_size, num_kv_heads] i32; None where nothing asks for them
    heads: Buffer = None  # [batch_size, num_kv_heads, width] i32, a bit for each; of "head_tokens"

    @property
    def by_head(self) -> bool:
        """Whether tokens are not of every query head."""
        return self.kind == "head_tokens"

    def is_own(self, row: Row, index: PrimExpr, head: PrimExpr) -> PrimExpr:
        """Whether the token at `index` is one of a query head of the group; asked by_head."""
        return owns(self.heads[row.batch, row.kv_head, index], head)

    @property
    def run(self) -> int:
        """Tokens of one entry."""
        return entry_tokens(self.kind, self.page_size)

    @property
    def width(self) -> PrimExpr:
        """Tokens that a row has place for."""
        return self.indices.shape[2] * self.run

    def place(self, index: PrimExpr) -> tuple[PrimExpr, PrimExpr]:
        """(which entry names the token at `index`, as which of its tokens)."""
        return index // self.run, index % self.run

    def token(self, row: Row, index: PrimExpr, beyond: bool = False) -> PrimExpr:
        """The logical position that a row's list names at `index`; `beyond` its end: anything."""
        if self.kind == "all":
            return index
        entry, nth = self.place(index)
        if beyond:
            entry = T.min(entry, T.max(self.counts[row.batch, row.kv_head] - 1, 0))
        return self.indices[row.batch, row.kv_head, entry] * self.run + nth

    def slots(self, row: Row) -> PrimExpr:
        """Tokens that a row's list has place for: those of whole pages."""
        if self.kind == "all":
            return row.seq_len
        return self.counts[row.batch, row.kv_head] * self.run

    @partialmethod  # a macro is no method by itself
    @T.macro
    def count(self, row):
        """How many tokens a row's list names."""
        num_tokens = T.alloc_var(T.int32)
        num_tokens = row.seq_len if self.kind == "all" else self.counts[row.batch, row.kv_head]
        if self.kind == "pages":
            if num_tokens > 0:
                last_page = self.indices[row.batch, row.kv_head, num_tokens - 1]
                num_tokens = (num_tokens - 1) * self.page_size + T.min(
                    self.page_size, row.seq_len - last_page * self.page_size
                )
        return num_tokens
