"""The items of attention that a persistent block works on, one after another."""

from collections.abc import Callable
from functools import partialmethod
from typing import NamedTuple

import tilelang.language as T
from tvm.tirx import Buffer, PrimExpr

from .token_list import Row, TokenList


class BlockItems(NamedTuple):
    """Every num_blocks-th item of the list, and the tokens of each that a thread looks up.

    An item's words, its tokens, their pages: one after another they take as long as the copies, so
    each is asked for an item ahead of the next, and before the copies, behind which it would queue.
    """

    items: Buffer  # [max_items, 4] i32: batch, kv_head, split, tokens
    num_items: Buffer  # [1] i32
    num_blocks: PrimExpr
    tokens: TokenList
    page_table: Buffer
    split_tokens: int
    place: Callable[[int], PrimExpr]  # in an item, of the thread's i-th token
    words: Buffer  # [4, 4] i32: of this item and of the block's next three
    token: Buffer  # [tokens of a thread] i32: logical positions
    next_token: Buffer
    page: Buffer  # of `token`

    @classmethod
    def over(
        cls,
        items: Buffer,
        num_items: Buffer,
        num_blocks: PrimExpr,
        tokens: TokenList,
        page_table: Buffer,
        split_tokens: int,
        places: tuple[int, Callable[[int], PrimExpr]],
    ) -> "BlockItems":
        """places: how many tokens a thread looks up, and where in an item they are."""
        num_tokens, place = places
        words = T.alloc_local((4, 4), T.int32)
        own = (T.alloc_local((num_tokens,), T.int32) for _ in range(3))
        return cls(
            items, num_items, num_blocks, tokens, page_table, split_tokens, place, words, *own
        )

    def is_listed(self, item: PrimExpr, ahead: int = 0) -> PrimExpr:
        """Whether the block has an item so many behind this one."""
        return item + ahead * self.num_blocks < self.num_items[0]

    def words_of(self, ahead: int = 0) -> list[PrimExpr]:
        """Its batch, kv_head, split and number of tokens."""
        return [self.words[ahead, w] for w in range(4)]

    def index_of(self, ahead: int, i: int) -> PrimExpr:
        """Where the row's list has the thread's i-th token of it."""
        _, _, split, num_tokens = self.words_of(ahead)
        return T.max(split, 0) * self.split_tokens + T.min(self.place(i), num_tokens - 1)

    def later_index(self, tile: PrimExpr, nth: PrimExpr, row_splits: int) -> PrimExpr:
        """Where the row's list has the nth token of a tile of this item; its last, beyond it."""
        _, _, split, num_tokens = self.words_of()
        place = T.min(tile * self.split_tokens + nth, num_tokens - 1)
        tile = T.max(split, 0) + place // self.split_tokens * row_splits
        return tile * self.split_tokens + place % self.split_tokens

    def token_of(self, ahead: int, i: int) -> PrimExpr:
        """The thread's i-th token of it."""
        batch, kv_head, _, _ = self.words_of(ahead)
        return self.tokens.token(Row(batch, kv_head), self.index_of(ahead, i))

    def page_of(self, ahead: int, i: int) -> PrimExpr:
        """The page of `token`, which is of it."""
        return self.page_table[self.words[ahead, 0], self.token[i] // self.tokens.page_size]

    @partialmethod
    @T.macro
    def start(self, item):
        """Asks for the block's first items."""
        for ahead in T.unroll(3):
            load_item(self.words, ahead, self.items, item + ahead * self.num_blocks)
        if self.is_listed(item):
            for i in T.unroll(self.token.shape[0]):
                self.token[i] = self.token_of(0, i)
                self.page[i] = self.page_of(0, i)
        if self.is_listed(item, 1):
            for i in T.unroll(self.token.shape[0]):
                self.next_token[i] = self.token_of(1, i)

    @partialmethod
    @T.macro
    def ask_ahead(self, item):
        """Once this item's tokens and pages are used: for the next one's pages, the tokens of the
        one behind it, and the words of the one behind that."""
        for i in T.unroll(self.token.shape[0]):
            self.token[i] = self.next_token[i]
            if self.is_listed(item, 1):
                self.page[i] = self.page_of(1, i)
            if self.is_listed(item, 2):
                self.next_token[i] = self.token_of(2, i)
        load_item(self.words, 3, self.items, item + 3 * self.num_blocks)

    @partialmethod
    @T.macro
    def take_next(self):
        """The next item's words are now this one's."""
        for ahead in T.unroll(3):
            for w in T.unroll(4):
                self.words[ahead, w] = self.words[ahead + 1, w]


@T.macro
def load_item(words, turn, items, item):
    """words[turn] = (batch, kv_head, split, tokens), anything for an item behind the list's end."""
    for w in T.vectorized(4):
        words[turn, w] = items[T.min(item, items.shape[0] - 1), w]
