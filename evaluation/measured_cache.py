"""A cache whose prompt many configurations decode after, and whose steps leave what they read.

A prompt lies in its pages once. Configurations see these pages under views that share keys, values
and mirror: plain, or with what tokens are scored by. Pages and views keep their place from prompt
to prompt, so that steps that are planned, and graphs that are captured, hold for all of them.
"""

import itertools
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

import twilight_tilelang
from twilight_tilelang import reference
from twilight_tilelang.integrations.transformers import TwilightCache
from twilight_tilelang.kernels.labels import LabelFormat
from twilight_tilelang.kernels.options import DecodeOptions
from twilight_tilelang.reference.estimator import candidate_tokens, own_columns
from twilight_tilelang.reference.lists import Candidates
from twilight_tilelang.reference.pruner import candidate_weights, heaviest, top_p_set_sorted

from .masks import Sets
from .measures import Measures
from .torch_engine import reading

KEY_ELEMENTS = 1 << 26  # of [layers, num_kv_heads, seq_len, head_dim] at a time


class Seen(NamedTuple):
    """What a layer's step read, in memory of its own.

    q           [1, num_qo_heads, head_dim]
    candidates  of the step; None of a dense one
    kept        tokens, counts and mass of the step; None where it reads every candidate
    sm_scale    of its logits
    """

    q: torch.Tensor
    candidates: Any
    kept: Any
    sm_scale: float


