"""The norms by which the query heads of a row compare the tokens of a row, and the scores by them:
labels are read once, unless the norms take too long."""

from functools import partialmethod
from typing import NamedTuple

import tilelang
import tilelang.language as T
from tvm.tirx import Buffer, PrimExpr

from .compiling import THREAD_LEVEL, start_early
from .label_tiles import LOG2_E, RUN_TOKENS, LabelReader, LabelScoreConfig
from .labels import TokenRows
from .launch import next_power_of_two
from .mma import QUAD, TILE_HEADS, place_in_quad
from .pools import TILE_TOKENS
from .strided import strided
from .token_keys import NUM_BINS, SHARES, OpenTokens, RowScores, is_special
from .token_list import Row
from .warp import steps_over

MASS_TILES = 4  # whose weights are added up together, so never tuned
LARGEST = 3.0e38  # below which a largest logit is none
DONE = 1 << 30  # in `arrived`: the row's norms are there
MAX_LOOKS = 64  # for the norms, a microsecond each: then the kernel of the scores does the rest


@T.macro
def join_masses(largest, mass, other_largest, other_mass):
    """(the larger exponent, the sum of two masses in units of 2 to the power of it)."""
    joined = T.alloc_var(T.float32)
    joined = T.max(T.max(largest, other_largest), -LARGEST)
    other = other_mass * T.exp2(other_largest - joined)
    return joined, T.call_extern("float32", "fmaf", mass, T.exp2(largest - joined), other)


@T.macro
def join_masses_of_lanes(largest, mass, num_lanes, apart=1):
    """The same over every `num_lanes` lanes that are `apart`: the first has the result."""
    top = T.alloc_var(T.float32)
    total = T.alloc_var(T.float32)
    top = largest
    total = mass
    for bit in T.unroll(num_lanes.bit_length() - 1):
        other, other_mass = T.shfl_xor(top, apart << bit), T.shfl_xor(total, apart << bit)
        top, total = join_masses(top, total, other, other_mass)
    return top, total


