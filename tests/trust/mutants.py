"""Faults for `make mutants` to plant, one at a time: each must be caught by the tests it names.

A fault replaces one piece of a kernel's source by another, wherever it stands in the file.
"""

from typing import NamedTuple

CACHE = ("tests/test_cache.py", "-k", "not 64_bit")
SELECTOR = ("tests/test_selector.py",)
DOUBLE_SPARSITY = ("tests/test_double_sparsity.py",)
SIGNS = ("tests/test_sign_selector.py",)
ESTIMATOR = ("tests/test_estimator.py",)
ESTIMATE_PRUNE = ("tests/test_estimate_prune.py",)
PRUNER = ("tests/test_pruner.py",)
ATTENTION = ("tests/test_attention.py",)
DENSE = ("tests/test_attention.py", "-k", "dense")
FP8 = ("tests/test_fp8.py",)
WINDOWS = ("tests/test_pruner.py", "-k", "sinks")
FLOOR = ("tests/test_pruner.py", "-k", "heaviest")
REPEATED = ("tests/test_pipeline.py", "-k", "counters or replays")
SMOOTH = ("tests/test_smoothing.py",)
ALL_MASS = ("tests/test_candidate_mass.py",)
COMPILED = ("tests/test_compile.py", "-k", "gqa4-d128-sm_90a")

MIRRORED = ("tests/emulated/test_cache.py", "-k", "prefill_mirror and gqa4 and not padded")
APPENDED = ("tests/emulated/test_cache.py", "-k", "append_fills and 16")
FULL = ("tests/emulated/test_cache.py", "-k", "append_leaves_a_full")
STARTED = ("tests/emulated/test_requests.py", "-k", "append_starts")
LEFT_OUT = ("tests/emulated/test_requests.py", "-k", "append_passes_over or without_a_place")
CHUNKED = ("tests/emulated/test_requests.py", "-k", "chunk")
LISTED = ("tests/emulated/test_requests.py", "-k", "pages_of_an_engine")
FORKED = ("tests/emulated/test_requests.py", "-k", "fork or cut_back")
SCORED = ("tests/emulated/test_selector.py", "-k", "page_scores and gqa4 and default")
TOPPED = ("tests/emulated/test_selector.py", "-k", "top_pages and registers")
LABELLED = ("tests/emulated/test_labels.py", "-k", "as_it_comes and r16")
SIGNED = ("tests/emulated/test_sign_codes.py", "-k", "as_it_comes and d128")
SIGN_SCORED = ("tests/emulated/test_sign_selector.py", "-k", "stated and mha")
SIGN_GROUPED = ("tests/emulated/test_sign_selector.py", "-k", "stated and gqa16")
SIGN_SMOOTHED = ("tests/emulated/test_sign_selector.py", "-k", "smoothed")
SIGN_LOGITS = ("tests/emulated/test_sign_selector.py", "-k", "logits_of_every and mha")
SIGN_LOGITS_GROUPED = ("tests/emulated/test_sign_selector.py", "-k", "logits_of_every and gqa16")
LABEL_SCORED = ("tests/emulated/test_label_scores.py", "-k", "gqa4-r64 and not one-warp")
TOKENS_TAKEN = ("tests/emulated/test_top_tokens.py", "-k", "default")
UNITED = ("tests/emulated/test_double_sparsity.py", "-k", "gqa4-own-channels")
FUSED = ("tests/emulated/test_estimate_prune.py", "-k", "fused and (gqa3 or two-at-once) and none")
ESTIMATED = ("tests/emulated/test_estimator.py", "-k", "estimated_logits and gqa4 and default")
RANGED = ("tests/emulated/test_estimator.py", "-k", "range_of_fp16")
PRUNED = (
    "tests/emulated/test_pruner.py",
    *("-k", "pruned_sets and (gqa4 or gqa3 or heads-apart) and (normal or skewed)"),
)
FLOORED = (
    "tests/emulated/test_pruner.py",
    *("-k", "heaviest and (gqa4 or gqa3) and (below-one or geometric)"),
)
EVERY_TOKEN = (
    "tests/emulated/test_pruner.py",
    *("-k", "every_token and (gqa3 or wide-walk) and (below-one or geometric) and 256"),
)
PRUNED_APART = ("tests/emulated/test_pruner.py", "-k", "pruned_sets and heads-apart and normal")
PRUNED_WIDE = ("tests/emulated/test_pruner.py", "-k", "pruned_sets and wide and skewed")
UNKNOWN = ("tests/emulated/test_pruner.py", "-k", "without_a_softmax and gqa3")
ATTENDED_FP8 = ("tests/emulated/test_fp8.py", "-k", "attention_reads and gqa4 and e4m3")
ATTENDED = (
    "tests/emulated/test_attention.py",
    *("-k", "attention_matches and (gqa4 or mha) and (tokens or pages)"),
)
ATTENDED_TO_ALL = (
    "tests/emulated/test_attention.py", "-k", "attention_matches and gqa4 and all and not short",
)  # fmt: skip
DIVIDED = ("tests/emulated/test_smoothing.py", "-k", "every_writer and mha")
MULTIPLIED = ("tests/emulated/test_smoothing.py", "-k", "page_scores and mha")
SAMPLED = (
    "tests/emulated/test_candidate_mass.py",
    *("-k", "share_matches and gqa4 and not padded"),
)
BOUNDED = ("tests/emulated/test_smoothing.py", "-k", "bound_says_so and mha and full")


