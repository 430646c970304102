"""A serving engine that runs for long: requests join in chunks, grow, fork, are cut back, leave
their row empty for a while; pages are reused.

    python -m tests.trust.soak [--steps 10000]

An engine of each selector has its share of the steps: of Quest, of Double Sparsity in a cache with
labels, of signs in a cache with sign codes. Freed pages keep what they held, or get NaN. Now and
then everything is compared with the fp64 oracle and with a cache built afresh from what was
appended.
"""

import argparse
import random
import time
from collections import Counter
from types import ModuleType

import torch

import twilight_tilelang as kernels
from tests.checks.promises import assert_identical, decoded, results_of
from tests.checks.properties import (
    assert_decode_step,
    assert_pruned_and_attended,
    with_reference_labels,
)
from tests.checks.requests import MIRROR
from tests.checks.signs import assert_signs_of_keys, assert_top_by_signs
from tests.checks.tokens import assert_tokens_selected
from tests.inputs.cases import Tensors, is_reference, with_labels_of
from tests.trust import ledger
from twilight_tilelang import reference
from twilight_tilelang.kernels.labels import LabelFormat
from twilight_tilelang.profiling.providers.checks import labels_by_query_head

NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 8, 2, 128, 16
SELECTORS = ("quest", "double_sparsity", "signs")
NUM_CHANNELS, LABEL_BITS = 64, 2
TOKEN_BUDGET, TOP_P = 512, 0.9
WINDOWS = {"num_sink_tokens": 4, "num_recent_tokens": 8}
ALWAYS = WINDOWS | {"min_kept_tokens": 32}
# Chances: of a request in a step, twice; of a join; of an empty row in a step; of a page.
LEAVES, IS_CUT, FORKS, JOINS, POISONS = 0.02, 0.02, 0.4, 0.3, 0.5