class Masses(NamedTuple):
    """The softmax's weights of a lane's tokens of a run, added up for each of its heads."""

    largest: Buffer  # [head_tiles, 2] f32: log2 of what they are counted in
    mass: Buffer  # [head_tiles, 2] f32
    logits: Buffer  # [MASS_TILES, lane_tokens, head_tiles, 2] f32

    @classmethod
    def allocate(cls, rows: TokenRows) -> "Masses":
        head_tiles = -(-rows.heads // TILE_HEADS)
        largest = T.alloc_local((head_tiles, 2), T.float32)
        mass = T.alloc_local((head_tiles, 2), T.float32)
        logits = T.alloc_local((MASS_TILES, rows.lane_tokens, head_tiles, 2), T.float32)
        return cls(largest, mass, logits)

    @partialmethod
    @T.macro
    def clear(self):
        largest, mass = self.largest, self.mass
        for n in T.unroll(largest.shape[0]):
            for h in T.unroll(2):
                largest[n, h] = -T.infinity(T.float32)
                mass[n, h] = 0.0

    @partialmethod
    @T.macro
    def weigh(self, n, h):
        """(the exponent that the weights of MASS_TILES are counted in from now on, their sum)."""
        largest, logits, lane_tokens = self.largest, self.logits, int(self.logits.shape[1])
        together = T.alloc_var(T.float32)
        added = T.alloc_var(T.float32)
        together = T.max(largest[n, h], -LARGEST)
        for j in T.unroll(MASS_TILES):
            for t in T.unroll(lane_tokens):
                together = T.max(together, logits[j, t, n, h])
        added = T.exp2(logits[0, 0, n, h] - together)
        for at in T.unroll(MASS_TILES * lane_tokens - 1):
            j, t = (at + 1) // lane_tokens, (at + 1) % lane_tokens
            added += T.exp2(logits[j, t, n, h] - together)
        return together, added

    @partialmethod
    @T.macro
    def add(self, n, h):
        """The logits of one head. Those that are not finite have no weight."""
        largest, mass, logits = self.largest, self.mass, self.logits
        together = T.alloc_var(T.float32)
        added = T.alloc_var(T.float32)
        together, added = self.weigh(n, h)
        if is_special(added):  # hardly ever: NaN, of NaN or inf - inf
            for j in T.unroll(MASS_TILES):
                for t in T.unroll(logits.shape[1]):
                    if is_special(logits[j, t, n, h]):
                        logits[j, t, n, h] = -T.infinity(T.float32)
            together, added = self.weigh(n, h)
        kept = T.exp2(largest[n, h] - together)
        mass[n, h] = T.call_extern("float32", "fmaf", mass[n, h], kept, added)
        largest[n, h] = together

    @partialmethod
    @T.macro
    def join(self):
        """Over the lanes with the same heads: the first have the result."""
        largest, mass = self.largest, self.mass
        apart = 2 if int(self.logits.shape[1]) == 1 else QUAD
        for n in T.unroll(largest.shape[0]):
            for h in T.unroll(2):
                top, total = join_masses_of_lanes(largest[n, h], mass[n, h], 32 // apart, apart)
                largest[n, h] = top
                mass[n, h] = total


class KeptLogits(NamedTuple):
    """The logits of a block's tokens, until the norms of their row are there."""

    logits: Buffer  # [block_tokens, columns] f32, in shared memory: a token's heads, some twice
    first: PrimExpr  # the block's first token

    @classmethod
    def allocate(cls, rows: TokenRows, config: LabelScoreConfig, chunk: PrimExpr) -> "KeptLogits":
        columns = next_power_of_two(rows.heads)
        logits = T.alloc_shared((config.block_tokens, columns), T.float32)
        return cls(logits, chunk * config.block_tokens)

    @partialmethod
    @T.macro
    def keep(self, first_token, further, logits, j, t):
        """Those of this lane's heads (see head_of) for its t-th token of the j-th tile, so much
        further than that of the first one."""
        kept = self.logits
        _, lane = place_in_quad()
        pair = lane % (min(int(kept.shape[1]), TILE_HEADS) // 2) * 2
        place = T.alloc_var(T.int32)
        place = first_token - self.first  # bound, so that tiles are a constant apart
        for n in T.unroll(logits.shape[2]):
            for h in T.vectorized(2):
                kept[place + further, n * TILE_HEADS + pair + h] = logits[j, t, n, h]

    @partialmethod
    @T.macro
    def each_score(self, norms, row, num_threads, visit):
        """visit(token, score) sees the block's tokens: the largest logit over the heads, each less
        its norm."""
        columns = int(self.logits.shape[1])
        num_heads, width = int(norms.shape[2]), min(columns, 4)
        own = T.alloc_local((columns,), T.float32)
        own_norms = T.alloc_local((num_heads,), T.float32)
        best = T.alloc_var(T.float32)
        for head in T.unroll(num_heads):
            own_norms[head] = norms[row.batch, row.kv_head, head]
        place = T.alloc_var(T.int32)
        for turn in T.serial(self.logits.shape[0] // num_threads):
            place = turn * num_threads + T.get_thread_binding()
            if self.first + place < row.seq_len:
                for k in T.unroll(columns // width):
                    for e in T.vectorized(width):
                        own[k * width + e] = self.logits[place, k * width + e]
                best = own[0] - own_norms[0]
                for head in T.unroll(num_heads - 1):
                    best = T.max(best, own[head + 1] - own_norms[head + 1])
                visit(self.first + place, best)


@T.macro
def add_masses(reader, masses, kept, run, loaded, first):
    """Keeps the logits of the tiles of a run that are loaded, and adds up their weights, of
    MASS_TILES at once."""
    logits, seq_len = masses.logits, reader.row.seq_len
    head_tiles = int(reader.acc.shape[0])
    for group in T.unroll(loaded.tiles // MASS_TILES):
        first_tile = first + group * MASS_TILES
        for j in T.unroll(MASS_TILES):
            reader.multiply(loaded, group * MASS_TILES + j)
            for t in T.unroll(loaded.lane_tokens):
                for n in T.unroll(head_tiles):
                    for h in T.unroll(2):
                        tile = group * MASS_TILES + j
                        logits[j, t, n, h] = reader.logit_of(loaded, tile, t, n, h)
                first_token = run.token(first_tile, t, loaded.lane_tokens)
                kept.keep(first_token, j * TILE_TOKENS, logits, j, t)
        if (run.first + first_tile + MASS_TILES) * TILE_TOKENS > seq_len:  # the row ends
            for j in T.unroll(MASS_TILES):
                for t in T.unroll(loaded.lane_tokens):
                    if run.token(first_tile + j, t, loaded.lane_tokens) >= seq_len:
                        for n in T.unroll(head_tiles):
                            for h in T.unroll(2):
                                logits[j, t, n, h] = -T.infinity(T.float32)
        for n in T.unroll(head_tiles):
            for h in T.unroll(2):
                masses.add(n, h)


@T.macro
def add_run(reader, masses, kept, parts, run, number):
    """A partial result is one of a run, whatever the launch."""
    row, num_heads = reader.row, int(parts.shape[3])
    quad, lane = place_in_quad()
    masses.clear()
    reader.each_tiles(
        run, lambda loaded, first: add_masses(reader, masses, kept, run, loaded, first)
    )
    masses.join()
    for n in T.unroll(masses.mass.shape[0]):
        for h in T.unroll(2):
            head = n * TILE_HEADS + lane * 2 + h
            if quad == 0 and head < num_heads and run.count > 0:
                parts[row.batch, row.kv_head, number, head, 0] = masses.largest[n, h]
                parts[row.batch, row.kv_head, number, head, 1] = masses.mass[n, h]


@T.macro
def fold_parts(parts, num_parts, row, num_warps, norms):
    """norms = log2 of the sum of the softmax's weights, of every head, in one order; 0 where no
    score is finite. A warp takes a head."""
    num_heads = int(parts.shape[3])
    top = T.alloc_var(T.float32)
    total = T.alloc_var(T.float32)
    warp, in_warp = T.get_thread_binding() // 32, T.get_thread_binding() % 32
    for turn in T.serial(-(-num_heads // num_warps)):
        head = turn * num_warps + warp
        if head < num_heads:
            top = -T.infinity(T.float32)
            total = 0.0
            for chunk in T.serial(steps_over(num_parts, 32)):
                part = chunk * 32 + in_warp
                if part < num_parts:
                    top, total = join_masses(
                        top, total, parts[row.batch, row.kv_head, part, head, 0],
                        parts[row.batch, row.kv_head, part, head, 1],
                    )  # fmt: skip
            top, total = join_masses_of_lanes(top, total, 32)
            if in_warp == 0:
                norms[row.batch, row.kv_head, head] = T.if_then_else(
                    total > 0.0, top + T.log2(total), 0.0
                )


class Meeting(NamedTuple):
    """Where the blocks of a row meet, and how far it got with its norms and scores."""

    norms: Buffer  # [batch_size, num_rows, heads] f32
    arrived: Buffer  # [batch_size, num_rows] i32
    scored: Buffer  # [batch_size, num_rows, runs] i32
    parts: Buffer = None  # [batch_size, num_rows, runs, heads, 2] f32; of the first kernel alone


@T.macro
def weigh_chunk(reader, masses, kept, meeting, chunk, config, written, bins, load_query):
    """Adds up the weights of a chunk of a row, and scores it where the row's norms are there in
    time. `load_query()` loads the reader's query."""
    norms, arrived, scored, parts = meeting
    row, num_threads, thread = reader.row, config.num_warps * 32, T.get_thread_binding()
    batch, kv_head = row.batch, row.kv_head
    num_chunks = T.ceildiv(row.seq_len, config.block_tokens)
    is_last = T.alloc_shared((1,), T.bool, scope="shared")
    has_norms = T.alloc_shared((1,), T.bool, scope="shared")
    before = T.alloc_var(T.int32)
    looks = T.alloc_var(T.int32)
    if chunk < num_chunks:
        written.clear()
        load_query()
        reader.each_run(
            chunk, config,
            lambda run, number: add_run(reader, masses, kept, parts, run, number),
        )  # fmt: skip
        T.sync_threads()
        if thread == 0:
            before = T.atomic_add(
                arrived[batch, kv_head], 1, memory_order="acq_rel", return_prev=True
            )
            is_last[0] = before == num_chunks - 1
            has_norms[0] = is_last[0]
        T.sync_threads()
        if is_last[0]:
            num_parts = steps_over(row.seq_len, RUN_TOKENS)
            fold_parts(parts, num_parts, row, config.num_warps, norms)
            T.sync_threads()
            if thread == 0:
                # TileLang 0.1.15 drops the order of an atomic that returns nothing: others could
                # see this one before the norms.
                before = T.atomic_add(
                    arrived[batch, kv_head], DONE, memory_order="acq_rel", return_prev=True
                )
        else:
            if thread == 0:
                looks = 0
                before = 0
                while before < DONE and looks < MAX_LOOKS:
                    before = T.atomic_add(
                        arrived[batch, kv_head], 0, memory_order="acq_rel", return_prev=True
                    )
                    looks += 1
                has_norms[0] = before >= DONE
            T.sync_threads()
        if thread == 0:
            scored[batch, kv_head, chunk] = T.if_then_else(has_norms[0], 1, 0)
        if has_norms[0]:
            kept.each_score(
                norms, row, num_threads, lambda token, score: written.write(token, score)
            )
            T.sync_threads()
            written.count_in(bins)


def blocks_at_least(rows: TokenRows, config: LabelScoreConfig) -> int:
    """Of an SM: five of four warps, which leave a thread 96 registers, where these are enough."""
    assert rows.labels is not None
    few = rows.heads <= 4 and rows.labels.num_bytes * config.tiles <= 64
    return 5 if few and config.num_warps <= 4 else 1


@tilelang.jit(pass_configs=THREAD_LEVEL)
def label_mass_kernel(page_size: int, dtype: str, rows: TokenRows, config: LabelScoreConfig):
    """Grid: (chunk of a row, row, batch); a warp takes a run, `tiles` tiles at a time.

    The block that is the last of its row to have added up its weights folds those of all into the
    row's norms. The others wait for them, with their logits in shared memory, and score their
    tokens. A block that has waited for too long leaves that to the kernel that comes next, to the
    same bits: so none depends on another, whatever runs on the GPU beside them.
    """
    batch_size, num_rows, head_dim = T.dynamic("batch_size, num_rows, head_dim")
    num_pages, max_pages = T.dynamic("num_pages, max_pages")
    num_label_heads, num_runs, capacity = T.dynamic("num_label_heads, num_runs, capacity")
    assert rows.labels is not None
    num_heads, r = rows.heads, rows.labels.r
    unit, units = rows.labels.lane_words
    num_threads = config.num_warps * 32
    grid = (T.ceildiv(max_pages * page_size, config.block_tokens), num_rows, batch_size)

    @T.prim_func
    def label_mass(
        q: T.StridedTensor[strided("q", (batch_size, num_rows, num_heads, head_dim), dtype)],
        channels: T.Tensor[(num_label_heads, r), T.int32],
        codes: T.Tensor[(num_pages, num_label_heads, page_size, units * QUAD), unit],
        scale_zero: T.Tensor[(num_pages, num_label_heads, page_size, 2), T.float16],
        page_table: T.Tensor[(batch_size, max_pages), T.int32],
        seq_lens: T.Tensor[(batch_size,), T.int32],
        sm_scale: T.float32,
        num_sink_tokens: T.int32,
        num_recent_tokens: T.int32,
        norms: T.Tensor[(batch_size, num_rows, num_heads), T.float32],
        arrived: T.Tensor[(batch_size, num_rows), T.int32],
        scored: T.Tensor[(batch_size, num_rows, num_runs), T.int32],
        scores: T.Tensor[(batch_size, num_rows, capacity), T.float32],
        bins: T.Tensor[(batch_size, num_rows, NUM_BINS), T.int32],
        parts: T.Tensor[(batch_size, num_rows, num_runs, num_heads, 2), T.float32],
    ):
        with T.Kernel(*grid, threads=num_threads) as (chunk, kv_head, batch):
            T.annotate_min_blocks_per_sm(blocks_at_least(rows, config))
            start_early(config.pdl)
            row = Row(batch, kv_head, seq_lens[batch])
            reader = LabelReader.allocate(row, rows, codes, scale_zero, page_table, config.tiles)
            masses = Masses.allocate(rows)
            kept = KeptLogits.allocate(rows, config, chunk)
            open_tokens = OpenTokens.of(row.seq_len, num_sink_tokens, num_recent_tokens)
            written = RowScores.allocate(scores, row, open_tokens, SHARES, num_threads)
            weigh_chunk(
                reader, masses, kept, Meeting(norms, arrived, scored, parts), chunk, config,
                written, bins,
                lambda: reader.query.load(q, channels, row, rows, sm_scale * LOG2_E),
            )  # fmt: skip

    return label_mass
