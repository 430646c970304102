"""The attention mass that a selector's candidates hold, against the bytes that it reads for them.

    python -m twilight_tilelang.evaluation.selector_mass [--model FOLDER] [--text FILE]

A model reads a text once, in float32. At 8 positions, a sixteenth of the text apart and the last at
its end, and in every layer but the first two, each selector chooses candidates for every KV head,
by `twilight_tilelang.reference`. The mass of a query head is the share of its exact softmax weights
that they hold. Nothing is always a candidate but Quest's newest page.

    quest         pages by their 8-bit bounds
    ds            Double Sparsity: single tokens by labels, half of the channels in 2 bits or an
                  eighth in 4; "shared" is a list for a KV head, by its channels (kind "k"), "own"
                  one for each query head, by channels of its own ("qk", and "q" as in Twilight's
                  configurations): a KV head reads as many labels, and the union of the lists
    signs         by a bit a channel, with the kernels' 4 bits a channel of the query
    mirror        by the 4-bit mirror, which Full + Twilight reads of every token
    exact_pages   no selectors: the pages of the largest exact mass, the ceiling of all that choose
    exact_tokens  pages, and the tokens

A list for a KV head takes what has the largest share, to Quest the largest bound and to signs the
largest logit, in any of its query heads. The bytes are a token's, of one KV head, before anything
is chosen; no query and no score is counted.
Rows join profiling/results/GPU/selector_mass.csv, from which `make plots` draws. Unless there is a
channel file, Double Sparsity is calibrated on the beginning of the text itself.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from twilight_tilelang.integrations.recordings.record import record
from twilight_tilelang.kernels.sign_query import QUERY_BITS
from twilight_tilelang.reference.cache import CacheShape, PagedKVCache, pages_of
from twilight_tilelang.reference.channels import load_channels
from twilight_tilelang.reference.double_sparsity import (
    forced_tokens,
    list_tokens,
    select_tokens,
    shared_ranks,
    top_tokens,
)
from twilight_tilelang.reference.estimator import candidate_tokens, estimate_logits, own_columns
from twilight_tilelang.reference.labels import LabelFormat
from twilight_tilelang.reference.lists import CandidatePages, Candidates, CandidateTokens
from twilight_tilelang.reference.selector import select_all, select_pages
from twilight_tilelang.reference.sign_codes import BLOCK_TOKENS, sign_codes
from twilight_tilelang.reference.sign_selector import select_by_signs
from twilight_tilelang.reference.twilight_config import SKIPPED_LAYERS

from .models import PAGE_SIZE
from .origin import ROOT, gpu_label, origin
from .results import write_rows
from .small import MODEL, calibrated_channels, default_text, fetched_model, parser_of

ROWS = "selector_mass.csv"
NUM_POSITIONS = 8
WORST = 0.05  # the share of the heads that hold no more than mass_p5
KEY = (
    *("model", "dtype", "gpu", "text", "length"),
    *("selector", "group", "kind", "num_channels", "bits", "token_budget"),
)
MEASURED = ("bytes_per_token", "tokens", "mass", "mass_p5", "mass_min")
COLUMNS = (
    *KEY,
    *MEASURED,
    *("samples", "positions", "layers", "num_qo_heads", "num_kv_heads", "head_dim", "page_size"),
    *("channels", "commit", "torch", "transformers", "date"),
)


class Steps(NamedTuple):
    """Decode steps of one layer.

    q         [steps, num_qo_heads, head_dim]
    cache     of a request for each step; they share their pages, whose values are not read
    weights   [steps, num_qo_heads, capacity] float64, exact, 0 where no token is
    """

    q: torch.Tensor
    cache: PagedKVCache
    weights: torch.Tensor


class Labels(NamedTuple):
    """Labels of a model's keys: channels of a kind, one in so many, and the bits of each."""

    kind: str
    one_in: int
    bits: int

    def num_channels(self, head_dim: int) -> int:
        return head_dim // self.one_in

    def of_layer(self, channels: Path, layer: int, heads: tuple[int, int, int]) -> LabelFormat:
        """heads: (num_qo_heads, num_kv_heads, head_dim)."""
        r = self.num_channels(heads[-1])
        return LabelFormat(load_channels(channels, layer, self.kind, *heads, r), self.bits)


class Selector(NamedTuple):
    """What chooses candidates.

    choose    of the steps of a layer and a token budget
    reads     the tensors of a cache that it reads to score every token; of an oracle none
    group     "own" where each query head has a list of its own
    labels    what it scores by, where it needs any
    """

    name: str
    choose: Callable[[Steps, int], Candidates]
    reads: Callable[[PagedKVCache], Iterable[torch.Tensor]] = lambda cache: ()
    group: str = "shared"
    labels: Labels | None = None

    def bytes_per_token(self, group_size: int, head_dim: int, page_size: int) -> float:
        """What it reads of a token for one KV head."""
        tokens = page_size * BLOCK_TOKENS  # whole pages and whole blocks of signs
        labels = None
        if self.labels is not None:
            lists = 1 if self.group == "shared" else group_size
            any_channels = torch.arange(self.labels.num_channels(head_dim), dtype=torch.int32)
            labels = LabelFormat(any_channels.repeat(lists, 1), self.labels.bits)
        shape = CacheShape(1, BLOCK_TOKENS, 1, head_dim, page_size)
        cache = PagedKVCache.empty(shape, label_format=labels)
        return sum(each.nbytes for each in self.reads(cache)) / tokens