class Engine:
    """Requests in the slots of one cache, and beside it what each should hold."""

    def __init__(
        self,
        package: ModuleType,
        device: torch.device,
        batch_size: int,
        max_pages: int,
        selector: str,
        seed: int,
    ) -> None:
        self.package, self.device, self.max_pages = package, device, max_pages
        self.selector = selector
        self.random = random.Random(seed)
        self.rng = torch.Generator(device=device).manual_seed(seed)
        # The host's copy: which pages are whose is the engine's own business.
        self.table = torch.full((batch_size, max_pages), -1, dtype=torch.int32)
        sizes = (batch_size, max_pages, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE)
        cache = package.PagedKVCache.empty(
            package.CacheShape(*sizes, device=device),
            num_pages=batch_size * max_pages * 2 // 3,
            page_table=self.table.to(device, copy=True),
        )
        self.label_format = None
        if selector == "double_sparsity":
            self.label_format = self.draw_channels()
            cache = with_labels_of(cache, self.label_format, NUM_QO_HEADS)
        elif selector == "signs" and not is_reference(package):  # it makes them when they are asked
            cache = cache.with_signs()
        self.cache = cache
        self.users = [0] * self.cache.num_pages  # requests that hold each page
        self.owned: list[list[int]] = [[] for _ in range(batch_size)]
        self.lengths = [0] * batch_size
        shadow = (batch_size, max_pages * PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
        self.k, self.v = (torch.zeros(shadow, dtype=torch.float16, device=device) for _ in "kv")
        self.token_budget = min(TOKEN_BUDGET, max_pages * PAGE_SIZE // 2)
        self.options = {"selector": selector, "token_budget": self.token_budget, "top_p": TOP_P}
        self.options |= ALWAYS
        self.step = package.TwilightDecode(cache, NUM_QO_HEADS, **self.options)
        self.q = self.normal(batch_size, NUM_QO_HEADS, HEAD_DIM)
        self.new_k, self.new_v = (self.normal(batch_size, NUM_KV_HEADS, HEAD_DIM) for _ in "kv")
        self.graph = None
        names = ("steps", "checks", "joined", "forked", "cut", "empty_rows", "pages_reused")
        self.counts = dict.fromkeys(names, 0)
        self.ever_used: set[int] = set()
        for slot in range(batch_size):
            self.join(slot)

    def normal(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self.rng, device=self.device).half()

    def draw_channels(self) -> LabelFormat:
        order = torch.rand(NUM_KV_HEADS, HEAD_DIM, generator=self.rng, device=self.device)
        channels = order.argsort(-1)[:, :NUM_CHANNELS].int().contiguous()
        return LabelFormat(channels, LABEL_BITS)

    def take_page(self, slot: int) -> bool:
        """The slot's next page; False where none is free."""
        free = [page for page, users in enumerate(self.users) if users == 0]
        if not free:
            return False
        page = self.random.choice(free)
        self.counts["pages_reused"] += page in self.ever_used
        self.ever_used.add(page)
        self.hold(slot, [page])
        return True

    def hold(self, slot: int, pages: list[int]) -> None:
        for page in pages:
            self.users[page] += 1
            self.table[slot, len(self.owned[slot])] = page
            self.owned[slot].append(page)

    def rows(self, values: dict[int, int], other: int, dtype=torch.int32) -> torch.Tensor:
        """[batch_size]: a value for some rows, `other` for the rest."""
        listed = [values.get(slot, other) for slot in range(len(self.owned))]
        return torch.tensor(listed, dtype=dtype, device=self.device)

    def release(self, slot: int, num_kept: int) -> None:
        """The slot's pages from there on; those that nobody else holds are free, and hold leftovers
        or NaN."""
        for page in self.owned[slot][num_kept:]:
            self.users[page] -= 1
            if self.users[page] == 0 and self.random.random() < POISONS:
                self.poison(page)
        del self.owned[slot][num_kept:]
        self.table[slot, num_kept:] = -1

    def poison(self, page: int) -> None:
        """NaN, and codes of ones."""
        cache = self.cache
        written = [getattr(cache, name) for name in ("k_cache", "v_cache", *MIRROR)]
        if cache.labels is not None:
            written += [cache.labels.codes, cache.labels.scale_zero]
        written += getattr(cache, "signs", None) or ()
        for pool in written:
            ones = 255 if pool.dtype == torch.uint8 else -1
            pool[page] = torch.nan if pool.is_floating_point() else ones

    def leave(self, slot: int) -> None:
        self.release(slot, 0)
        self.lengths[slot] = 0
        self.cache.leave(self.rows({slot: True}, False, torch.bool))

    def fork(self, parent: int, slot: int, length: int) -> None:
        """The slot takes over the parent's first tokens; without a free page, those of full pages
        only."""
        num_full, in_last = divmod(length, PAGE_SIZE)
        shared = self.owned[parent][:num_full]
        self.release(slot, num_full if slot == parent else 0)
        if slot != parent:
            self.hold(slot, shared)
        has_page = in_last > 0 and self.take_page(slot)
        page = self.owned[slot][-1] if has_page else -1
        parents, pages = self.rows({slot: parent}, -1), self.rows({slot: page}, -1)
        self.cache.fork(parents, pages, self.rows({slot: length}, 0))
        self.lengths[slot] = length if has_page else num_full * PAGE_SIZE
        self.k[slot], self.v[slot] = self.k[parent], self.v[parent]

    def join(self, slot: int) -> None:
        """A request of no tokens, of a prompt in two chunks, or of another's tokens."""
        self.counts["joined"] += 1
        others = [each for each, length in enumerate(self.lengths) if each != slot and length > 0]
        if others and self.random.random() < FORKS:
            parent = self.random.choice(others)
            self.fork(parent, slot, self.random.randint(1, self.lengths[parent]))
            self.counts["forked"] += self.lengths[slot] > 0
            return
        length = self.random.randrange(self.max_pages * PAGE_SIZE * 2 // 3)
        needed = -(-length // PAGE_SIZE)
        if self.users.count(0) <= needed:
            return
        for _ in range(max(needed, 1)):
            self.take_page(slot)
        is_slot = self.rows({slot: True}, False, torch.bool)
        self.cache.join(is_slot, self.table.to(self.device), self.rows({}, 0))
        k, v = (self.normal(length, NUM_KV_HEADS, HEAD_DIM) for _ in "kv")
        heavy = torch.rand(length, 1, 1, generator=self.rng, device=self.device) < 1 / 16
        k += self.q[slot, :: NUM_QO_HEADS // NUM_KV_HEADS] * heavy
        cut = self.random.randint(0, length)
        for chunk in (slice(0, cut), slice(cut, length)):
            count = chunk.stop - chunk.start
            cu_seqlens = [count * (row > slot) for row in range(len(self.owned) + 1)]
            if count > 0:
                cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32, device=self.device)
                self.cache.extend(k[chunk], v[chunk], cu_seqlens)
        self.k[slot, :length], self.v[slot, :length] = k, v
        self.lengths[slot] = length

    def cut_back(self, slot: int) -> None:
        """Drops some tokens, as where drafts are refused. A page that others read too is left to
        them."""
        length = self.random.randint(max(self.lengths[slot] - 40, 1), self.lengths[slot])
        num_pages = -(-length // PAGE_SIZE)
        self.counts["cut"] += 1
        if length % PAGE_SIZE > 0 and self.users[self.owned[slot][num_pages - 1]] > 1:
            self.fork(slot, slot, length)
        else:
            self.release(slot, num_pages)
            self.lengths[slot] = length
            self.cache.truncate(self.rows({slot: length}, 2**30))

    def prepare(self) -> None:
        """Who leaves, leaves; every request gets a slot for its next token."""
        for slot, length in enumerate(self.lengths):
            if not self.owned[slot]:
                if self.random.random() < JOINS:
                    self.join(slot)
            elif length == self.max_pages * PAGE_SIZE or self.random.random() < LEAVES:
                self.leave(slot)
            elif self.random.random() < IS_CUT:
                self.cut_back(slot)
            is_full = self.lengths[slot] == len(self.owned[slot]) * PAGE_SIZE
            if self.owned[slot] and is_full and not self.take_page(slot):
                self.leave(slot)
        self.counts["empty_rows"] += self.owned.count([])
        self.cache.page_table.copy_(self.table)
        for buffer in (self.q, self.new_k, self.new_v):
            buffer.normal_(generator=self.rng)

    def decode(self) -> None:
        self.cache.append(self.new_k, self.new_v)
        self.out = self.step.run(self.q, self.cache)

    def advance(self) -> None:
        """One decode step; on a GPU as a replayed graph."""
        self.prepare()
        if self.device.type == "cuda" and self.counts["steps"] > 0:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self.decode()
            self.graph.replay()
        else:
            self.decode()
        slot = torch.arange(len(self.lengths), device=self.device)
        token = torch.tensor(self.lengths, device=self.device)
        self.k[slot, token], self.v[slot, token] = self.new_k, self.new_v
        self.lengths = [n + bool(own) for n, own in zip(self.lengths, self.owned, strict=True)]
        self.counts["steps"] += 1

    def check(self) -> None:
        """Against the oracle, and bit for bit against a cache that never lived."""
        assert self.cache.seq_lens.tolist() == self.lengths
        self.check_stages()
        fresh = Tensors(
            self.q, self.k, self.v, self.cache.seq_lens,
            torch.randperm(self.table.numel(), generator=self.rng, device=self.device)
            .int().view(self.table.shape),
            self.table.numel(), PAGE_SIZE, None, self.label_format, self.selector == "signs",
        )  # fmt: skip
        results = results_of(self.step, self.out, self.cache)
        lone = decoded(self.package, fresh, **self.options)
        for actual, expected in zip(results, lone, strict=True):
            assert_identical(actual, expected)
        self.check_mirror()
        if getattr(self.cache, "signs", None) is not None:
            assert_signs_of_keys(self.cache, validated=False)
        self.counts["checks"] += 1

    def check_stages(self) -> None:
        """Each judged on what the one before it gave."""
        step, out, q, cache = self.step, self.out, self.q, self.cache
        if self.selector == "quest":
            assert_decode_step(step, out, q, cache, self.token_budget, TOP_P, **ALWAYS)
            return
        if self.selector == "double_sparsity":
            own = with_reference_labels(cache, NUM_QO_HEADS)
            selection = step.candidates, self.token_budget, "shared", WINDOWS
            assert_tokens_selected(q, own, *selection)
        else:
            assert_top_by_signs(q, cache, step.candidates, self.token_budget, WINDOWS)
        assert_pruned_and_attended(step, out, q, cache, TOP_P, **ALWAYS)

    def check_mirror(self) -> None:
        """Codes, bounds and labels of every page in use are those of its keys, bit for bit."""
        cache = self.cache
        expected = reference.PagedKVCache.wrap(
            cache.k_cache, cache.v_cache, cache.page_table, cache.seq_lens
        )
        if self.label_format is not None:
            expected = with_labels_of(expected, self.label_format, NUM_QO_HEADS)
        written, wanted = beside_the_keys(cache), beside_the_keys(expected)
        for slot, pages in enumerate(self.owned):
            for at, page in enumerate(pages):
                fill = min(self.lengths[slot] - at * PAGE_SIZE, PAGE_SIZE)
                for name, pool in written.items():
                    own, other = pool[page], wanted[name][page]
                    if "bounds" not in name:  # by the token
                        own, other = own[:, :fill], other[:, :fill]
                    assert torch.equal(own, other), f"{name} of page {page}"


def beside_the_keys(cache) -> dict[str, torch.Tensor]:
    """Mirror, bounds and labels, these as the reference has them, by name."""
    written = {name: getattr(cache, name) for name in MIRROR}
    if cache.labels is not None:
        labels = labels_by_query_head(cache.labels, NUM_QO_HEADS)
        written |= {"label codes": labels.codes, "label scales": labels.scale_zero}
    return written


def soak(
    package: ModuleType,
    device: torch.device,
    num_steps: int,
    check_every: int,
    batch_size: int = 8,
    max_pages: int = 128,
    selectors: tuple[str, ...] = SELECTORS,
    watch_memory: bool = False,
) -> dict[str, int]:
    """Runs an engine of each selector in turn, for its share of the steps, and checks it; returns
    what happened."""
    totals: Counter[str] = Counter()
    for seed, selector in enumerate(selectors):
        engine = Engine(package, device, batch_size, max_pages, selector, seed)
        share = num_steps // len(selectors) + (seed < num_steps % len(selectors))
        allocated = []
        for step in range(1, share + 1):
            engine.advance()
            if step % check_every == 0 or step == share:
                engine.check()
                if watch_memory:
                    allocated.append(torch.cuda.memory_allocated())
        if allocated:
            # The first check still makes what it keeps.
            assert max(allocated) <= max(allocated[:2]), f"memory grew: {allocated}"
            engine.counts["allocated_mib"] = max(allocated[-1] >> 20, totals["allocated_mib"])
            del totals["allocated_mib"]
        totals.update(engine.counts)
    return dict(totals)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    steps = parser.parse_args().steps
    unit = f"{steps} steps"
    counts = ledger.passed("soak", unit)
    if counts is None:
        start = time.monotonic()
        counts = soak(kernels, torch.device("cuda"), steps, 100, watch_memory=True)
        counts["seconds"] = round(time.monotonic() - start)
        ledger.record("soak", unit, counts)
    print("soak: " + ", ".join(f"{name} {value}" for name, value in counts.items()))


if __name__ == "__main__":
    main()