def of_tokens(words: str) -> tuple[str, ...]:
    return "tests/emulated/test_token_candidates.py", "-k", words


TOKENS = ("tests/test_token_candidates.py",)
TOKENS_ESTIMATED = of_tokens("estimated_logits and gqa4 and not own and not padded")
TOKENS_PRUNED = of_tokens("both_forms and gqa4 and not own and not padded")
TOKENS_BOUNDED = of_tokens("bound_matches and gqa4 and not own and not padded")
OWN_ESTIMATED = of_tokens("estimated_logits and own-gqa4 and not padded")
OWN_FORCED = of_tokens("no_head")
OWN_UNKNOWN = of_tokens("a_head_without")
OWN_BOUNDED = of_tokens("bound_matches and own-gqa4 and not padded")
OWN_ATTENDED = (
    "tests/emulated/test_attention.py",
    *("-k", "attention_matches and gqa4 and head_tokens and not padded"),
)


class Mutant(NamedTuple):
    """One fault, and the arguments of pytest that select the tests to catch it."""

    name: str
    file: str  # in kernels/
    before: str
    after: str
    gpu: tuple[str, ...]  # tests of the GPU suite
    emulated: tuple[str, ...] = ()  # and those that see it on any machine


MUTANTS = (
    Mutant(
        "4-bit zero rounds up", "quantize.py",
        "T.float32) > low:", "T.float32) < low:", CACHE, APPENDED,
    ),
    Mutant(
        "4-bit scale rounds down", "quantize.py",
        "T.float32) < scale:", "T.float32) > scale:", CACHE, MIRRORED,
    ),
    Mutant(
        "largest 4-bit code never used", "quantize.py",
        "T.float32(max_code))\n    return", "T.float32(max_code - 1))\n    return", CACHE, MIRRORED,
    ),
    Mutant(
        "nibbles swapped", "mirror.py",
        "T.cast(even + odd * 16, T.uint8)", "T.cast(odd + even * 16, T.uint8)", CACHE, MIRRORED,
    ),
    Mutant(
        "bounds' scale not widened", "mirror.py",
        "SCALE_UP = 1 + 2**-20", "SCALE_UP = 1", CACHE, MIRRORED,
    ),
    Mutant(
        "offset not subtracted from keys", "mirror.py",
        "moved = T.cast(value, T.float32) - shift[0, c]",
        "moved = T.cast(value, T.float32)", CACHE, APPENDED,
    ),
    Mutant(
        "keys not divided by their factor", "mirror.py",
        "return moved / shift[1, c] if int(shift.shape[0]) > 1 else moved", "return moved",
        SMOOTH, DIVIDED,
    ),
    Mutant(
        "queries not multiplied by the factor", "mma.py",
        "T.cast(words[i * run + j], T.float32) * factor", "T.cast(words[i * run + j], T.float32)",
        SMOOTH, MULTIPLIED,
    ),
    Mutant(
        "the bound takes half of a logit's error", "mass_bound.py",
        "(0.5 + 2.0**-9)", "(0.25 + 2.0**-9)", SMOOTH, BOUNDED,
    ),
    Mutant(
        "the bound overlooks the first kept token of a tile", "mass_bound.py",
        "at = low + ahead", "at = low + ahead + 1", SMOOTH, BOUNDED,
    ),
    Mutant(
        "the token before a candidate sampled in place of the one behind it", "candidate_mass.py",
        "candidates.run <= nth:", "candidates.run < nth:", ALL_MASS, SAMPLED,
    ),
    Mutant(
        "a mark's own token sampled in place of the one behind it", "candidate_mass.py",
        "self.left_out[middle] <= nth:", "self.left_out[middle] < nth:", ALL_MASS, SAMPLED,
    ),
    Mutant(
        "the candidates before a mark passed over", "candidate_mass.py",
        "(passed - 1) * marks.stride + 1", "passed * marks.stride", ALL_MASS, SAMPLED,
    ),
    Mutant(
        "a sampled token stands for itself alone", "candidate_mass.py",
        "others += size * weight", "others += weight", ALL_MASS, SAMPLED,
    ),
    Mutant(
        "top_p not divided by the candidates' share", "top_p.py",
        "asked < of_all), asked / of_all, 1.0)", "asked < of_all), asked, 1.0)", ALL_MASS, SAMPLED,
    ),
    Mutant(
        "append bounds a page without its last row", "mirror.py",
        "T.min(chunk * SLOTS_IN_FLIGHT + s, slot - 1)",
        "T.min(chunk * SLOTS_IN_FLIGHT + s, T.max(slot - 2, 0))", CACHE, APPENDED,
    ),
    Mutant(
        "append writes beyond the capacity", "mirror.py",
        "and token < max_pages * page_size:", "and token <= max_pages * page_size:", CACHE, FULL,
    ),
    Mutant(
        "append ignores its mask", "mirror.py",
        "if active[batch] != T.uint8(0) and token >= 0", "if token >= 0", CACHE, LEFT_OUT,
    ),
    Mutant(
        "append writes a page behind the pool", "mirror.py",
        "if page >= 0 and page < num_pages and not", "if page >= 0 and page <= num_pages and not",
        CACHE, LEFT_OUT,
    ),
    Mutant(
        "append takes padding of zeros for a request", "mirror.py",
        "page < num_pages and not no_request:", "page < num_pages:", CACHE, LEFT_OUT,
    ),
    Mutant(
        "a request whose table has one page is padding", "mirror.py",
        "length == 0 and max_pages > 1 and", "length == 0 and", CACHE, STARTED,
    ),
    Mutant(
        "a request with tokens is padding where its pages repeat", "mirror.py",
        "return length == 0 and max_pages", "return length >= 0 and max_pages", CACHE, STARTED,
    ),
    Mutant(
        "mirror_pages writes a page before the pool", "mirror.py",
        "if page >= 0 and page < num_pages and source >= 0",
        "if page >= -1 and page < num_pages and source >= -1", CACHE, LISTED,
    ),
    Mutant(
        "a fork's page without its keys", "mirror.py",
        "if source != page:", "if source == page:", CACHE, FORKED,
    ),
    Mutant(
        "a chunk's first key not mirrored", "mirror.py",
        "if slot >= first:", "if slot > first:", CACHE, CHUNKED,
    ),
    Mutant(
        "extend skips a page's last slot", "extend.py",
        "end = T.min(page_size, slot + end)", "end = T.min(page_size - 1, slot + end)",
        CACHE, CHUNKED,
    ),
    Mutant(
        "extend gives a request's first token to the one before", "extend.py",
        "<= token\n", "< token\n", CACHE, CHUNKED,
    ),
    Mutant(
        "extend writes behind a missing page", "extend.py",
        "page_table, request, start // page_size, logical + 1, num_pages",
        "page_table, request, logical, logical + 1, num_pages", CACHE, LEFT_OUT,
    ),
    Mutant(
        "extend writes beyond the capacity", "extend.py",
        "position < max_pages * page_size", "position <= max_pages * page_size", CACHE, LEFT_OUT,
    ),
    Mutant(
        "lengths move past a missing page", "extend.py",
        "seq_lens[request] = T.min(end, hole * page_size)", "seq_lens[request] = end",
        CACHE, LEFT_OUT,
    ),
    Mutant(
        "arrivals of blocks not left at zero", "extend.py",
        "arrived[0] = 0", "arrived[0] = 1", CACHE, CHUNKED,
    ),
    Mutant(
        "a fork appends to its parent's page", "requests.py",
        "torch.where(in_last > 0, targets, sources)[:, None]", "sources[:, None]", CACHE, FORKED,
    ),
    Mutant(
        "a request that is cut back keeps its bounds", "requests.py",
        "pages = torch.where(is_cut, pages, -1)", "pages = torch.where(is_cut, -1, pages)",
        CACHE, FORKED,
    ),
    Mutant(
        "bounds of negative queries", "page_scores.py",
        "else T.min(channel, T.float16(0))", "else T.max(channel, T.float16(0))", SELECTOR, SCORED,
    ),
    Mutant(
        "query heads beyond a group's first left out", "mma.py",
        "head = T.min(n * TILE_HEADS + quad, group_size - 1)", "head = 0", SELECTOR, SCORED,
    ),
    Mutant(
        "a page before the newest is never scored", "page_scores.py",
        "if lane == t and page < used_pages:", "if lane == t and page < used_pages - 2:",
        SELECTOR, SCORED,
    ),
    Mutant(
        "newest page not forced", "top_pages.py",
        "page_size, num_pages - 1\n", "page_size, num_pages\n", SELECTOR, TOPPED,
    ),
    Mutant(
        "part of a sink page not forced", "top_pages.py",
        "first_open = T.ceildiv(num_sink_tokens, page_size)",
        "first_open = num_sink_tokens // page_size", SELECTOR, TOPPED,
    ),
    Mutant(
        "a tied page dropped", "top_pages.py",
        "and -page >= ties.low", "and -page > ties.low", SELECTOR, TOPPED,
    ),
    Mutant(
        "> for >= at the page threshold", "top_pages.py",
        "or key > search.low", "or key >= search.low", SELECTOR, TOPPED,
    ),
    Mutant(
        "a label's codes in reverse", "labels.py",
        "code << (c * labels.shape.bits)", "code << ((per_byte - 1 - c) * labels.shape.bits)",
        DOUBLE_SPARSITY, LABELLED,
    ),
    Mutant(
        "a label's range is that of its first channels", "labels.py",
        "for i in T.unroll(turns * per_byte):", "for i in T.unroll(1):", DOUBLE_SPARSITY, LABELLED,
    ),
    Mutant(
        "append leaves labels out", "mirror.py",
        "if labels is not None:", "if False:", DOUBLE_SPARSITY, LABELLED,
    ),
    Mutant(
        "signs of keys that are not centred", "sign_codes.py",
        "x[c] = x[c] - mean.value[c]", "x[c] = x[c] - 0.0 * mean.value[c]", SIGNS, SIGNED,
    ),
    Mutant(
        "the mean of a block is that of the one before", "sign_codes.py",
        "mean.write(keys, block, signs, scale, zero)",
        "mean.write(keys, block - 1, signs, scale, zero)", SIGNS, SIGNED,
    ),
    Mutant(
        "signs of a row that append leaves out", "sign_codes.py",
        "active[batch] != T.uint8(0) and first < end", "first < end", SIGNS, SIGNED,
    ),
    Mutant(
        "the codes of a fork's copied page left out", "requests.py",
        "first = torch.where(is_copied, lengths - in_last, self.seq_lens)",
        "first = self.seq_lens", SIGNS, SIGNED,
    ),
    Mutant(
        "a query's levels cut off, not rounded", "sign_query.py",
        "level = T.nearbyint(", "level = T.trunc(", SIGNS, SIGN_SCORED,
    ),
    Mutant(
        "the highest plane counts positively", "sign_tiles.py",
        "- (counts[1, t * 2 + 1] << 4)", "+ (counts[1, t * 2 + 1] << 4)", SIGNS, SIGN_SCORED,
    ),
    Mutant(
        "a logit without the mean's product", "sign_tiles.py",
        "unit, product, self.base[n])", "unit, product, T.float32(0))", SIGNS, SIGN_SCORED,
    ),
    Mutant(
        "the mean's product of the first block of a run alone", "sign_tiles.py",
        "first // BLOCK_TILES,", "0,", SIGNS, SIGN_SCORED,
    ),
    Mutant(
        "half of a group's heads do not score", "sign_tiles.py",
        "T.max, query.columns)", "T.max, query.columns // 2)", SIGNS, SIGN_GROUPED,
    ),
    Mutant(
        "of sixteen heads the first four score", "sign_tiles.py",
        "T.max(best[half * 2 + t], logit)", "best[half * 2 + t]", SIGNS, SIGN_GROUPED,
    ),
    Mutant(
        "heads are compared without k_offset", "sign_query.py",
        "shift * factor", "0.0 * shift", SIGNS, SIGN_SMOOTHED,
    ),
    Mutant(
        "the logit behind a row's last token is one", "sign_logits.py",
        "GROUP_TOKENS + i >= row.seq_len:", "GROUP_TOKENS + i > row.seq_len:", SIGNS, SIGN_LOGITS,
    ),
    Mutant(
        "logits of later heads are the larger ones of them and the first", "sign_logits.py",
        "reader.find_logits(n, True)", "reader.find_logits(n, n == 0)",
        SIGNS, SIGN_LOGITS_GROUPED,
    ),
    Mutant(
        "half of a quad's tokens have no logit", "sign_logits.py",
        "for i in T.vectorized(GROUP_TOKENS):", "for i in T.vectorized(GROUP_TOKENS // 2):",
        SIGNS, SIGN_LOGITS,
    ),
    Mutant(
        "a floor of many tokens looks as far as one warp's", "search_team.py",
        "T.max if least <= MAX_FLOOR else T.min", "T.max", SIGNS, EVERY_TOKEN,
    ),
    Mutant(
        "codes further up weigh as much as others", "label_query.py",
        "weight = power_of_two(-masks.up(register))", "weight = T.float32(1)",
        DOUBLE_SPARSITY, LABEL_SCORED,
    ),
    Mutant(
        "a logit without its zero point", "label_tiles.py",
        "scale, product, zero * query.sums[n, h])", "scale, product, T.float32(0))",
        DOUBLE_SPARSITY, LABEL_SCORED,
    ),
    Mutant(
        "heads are not compared by their norms", "label_mass.py",
        "own[head + 1] - own_norms[head + 1]", "own[head + 1] - own_norms[0]",
        DOUBLE_SPARSITY, LABEL_SCORED,
    ),
    Mutant(
        "nor where a block has not waited for them", "label_scores.py",
        "other - norms[n, h]", "other - norms[0, 0]", DOUBLE_SPARSITY, LABEL_SCORED,
    ),
    Mutant(
        "a row's last token has no weight", "label_mass.py",
        "loaded.lane_tokens) >= seq_len:", "loaded.lane_tokens) >= seq_len - 1:",
        DOUBLE_SPARSITY, LABEL_SCORED,
    ),
    Mutant(
        "scores by norms that are not there", "label_mass.py",
        "has_norms[0] = before >= DONE", "has_norms[0] = before >= 0",
        DOUBLE_SPARSITY, LABEL_SCORED,
    ),
    Mutant(
        "chunks that have not waited are never scored", "label_scores.py",
        "scored[batch, kv_head, own] == 0", "scored[batch, kv_head, own] == 2",
        DOUBLE_SPARSITY, LABEL_SCORED,
    ),
    Mutant(
        "norms are taken to be there the next time", "label_scores.py",
        "arrived[batch, kv_head] = 0", "arrived[batch, kv_head] = 1",
        DOUBLE_SPARSITY, LABEL_SCORED,
    ),
    Mutant(
        "-0 below +0", "token_keys.py",
        "T.if_then_else(bits < 0, -size, size)", "T.if_then_else(bits < 0, -1 - size, size)",
        DOUBLE_SPARSITY, TOKENS_TAKEN,
    ),
    Mutant(
        "NaN before all", "token_keys.py",
        "size > INFINITY_BITS, LOWEST_KEY, signed", "size > INFINITY_BITS, HIGHEST_KEY, signed",
        DOUBLE_SPARSITY, TOKENS_TAKEN,
    ),
    Mutant(
        "tokens are counted in the nearest bin", "token_keys.py",
        "return T.cast(place, T.int32)", "return T.cast(place + 0.5, T.int32)",
        DOUBLE_SPARSITY, LABEL_SCORED,
    ),
    Mutant(
        "the first recent token not forced", "token_keys.py",
        "position < self.end)", "position <= self.end)", DOUBLE_SPARSITY, TOKENS_TAKEN,
    ),
    Mutant(
        "a tied token dropped", "near_tokens.py",
        "and -token >= ties.low", "and -token > ties.low", DOUBLE_SPARSITY, TOKENS_TAKEN,
    ),
    Mutant(
        "of a few equal tokens the last", "near_tokens.py",
        "places[i] = T.uint32(2**32 - 1) - T.cast", "places[i] = T.uint32(1) + T.cast",
        DOUBLE_SPARSITY, TOKENS_TAKEN,
    ),
    Mutant(
        "one near token too many", "near_tokens.py",
        "nth_largest(keys, left)", "nth_largest(keys, left + 1)", DOUBLE_SPARSITY, TOKENS_TAKEN,
    ),
    Mutant(
        "near tokens told apart but for the last bit", "near_tokens.py",
        "for step in T.serial(num_bits):", "for step in T.serial(num_bits - 1):",
        DOUBLE_SPARSITY, TOKENS_TAKEN,
    ),
    Mutant(
        "tokens of the bin left open are taken", "token_cut.py",
        "near[0] + 1.0 / NUM_BINS", "near[0] + 0.0 / NUM_BINS", DOUBLE_SPARSITY, TOKENS_TAKEN,
    ),
    Mutant(
        "sinks are taken beside those of the bin left open", "token_cut.py",
        "if cut.taken[0] > 1.0:", "if cut.taken[0] > 9.0:", DOUBLE_SPARSITY, TOKENS_TAKEN,
    ),
    Mutant(
        "a load asked for again is that of the next turn", "token_cut.py",
        "(NUM_THREADS // 32 + 1) if load", "(NUM_THREADS // 32) if load",
        DOUBLE_SPARSITY, TOKENS_TAKEN,
    ),
    Mutant(
        "a word of bits for the next lanes' tokens", "token_bits.py",
        "lane // 8 * 32", "(lane // 8 + 1) % 4 * 32", DOUBLE_SPARSITY, TOKENS_TAKEN,
    ),
    Mutant(
        "every word lists a thread's first tokens", "token_bits.py",
        "(thread * per_thread + at) * 32", "(thread * per_thread) * 32",
        DOUBLE_SPARSITY, TOKENS_TAKEN,
    ),
    Mutant(
        "bins are left as they were", "top_tokens.py",
        "bins[row, thread * OWN_BINS + j] = 0",
        "bins[row, thread * OWN_BINS + j] += 0", DOUBLE_SPARSITY, TOKENS_TAKEN,
    ),
    Mutant(
        "a union without its last head", "token_union.py",
        "union = union | own[head]",
        "union = union | T.if_then_else(head == group_size - 1, T.uint32(0), own[head])",
        DOUBLE_SPARSITY, UNITED,
    ),
    Mutant(
        "odd channels weigh double", "estimate_tiles.py",
        "1.0, 0.0625)", "1.0, 0.125)", ESTIMATOR, ESTIMATED,
    ),
    Mutant(
        "zero point left out", "estimate_tiles.py",
        "acc[t * 2 + h], zero * query.sums[n, h]", "acc[t * 2 + h], T.float32(0)",
        ESTIMATOR, ESTIMATED,
    ),
    Mutant(
        "a logit behind the last token", "estimate_tiles.py",
        "if quad + t * 8 >= tokens_left:", "if quad + t * 8 > tokens_left:", ESTIMATOR, ESTIMATED,
    ),
    Mutant(
        "codes of a warp's first page for all its tiles", "estimate_tiles.py",
        "next_physical[i, 0], self.next_physical[0, 0])",
        "next_physical[0, 0], self.next_physical[0, 0])", ESTIMATOR, ESTIMATED,
    ),
    Mutant(
        "a tile's second token in the page of its first", "estimate_tiles.py",
        "index < end, self.next_physical[i, t], 0)", "index < end, self.next_physical[i, 0], 0)",
        TOKENS, TOKENS_ESTIMATED,
    ),
    Mutant(
        "a listed token looked up as if it were a page", "estimate_tiles.py",
        "page_entries = candidates.page_size // candidates.run", "page_entries = 1",
        TOKENS, TOKENS_ESTIMATED,
    ),
    Mutant(
        "logits of tokens that are another head's", "estimate_tiles.py",
        "n * TILE_HEADS + lane * 2 + h)", "n * TILE_HEADS + lane * 2)", TOKENS, OWN_ESTIMATED,
    ),
    Mutant(
        "neighbouring quads not swapped back", "estimate_tiles.py",
        "T.if_then_else(is_odd, 0x1054, 0x5410)", "0x5410", ESTIMATOR, ESTIMATED,
    ),
    Mutant(
        "a large logit left to overflow", "estimate_tiles.py",
        "if T.abs(logit[h, t]) > MAX_LOGIT:", "if T.abs(logit[h, t]) > 2 * MAX_LOGIT:",
        ESTIMATOR, RANGED,
    ),
    Mutant(
        "fused: warps take overlapping tiles", "estimate_prune.py",
        "T.get_thread_binding() // 32 * config.tiles_per_warp",
        "T.get_thread_binding() // 64 * config.tiles_per_warp", ESTIMATE_PRUNE, FUSED,
    ),
    Mutant(
        "fused: first head searched for all", "estimate_prune.py",
        "lambda head, at: logits[head, at]", "lambda head, at: logits[0, at]",
        ESTIMATE_PRUNE, FUSED,
    ),
    Mutant(
        "last query head of a group dropped from the union", "search_team.py",
        "T.min(turn * self.at_once + team, self.number - 1)",
        "T.min(turn * self.at_once + team, T.max(self.number - 2, 0))", PRUNER, PRUNED,
    ),
    Mutant(
        "a little less mass than asked for", "top_p.py",
        "T.ceil(p * UNITY)", "T.ceil(p * UNITY * 0.999)", PRUNER, PRUNED,
    ),
    Mutant(
        "masses a little too small", "softmax_weights.py",
        "weight(distance) * self.scale + 0.5", "weight(distance) * self.scale * 0.999",
        PRUNER, PRUNED,
    ),
    Mutant(
        "light weights cut that are needed", "top_p.py",
        "* total * 0.9999", "* total * 20.0", PRUNER, PRUNED,
    ),
    Mutant(
        "softmax summed over half of the warps", "search_team.py",
        "T.unroll(1, NUM_THREADS // 32)", "T.unroll(1, NUM_THREADS // 64)", PRUNER, PRUNED,
    ),
    Mutant(
        "arrivals of heads not left at zero", "pruner.py",
        "arrived[row.batch, row.kv_head] = 0", "arrived[row.batch, row.kv_head] = 1",
        REPEATED, PRUNED_APART,
    ),
    Mutant(
        "one sink too few", "keep_mask.py",
        "windows.position(early) < windows.num_sink_tokens)",
        "windows.position(early) < windows.num_sink_tokens - 1)",
        WINDOWS, PRUNED,
    ),
    Mutant(
        "newest token not among the recent ones", "keep_mask.py",
        "late = num_tokens - 1 - (step", "late = num_tokens - 2 - (step", WINDOWS, PRUNED,
    ),
    Mutant(
        "one token fewer than the floor", "top_p.py",
        "farthest, need, min_kept_tokens, turn", "farthest, need, min_kept_tokens - 1, turn",
        FLOOR, FLOORED,
    ),
    Mutant(
        "the floor looked for among the weights that matter alone", "top_p.py",
        "reached = T.max(farthest, team.reach(weights, least))", "reached = farthest",
        FLOOR, FLOORED,
    ),
    Mutant(
        "the number above the chosen bin is forgotten", "threshold.py",
        "counts.above[team] = counts.running[0]", "counts.above[team] = 0", FLOOR, FLOORED,
    ),
    Mutant(
        "two bins' numbers in one half of a word", "threshold.py",
        "1 << (bin_index % per_word * HALF_WORD)", "1", FLOOR, FLOORED,
    ),
    Mutant(
        "a bit behind the last token at p = 1", "keep_mask.py",
        "T.max(word * 32 + 32 - num_tokens, 0)", "T.max(word * 32 + 31 - num_tokens, 0)",
        PRUNER, PRUNED,
    ),
    Mutant(
        "sinks forced on heads that they are no candidates of", "keep_mask.py",
        "return forced if self.is_own is None else T.And(forced, self.is_own(candidate))",
        "return forced", TOKENS, OWN_FORCED,
    ),
    Mutant(
        "a head without a softmax keeps what is another's", "keep_mask.py",
        "if is_own(candidate):", "if T.bool(True):", TOKENS, OWN_UNKNOWN,
    ),
    Mutant(
        "kept tokens listed as if they were neighbours", "keep_mask.py",
        'neighbours = candidates.kind in ("pages", "all")', "neighbours = True",
        TOKENS, TOKENS_PRUNED,
    ),
    Mutant(
        "the bound's kept token of a list counted once more", "mass_bound.py",
        "                at += 1", "                at += 2", TOKENS, TOKENS_BOUNDED,
    ),
    Mutant(
        "the bound counts what is another head's", "mass_bound.py",
        "T.And(listed, candidates.is_own(row, at, head)) if candidates.by_head else listed",
        "listed", TOKENS, OWN_BOUNDED,
    ),
    Mutant(
        "attention to what is another head's candidate", "attend_tiles.py",
        "owns(heads_of[j], T.min(i, group_size - 1))", "owns(heads_of[j], 0)",
        TOKENS, OWN_ATTENDED,
    ),
    Mutant(
        "a head without a token of an item spoils its result", "attend_tiles.py",
        "head_max[i] = T.max(head_max[i], LEAST_MAX)", "head_max[i] = head_max[i]",
        TOKENS, OWN_ATTENDED,
    ),
    Mutant(
        "NaN prunes everything", "top_p.py",
        "T.And(total >= 1.0, asked < 1.0)",
        "top_p[row.batch, row.kv_head, head]", PRUNER, UNKNOWN,
    ),
    Mutant(
        "no barrier before the bins are read", "threshold.py",
        "T.sync_threads()\n        for j in T.vectorized(BINS_PER_THREAD):\n            own[j]",
        "for j in T.vectorized(BINS_PER_THREAD):\n            own[j]", PRUNER, PRUNED,
    ),
    Mutant(
        "own warp counted twice in a prefix sum", "warp.py",
        "if each < warp:", "if each <= warp:", PRUNER, PRUNED,
    ),
    Mutant(
        "compaction forgets its first words", "threshold.py",
        "slot = count + before", "slot = before", PRUNER, PRUNED_WIDE,
    ),
    Mutant(
        "a full page counted after a part-filled one", "token_list.py",
        "num_tokens = (num_tokens - 1) * self.page_size + T.min(",
        "num_tokens = num_tokens * self.page_size + T.min(", ATTENTION, PRUNED,
    ),
    Mutant(
        "an item one token too long", "split_kv.py",
        "num_tokens - split * self.split_tokens)", "num_tokens - split * self.split_tokens + 1)",
        ATTENTION, ATTENDED,
    ),
    Mutant(
        "a row's last tile taken for a full one", "split_kv.py",
        "T.if_then_else(has_last, lacking, 0)", "0", DENSE, ATTENDED_TO_ALL,
    ),
    Mutant(
        "a split's next tile taken from the next split", "block_items.py",
        "place // self.split_tokens * row_splits", "place // self.split_tokens",
        DENSE, ATTENDED_TO_ALL,
    ),
    Mutant(
        "a split's sum not shrunk by a larger logit", "attend_tiles.py",
        "head_sum[i] *= shrink[i]", "head_sum[i] *= 1.0", DENSE, ATTENDED_TO_ALL,
    ),
    Mutant(
        "splits merged with a wrong scale", "split_kv.py",
        "total += scale * partial_lse", "total += partial_lse", ATTENTION, ATTENDED,
    ),
    Mutant(
        "ticket not left at zero", "split_kv.py",
        "ticket[0] = T.uint64(0)", "ticket[0] = T.uint64(1)", REPEATED, PRUNED,
    ),
    Mutant(
        "last token counted twice on tensor cores", "attend_tiles.py",
        "+ j < num_tokens", "+ j <= num_tokens", ATTENTION, ATTENDED,
    ),
    Mutant(
        "next item's page looked up for this item's request", "block_items.py",
        "self.page_of(1, i)", "self.page_of(0, i)", ATTENTION, ATTENDED,
    ),
    Mutant(
        "the same token looked up for two items", "block_items.py",
        "self.token_of(2, i)", "self.token_of(1, i)", ATTENTION, ATTENDED,
    ),
    Mutant(
        "last token counted twice in FP8", "attend_codes.py",
        "lambda s, offset: position(s, offset) < num_tokens",
        "lambda s, offset: position(s, offset) <= num_tokens", FP8, ATTENDED_FP8,
    ),
    Mutant(
        "two channels of a word taken twice", "attend_codes.py",
        "0x5140 + j % 2 * 0x2222", "0x5140", FP8, ATTENDED_FP8,
    ),
    Mutant(
        "logits without the scale of K", "attend_codes.py",
        "sm_scale * LOG2E * k_scale", "sm_scale * LOG2E", FP8, ATTENDED_FP8,
    ),
    Mutant(
        "last token counted twice on CUDA cores", "attend_lanes.py",
        "position(turn, t * warp_teams + team) < num_tokens",
        "position(turn, t * warp_teams + team) <= num_tokens", ATTENTION, ATTENDED,
    ),
    Mutant(
        "32-bit offsets into the cache", "compiling.py",
        "    PassKey.TL_DISABLE_SAFE_MEMORY_ACCESS: True,",
        "    PassKey.TL_DISABLE_SAFE_MEMORY_ACCESS: True,\n"
        "    PassKey.TL_CONFIG_INDEX_BITWIDTH: 32,", COMPILED, COMPILED,
    ),
)  # fmt: skip
