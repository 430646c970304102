"""Checks of what lies on the device, where no launch can look: on request, as they synchronize."""

from typing import TYPE_CHECKING

import torch

from .sign_codes import BLOCK_TOKENS

if TYPE_CHECKING:
    from .cache import PagedKVCache


def validate_cache(cache: "PagedKVCache") -> None:
    """Checks lengths, page ids, and that mirror, bounds, labels and sign codes are those of the
    keys.
    Synchronizes, and needs room for a second mirror.

    A length of 0 is right whatever the page ids are: that place in the batch may have no request.

    Raises:
        ValueError: a length is negative or beyond the capacity; a page id in use lies outside the
            pool; a request uses a page twice; a part-filled last page, which the next append would
            write to, is shared; a page's mirror, bounds, labels or sign codes do not belong to its
            keys.
    """
    if cache.k_factor is not None and not bool((cache.k_factor > 0).all()):
        raise ValueError("k_factor: expected positive numbers, got others")
    check_indices(cache)
    check_mirror(cache)


def check_indices(cache: "PagedKVCache") -> None:
    """Raises ValueError for a wrong length or page id."""
    page_table = cache.page_table.cpu()
    users: dict[int, int] = {}
    part_filled: dict[int, int] = {}
    for batch, seq_len in enumerate(cache.seq_lens.tolist()):
        if not 0 <= seq_len <= cache.capacity:
            raise ValueError(f"seq_lens[{batch}]: expected 0 to {cache.capacity}, got {seq_len}")
        pages = page_table[batch, : -(-seq_len // cache.page_size)].tolist()
        for page in pages:
            if not 0 <= page < cache.num_pages:
                raise ValueError(
                    f"page_table[{batch}]: expected page ids from 0 to {cache.num_pages - 1}, "
                    f"got {page}"
                )
            users[page] = users.get(page, 0) + 1
        if len(set(pages)) != len(pages):
            raise ValueError(f"page_table[{batch}]: expected every page once, got one twice")
        if seq_len % cache.page_size != 0:
            part_filled[pages[-1]] = batch
    for page, batch in part_filled.items():
        if users[page] > 1:
            raise ValueError(
                f"page_table[{batch}]: expected a part-filled page of its own, got page {page}, "
                f"which another request uses"
            )


def check_mirror(cache: "PagedKVCache") -> None:
    """Raises ValueError for the first page, request by request, whose keys were written without
    their mirror, bounds, labels or sign codes: these are made again, and compared bit for bit."""
    pages, page_tokens = cache.used_pages()
    again = cache.unmirrored()
    again.mirror_pages(pages, page_tokens)
    slots = torch.arange(cache.page_size, device=page_tokens.device)
    has_token = (slots < page_tokens[:, None])[:, None, :, None]
    has_mean = _means_written(cache)[:, None, :, None]
    differs, expected = {}, _written(again)
    for name, written in _written(cache).items():
        unequal = written.view(torch.uint8) != expected[name].view(torch.uint8)
        if "mean" in name:
            unequal &= has_mean
        elif "bounds" not in name:  # by the token
            unequal &= has_token
        differs[name] = unequal.flatten(1).any(1).tolist()
    page_table = cache.page_table.tolist()
    for batch, seq_len in enumerate(cache.seq_lens.tolist()):
        for page in page_table[batch][: -(-seq_len // cache.page_size)]:
            for name, wrong in differs.items():
                if wrong[page]:
                    raise ValueError(
                        f"{name}[{page}]: expected what belongs to the keys of page {page}, which "
                        f"request {batch} uses, got something else: mirror_pages() writes it"
                    )


def _written(cache: "PagedKVCache") -> dict[str, torch.Tensor]:
    """What is written beside K and V, by name."""
    names = ("k_int4", "k_scale_zero", "page_bounds", "bounds_scale_zero")
    written = {name: getattr(cache, name) for name in names}
    if cache.labels is not None:
        written |= {"labels.codes": cache.labels.codes}
        written |= {"labels.scale_zero": cache.labels.scale_zero}
    if cache.signs is not None:
        words, factors, *means = cache.signs
        written |= {"signs.words": words.transpose(3, 4).flatten(2, 3).contiguous()}
        written |= {"signs.factors": factors[..., None]}
        written |= dict(zip(("signs.mean_codes", "signs.mean_scale_zero"), means, strict=True))
    return written


def _means_written(cache: "PagedKVCache") -> torch.Tensor:
    """[num_pages, n] bool: where a request has a whole block of tokens whose mean would lie there
    (see KeySigns)."""
    device, num_means = cache.k_cache.device, max(cache.page_size // BLOCK_TOKENS, 1)
    ends = torch.arange(1, cache.max_pages * num_means + 1, device=device)
    ends = ends * (cache.page_size // num_means)  # tokens up to the end of a page, or of its block
    is_whole = (ends % BLOCK_TOKENS == 0) & (ends <= cache.seq_lens[:, None])
    request, nth = is_whole.nonzero(as_tuple=True)
    pages = cache.page_table[request, nth // num_means].long()
    written = torch.zeros(cache.num_pages, num_means, dtype=torch.bool, device=device)
    written[pages, nth % num_means] = True
    return written


def check_lengths(seq_lens: torch.Tensor, most: int, k: torch.Tensor | None = None) -> None:
    """Raises ValueError unless all lengths lie in [0, most], naming k where its heads stand before
    its tokens."""
    lengths: list[int] = seq_lens.tolist()
    if k is not None and most < max(lengths) <= k.shape[2]:
        raise ValueError(
            "k: expected [batch_size, tokens, num_kv_heads, head_dim], "
            f"got {list(k.shape)} for {max(lengths)} tokens"
        )
    if min(lengths) < 0 or max(lengths) > most:
        raise ValueError(f"seq_lens: expected 0 to {most} tokens, got {lengths}")