class MeasuredCache(TwilightCache):
    """A TwilightCache of one request, for prompt after prompt, whose options change in between.

    seen: where it is a dictionary, steps leave there what they read, by layer.
    """

    def __init__(self, config: PreTrainedConfig, max_tokens: int, page_size: int) -> None:
        dense = config.get_text_config(decoder=True).num_hidden_layers
        super().__init__(config, max_tokens, None, dense, page_size=page_size)
        self.seen: dict[int, Seen] | None = None
        self.views: dict[Hashable, list[Any]] = {}  # every layer's pages, by what they have
        self.current: set[Hashable] = set()  # those that have it of this prompt
        self.prompt_length = 0

    def begin_prompt(self, length: int) -> None:
        """Forgets every token, and attends densely; the pages stay where they are."""
        self.prompt_length = length
        self.current.clear()
        for layer in self.full_layers.values():
            layer.dense, layer.length, layer.decoding = True, 0, False
        for layer, pages in zip(self.full_layers.values(), self.views.get(None, ()), strict=False):
            layer.pages = pages
            pages.seq_lens.zero_()

    def begin(
        self,
        options: DecodeOptions,
        dense_layers: int,
        scores: Hashable,
        labels: Mapping[int, LabelFormat],
        steps: dict[tuple, Any],
    ) -> None:
        """Forgets what came after the prompt. Tokens to come are decoded by these options, the
        first so many layers attend densely.

        Args:
            scores: what names the labels, or the signs, that tokens are scored by, and the layers;
                None for none.
            labels: by layer, see `TwilightCache`.
            steps: planned for these options before, to which new ones are added.
        """
        behind = self.get_seq_length() - self.prompt_length
        if behind:
            self.crop(-behind)
        self.options, self.labels, self.steps = options, labels, steps
        for number, layer in self.full_layers.items():
            layer.dense = number < dense_layers
            layer.decoding = True  # a prompt has no padding, and the next step needs no mask
        self._show(scores)

    def _show(self, name: Hashable) -> None:
        """Layers get their pages as this view has them, scores of the prompt included."""
        layers = list(self.full_layers.values())
        plain = self.views.setdefault(None, [layer.pages for layer in layers])
        for layer, pages in zip(layers, self.views.get(name, plain), strict=True):
            layer.pages = pages
        if name not in self.views:
            for layer in layers:
                layer.add_scores()
            self.views[name] = [layer.pages for layer in layers]
        elif name is not None and name not in self.current:
            for pages, without in zip(self.views[name], plain, strict=True):
                if pages is not without:
                    write_scores(pages)
        self.current.add(name)

    def step(self, pages: Any, num_qo_heads: int, sm_scale: float, dense: bool) -> Any:
        """The step of the adapter, which leaves what it read where that is asked for."""
        plain = super().step(pages, num_qo_heads, sm_scale, dense)
        return plain if self.seen is None else MeasuredStep(plain, self, sm_scale, dense)

    def measure(self, seen: Mapping[int, Seen], measures: Measures) -> None:
        """Adds what the last token read in each layer. Nothing here waits for the device."""
        alike = itertools.groupby(sorted(seen), key=lambda layer: self._shape(seen[layer]))
        for _, layers in alike:
            for group in self._at_once(list(layers)):
                sets, mass = self._sets_and_mass(group, [seen[layer] for layer in group])
                num_kv_heads = self.full_layers[group[0]].pages.num_kv_heads
                measures.add_layers(group, reading(sets, mass, num_kv_heads))

    def _shape(self, own: Seen) -> tuple[Any, ...]:
        lists = (own.q, *(own.candidates or ()), *(own.kept or ()))
        return own.sm_scale, *(None if each is None else each.shape for each in lists)

    def _at_once(self, layers: list[int]) -> Iterator[list[int]]:
        """Layers in groups whose keys are not too many."""
        pages = self.full_layers[layers[0]].pages
        size = self.get_seq_length() * pages.num_kv_heads * pages.head_dim
        count = max(1, KEY_ELEMENTS // size)
        for start in range(0, len(layers), count):
            yield layers[start : start + count]

    def _sets_and_mass(self, layers: list[int], seen: list[Seen]) -> tuple[Sets, torch.Tensor]:
        """What layers of one shape read, in the place of a Sets' tokens, and the share of the exact
        weight that it holds, [num_qo_heads, layers]."""
        pages, length = [self.full_layers[layer].pages for layer in layers], self.get_seq_length()
        q = torch.cat([own.q for own in seen])
        if seen[0].candidates is None:
            everything = q.new_ones(q.shape[1], len(q), length, dtype=torch.bool)
            mass = q.new_ones(everything.shape[:2], dtype=torch.float32)
            return read_sets(self, pages, seen, everything), mass
        logits = exact_logits(q, pages, length, seen[0].sm_scale)
        sets = read_sets(self, pages, seen, torch.ones_like(logits, dtype=torch.bool))
        read = logits.masked_fill(~sets.read, float("-inf"))
        return sets, (read.logsumexp(-1) - logits.logsumexp(-1)).exp()


class MeasuredStep:
    """A step that leaves what it read. It takes its layer from whose pages it is given."""

    def __init__(self, plain: Any, cache: MeasuredCache, sm_scale: float, dense: bool) -> None:
        self.plain, self.cache, self.sm_scale = plain, cache, sm_scale
        path = "dense" if dense else cache.options.path
        self.has_candidates, self.has_kept = path != "dense", path == "sparse"

    def run(self, q: torch.Tensor, pages: Any, out: torch.Tensor | None = None) -> torch.Tensor:
        """q, out: [1, num_qo_heads, head_dim]."""
        out = self.plain.run(q, pages, out)
        layers = self.cache.full_layers.items()
        number = next(number for number, layer in layers if layer.pages is pages)
        candidates = copied(self.plain.candidates) if self.has_candidates else None
        kept = copied(self.plain.kept) if self.has_kept else None
        self.cache.seen[number] = Seen(q.clone(), candidates, kept, self.sm_scale)
        return out


def write_scores(pages: Any) -> None:
    """Labels, or signs, of all tokens that pages hold by now."""
    if getattr(pages, "signs", None) is not None:
        pages.write_every_sign()
    else:
        pages.mirror_pages(*pages.used_pages())


def copied(lists: Any) -> Any:
    """The same kind of lists, of the same numbers."""
    return type(lists)(*(None if each is None else each.clone() for each in lists))


def joined(lists: Iterable[Any]) -> Any:
    """Lists of several requests as those of a batch."""
    every = list(lists)
    fields = zip(*every, strict=True)
    return type(every[0])(*(None if own[0] is None else torch.cat(own) for own in fields))


def in_reference(candidates: Any) -> Candidates:
    """The kernels' list, or the reference's, as the reference's."""
    by_token = "tokens" in candidates._fields
    kind = reference.CandidateTokens if by_token else reference.CandidatePages
    return kind(*candidates)


def exact_logits(q: torch.Tensor, pages: list[Any], length: int, sm_scale: float) -> torch.Tensor:
    """[num_qo_heads, layers, seq_len] float32 of all tokens of one request, of whom these are the
    pages in each layer; q: [layers, num_qo_heads, head_dim]."""
    num_pages = -(-length // pages[0].page_size)
    used = [own.k_cache[own.page_table[0, :num_pages].long()] for own in pages]
    keys = torch.stack(used).flatten(1, 2)[:, :length].transpose(1, 2).float()
    grouped = q.float().unflatten(1, (keys.shape[1], -1))
    return (grouped @ keys.mT).flatten(1, 2).transpose(0, 1) * sm_scale


def read_sets(
    cache: MeasuredCache, pages: list[Any], seen: list[Seen], everything: torch.Tensor
) -> Sets:
    """What the steps of layers read, from the lists that they left.

    Args:
        everything: [num_qo_heads, layers, seq_len] bool, true.
    """
    num_qo_heads, _, length = everything.shape
    certain = everything.new_ones(everything.shape[:2], dtype=torch.float32)
    if seen[0].candidates is None:
        return Sets(everything, everything, certain)
    group_size = num_qo_heads // pages[0].num_kv_heads
    candidates = in_reference(joined(own.candidates for own in seen))
    columns = candidate_tokens(pages[0], candidates)  # whose length is that of all layers
    valid = own_columns(candidates, columns, num_qo_heads)
    columns = columns.repeat_interleave(group_size, 1)
    if seen[0].kept is None:
        read = as_mask(torch.where(valid, columns, -1), length).transpose(0, 1)
        return Sets(read, read, certain)
    tokens, counts, mass = joined(own.kept for own in seen)
    listed = torch.arange(tokens.shape[-1], device=tokens.device) < counts[..., None]
    read = as_mask(torch.where(listed, tokens, -1).long(), length)
    own = own_sets(cache, pages, seen, columns, valid)
    own = as_mask(torch.where(own, columns, -1), length)
    read = read.repeat_interleave(group_size, 1)
    return Sets(own.transpose(0, 1), read.transpose(0, 1), mass.transpose(0, 1))


def own_sets(
    cache: MeasuredCache,
    pages: list[Any],
    seen: list[Seen],
    columns: torch.Tensor,
    valid: torch.Tensor,
) -> torch.Tensor:
    """Which of its candidates' columns each query head keeps, of those that are valid, [layers,
    num_qo_heads, columns]: the estimates of the steps once more, as these leave the union alone."""
    room = twilight_tilelang if columns.is_cuda else reference
    options = cache.options
    estimates = [
        room.estimate_logits(own.q, of_layer, own.candidates, sm_scale=own.sm_scale)
        for own, of_layer in zip(seen, pages, strict=True)
    ]
    weights, known = candidate_weights(torch.cat(estimates).float(), valid)
    recent = columns >= pages[0].seq_lens[0] - options.num_recent_tokens
    forced = (columns < options.num_sink_tokens) | recent
    own = top_p_set_sorted(weights, options.top_p)
    own = own | heaviest(weights, options.min_kept_tokens)
    return (own | forced | ~known) & valid


def as_mask(tokens: torch.Tensor, seq_len: int) -> torch.Tensor:
    """[..., seq_len] bool: lists of positions [..., width], negative for none, as a mask."""
    shape = (*tokens.shape[:-1], seq_len + 1)
    mask = torch.zeros(shape, dtype=torch.bool, device=tokens.device)
    places = torch.where(tokens < 0, seq_len, tokens)
    return mask.scatter_(-1, places, True)[..., :seq_len]
