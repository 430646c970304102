"""What a decode step is asked for."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from twilight_tilelang.reference.twilight_config import TwilightConfig

from .lists import Window

NUM_SAMPLES = 512  # tokens of a KV head that the estimate of all tokens' mass reads


class Extras(NamedTuple):
    """What the sparse path does beside its stages."""

    bound_mass: bool = False
    num_samples: int | None = None  # of the estimate of all tokens' mass; None for none


@dataclass(frozen=True)
class DecodeOptions:
    """The options of TwilightDecode.

    Attributes:
        selector: "quest" (the pages with the largest bounds), "double_sparsity" (the tokens with
            the largest label scores, of a cache with labels), "signs" (the tokens with the largest
            logits by the signs of their keys, of a cache with sign codes) or "full" (every page).
        token_budget: Quest's candidates per KV head, a multiple of page_size; those of "signs" per
            KV head; those of Double Sparsity per KV head, or per query head with group="own".
        candidate_p: of "signs", in place of a budget: the share of all tokens' mass by signs that
            the candidates of each query head hold, in (0, 1], a float or a tensor as top_p, as of
            select_top_p_by_signs. After a step `candidates.counts` holds how many that took; path
            "auto" expects them to be all.
        group: whose scores "double_sparsity" goes by, as of select_tokens.
        top_p: estimated mass to keep, in (0, 1]; float or tensor as in prune_top_p.
        sm_scale: factor of the logits, positive; head_dim ** -0.5 where None.
        num_sink_tokens, num_recent_tokens: the first and the last so many tokens are always
            candidates, and always kept. The defaults, and that of min_kept_tokens, are what a model
            of 135M parameters needs to answer as with dense attention (profiling/NOTES.md).
        min_kept_tokens: each query head keeps at least so many of its heaviest candidates, 1 to 32
            (see prune_top_p).
        num_parts: a captured batch is cut into so many, each on a stream of its own. Their stages
            overlap: while the bytes of one arrive, the weights of another are searched. No result
            depends on it. Where None, as many as still fill the GPU with rows (KV heads of all
            requests), at most 4. Only the sparse path is cut.
        bound_mass: leave in `kept_mass_bound` a lower bound of the mass that each query head's kept
            tokens surely have among its candidates, as of bound_kept_mass, on the sparse path. It
            costs a launch that reads the candidates' logits twice, and estimator and pruner are
            then two kernels; no other result changes.
        top_p_of: what top_p is a share of: the mass of the "candidates", or of "all" tokens, as far
            as estimate_candidate_mass knows it. Then `candidate_mass` is the share that they hold,
            with its standard error, and where that is less than top_p every candidate is kept. It
            costs a launch that reads a sample of the tokens left out and no candidate; the share,
            its error and `kept.mass` are then views of one tensor. Not where query heads have
            candidates of their own.
        num_samples: tokens of a KV head that this estimate reads of those left out, 1 to 2,048.
        path: "sparse", every stage; "candidates", the selector alone, with the bits of
            page_attention; "dense", attention over every token, with the bits of dense_attention;
            or "auto", the one that is expected to be fastest (crossing.py) for requests as long as
            the page table allows. "auto" is no default because it goes by the batch too: a request
            gives the same bits in any batch only within one path, and each drops other tokens.
    """

    selector: str = "quest"
    token_budget: int = 8192
    candidate_p: float | torch.Tensor | None = None
    group: str = "shared"
    top_p: float | torch.Tensor = 0.85
    sm_scale: float | None = None
    num_sink_tokens: int = 16
    num_recent_tokens: int = 16
    min_kept_tokens: int = 32
    num_parts: int | None = None
    bound_mass: bool = False
    top_p_of: str = "candidates"
    num_samples: int = NUM_SAMPLES
    path: str = "sparse"

    @property
    def window(self) -> Window:
        return Window(self.num_sink_tokens, self.num_recent_tokens)

    @property
    def extras(self) -> Extras:
        return Extras(self.bound_mass, self.num_samples if self.top_p_of == "all" else None)


def options_of(config: TwilightConfig, page_size: int, layer: int | None = None) -> DecodeOptions:
    """What one of Twilight's JSON configurations asks for, with no windows and no floor, as the
    original has none.

    Args:
        config: see `read_config`.
        page_size: of the cache.
        layer: of the model; None for one that the configuration does not skip.

    Raises:
        ValueError: chunk_size is not the page_size.
        NotImplementedError: the kernels do not have it; the message names the key, and what has it.
    """
    chosen = config.decode_options(page_size, layer)
    if chosen["selector"] == "double_sparsity" and config.beyond_kernels is not None:
        raise NotImplementedError(config.beyond_kernels)
    return DecodeOptions(**chosen, num_sink_tokens=0, num_recent_tokens=0, min_kept_tokens=1)