def quest(steps: Steps, token_budget: int) -> CandidatePages:
    return select_pages(steps.q, steps.cache, token_budget)


def double_sparsity(group: str, steps: Steps, token_budget: int) -> CandidateTokens:
    return select_tokens(steps.q, steps.cache, token_budget, group=group)


def signs(steps: Steps, token_budget: int) -> CandidateTokens:
    return select_by_signs(steps.q, steps.cache, token_budget, query_bits=QUERY_BITS)


def mirror(steps: Steps, token_budget: int) -> CandidateTokens:
    logits = estimate_logits(steps.q, steps.cache, select_all(steps.cache))
    return largest_shares(logits.float(), steps.cache, token_budget)


def exact_tokens(steps: Steps, token_budget: int) -> CandidateTokens:
    return largest_shares(steps.weights.log(), steps.cache, token_budget)


def exact_pages(steps: Steps, token_budget: int) -> CandidatePages:
    cache = steps.cache
    mass = steps.weights.unflatten(-1, (-1, cache.page_size)).sum(-1)
    mass = mass.unflatten(1, (cache.num_kv_heads, -1)).amax(2)
    best = mass.sort(dim=-1, descending=True, stable=True).indices
    best = best[..., : token_budget // cache.page_size].int()
    counts = pages_of(cache.seq_lens, cache.page_size).clamp(max=best.shape[-1])
    return CandidatePages(best, counts[:, None].expand(best.shape[:2]))


def largest_shares(logits: torch.Tensor, cache: PagedKVCache, token_budget: int) -> CandidateTokens:
    """The tokens of the largest share in any query head of a group: logits [steps, num_qo_heads,
    capacity] float."""
    chosen = []
    for own, length in zip(logits, cache.seq_lens.tolist(), strict=True):
        ranks = shared_ranks(own[:, :length], cache.num_kv_heads, 1.0)
        forced = forced_tokens(length, 0, 0, ranks.device)
        chosen.append(top_tokens(ranks, min(token_budget, length), forced)[:, None])
    return list_tokens(chosen, cache, min(token_budget, cache.capacity))


def label_tensors(cache: PagedKVCache) -> tuple[torch.Tensor, torch.Tensor]:
    return cache.labels.codes, cache.labels.scale_zero


SELECTORS = (
    Selector("quest", quest, lambda cache: (cache.page_bounds, cache.bounds_scale_zero)),
    *(
        Selector("ds", partial(double_sparsity, group), label_tensors, group, Labels(kind, *size))
        for (group, kind), size in itertools.product(
            (("shared", "k"), ("own", "qk"), ("own", "q")), ((2, 2), (8, 4))
        )
    ),
    Selector("signs", signs, sign_codes),
    Selector("mirror", mirror, lambda cache: (cache.k_int4, cache.k_scale_zero)),
    Selector("exact_pages", exact_pages),
    Selector("exact_tokens", exact_tokens),
)


def make_steps(
    q: torch.Tensor, k: torch.Tensor, lengths: Sequence[int], labels: LabelFormat | None = None
) -> Steps:
    """Steps over the first tokens of one layer's keys.

    Args:
        q: [steps, num_qo_heads, head_dim].
        k: [num_tokens, num_kv_heads, head_dim].
        lengths: of each step, how many tokens it attends to.
    """
    num_pages = pages_of(len(k), PAGE_SIZE)
    padded = torch.nn.functional.pad(k, (0, 0, 0, 0, 0, num_pages * PAGE_SIZE - len(k)))
    pages = padded.unflatten(0, (num_pages, PAGE_SIZE))
    table = torch.arange(num_pages, dtype=torch.int32).repeat(len(lengths), 1)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    cache = PagedKVCache.wrap(pages, pages, table, seq_lens, None, labels, "NHD")
    grouped = q.double().unflatten(1, (k.shape[1], -1))
    logits = grouped @ padded.double().permute(1, 2, 0) * q.shape[-1] ** -0.5
    after = torch.arange(cache.capacity) >= seq_lens[:, None, None]
    return Steps(q, cache, logits.flatten(1, 2).masked_fill(after, float("-inf")).softmax(-1))


def held(steps: Steps, candidates: Candidates) -> tuple[torch.Tensor, torch.Tensor]:
    """What candidates hold, and how many they are.

    Returns:
        (mass [steps, num_qo_heads] float64, tokens [steps, num_kv_heads] int64 that a KV head
        reads: any of its query heads').
    """
    tokens = candidate_tokens(steps.cache, candidates)
    own = own_columns(candidates, tokens, steps.q.shape[1])
    group_size = own.shape[1] // tokens.shape[1]
    place = tokens.clamp(min=0).repeat_interleave(group_size, dim=1)
    mass = torch.where(own, steps.weights.gather(-1, place), 0.0).sum(-1)
    return mass, (tokens >= 0).sum(-1)


def last_half(length: int) -> list[int]:
    """NUM_POSITIONS tokens of the last half of a text, evenly, the last one among them."""
    parts = range(NUM_POSITIONS + 1, 2 * NUM_POSITIONS + 1)
    return [length * part // (2 * NUM_POSITIONS) - 1 for part in parts]


def measure(
    recorded: dict[str, torch.Tensor], channels: Path, budgets: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """A row for every selector and budget, without where it comes from.

    Args:
        recorded: what `record` gives.
        channels: the model's channel file.
    """
    q, k, layers = recorded["q"], recorded["k"], recorded["layers"].tolist()
    heads = num_qo_heads, num_kv_heads, head_dim = q.shape[2], *k.shape[2:]
    lengths = [position + 1 for position in recorded["positions"].tolist()]
    for selector in tqdm(SELECTORS, unit="selector"):
        found = {budget: [] for budget in budgets}
        labels = selector.labels
        for place, layer in enumerate(layers):
            own = None if labels is None else labels.of_layer(channels, layer, heads)
            steps = make_steps(q[place], k[place], lengths, own)
            for budget in budgets:
                found[budget].append(held(steps, selector.choose(steps, budget)))
        size = selector.bytes_per_token(num_qo_heads // num_kv_heads, head_dim, PAGE_SIZE)
        for budget, own in found.items():
            mass, tokens = (torch.stack(part).double().flatten() for part in zip(*own, strict=True))
            yield {
                "selector": selector.name,
                "group": selector.group,
                "kind": labels.kind if labels else "",
                "num_channels": labels.num_channels(head_dim) if labels else "",
                "bits": labels.bits if labels else "",
                "token_budget": budget,
                "bytes_per_token": f"{size:.4g}" if size else "",
                "tokens": f"{tokens.mean():.1f}",
                "mass": f"{mass.mean():.5f}",
                "mass_p5": f"{mass.quantile(WORST):.5f}",
                "mass_min": f"{mass.min():.5f}",
                "samples": len(mass),
                "positions": " ".join(str(length - 1) for length in lengths),
                "layers": f"{layers[0]}-{layers[-1]}",
                "num_qo_heads": num_qo_heads,
                "num_kv_heads": num_kv_heads,
                "head_dim": head_dim,
                "page_size": PAGE_SIZE,
                "channels": channels.name if labels else "",
            }


def main(argv: list[str] | None = None) -> int:
    """Runs the model, writes the rows and prints them."""
    parser = parser_of("selector_mass", str(__doc__))
    add = parser.add_argument
    add("--length", type=int, default=8192, help="of the text, in tokens")
    add("--budgets", type=int, nargs="+", default=[512, 1024, 2048], help="tokens of a KV head")
    add("--channels", type=Path, help="channel file of the model, for Double Sparsity")
    add("--dense-layers", type=int, default=SKIPPED_LAYERS, help="the first so many are left out")
    add("--output", type=Path, default=ROOT / "evaluation-results")
    add("--rows", type=Path, default=ROOT / "profiling" / "results", help="where rows join")
    arguments = parser.parse_args(argv)
    try:
        model = arguments.model or fetched_model(arguments.output / MODEL)
        text = arguments.text or default_text(arguments.output)
        channels = arguments.channels or calibrated_channels(model, text, arguments.output)
        positions = last_half(arguments.length)
        recorded = record(model, text.read_text(), arguments.length, None, positions, torch.float32)
        sparse = recorded["layers"] >= arguments.dense_layers
        if not sparse.any():
            raise ValueError(f"--dense-layers: expected fewer than {len(sparse)}, the model's")
        recorded |= {name: recorded[name][sparse] for name in ("q", "k", "layers")}
        rows = list(measure(recorded, channels, arguments.budgets))
    except (ImportError, OSError, ValueError) as error:
        print(f"selector_mass: {error}")
        return 1
    about = origin(model.name, "torch", "fp32")
    about |= {"text": text.stem, "length": arguments.length, "date": str(date.today())}
    path = arguments.rows / gpu_label() / ROWS
    write_rows(path, (about | row for row in rows), KEY, COLUMNS)
    shown = (*KEY[-6:], *MEASURED)
    for cells in (shown, *(map(row.get, shown) for row in rows)):
        print(*(f"{cell!s:>15}" for cell in cells))
    print(f"selector_mass: rows -> {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
