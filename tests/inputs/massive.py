"""Keys and queries with a massive channel: 448 in every query and -546 in every key, as reported of
real models. It puts every logit near -2e4, and what 4 bits lose of it is multiplied by 448."""

import torch

from twilight_tilelang.reference.inputs import DecodeInputs, DecodeShape, random_inputs

CHANNEL, IN_QUERIES, IN_KEYS = 0, 448.0, -546.0
HEAVY = 12  # keys that each query head attends to
LOGITS = (9.0, 11.0)  # of theirs, but for the massive channel


def massive_inputs(shape: DecodeShape, seed: int = 0) -> DecodeInputs:
    """Small keys, a few of which align with a query, and the massive channel in all of them."""
    inputs = random_inputs(shape, seed)
    generator = torch.Generator().manual_seed(seed)
    inputs.k_cache.mul_(0.5)
    for request, length in enumerate(shape.lengths):
        for head in range(shape.num_qo_heads):
            tokens = torch.randperm(length, generator=generator)[:HEAVY]
            page = inputs.page_table[request, tokens // shape.page_size].long()
            query = inputs.q[request, head].float()
            logits = torch.linspace(*LOGITS, len(tokens))[:, None] * shape.head_dim**0.5
            aligned = query * logits / query.square().sum()
            noise = 0.2 * torch.randn(aligned.shape, generator=generator)
            kv_head = head // shape.group_size
            inputs.k_cache[page, tokens % shape.page_size, kv_head] = (aligned + noise).half()
    inputs.q[..., CHANNEL], inputs.k_cache[..., CHANNEL] = IN_QUERIES, IN_KEYS
    return inputs


def used_keys(inputs: DecodeInputs) -> torch.Tensor:
    """[tokens, num_kv_heads, head_dim]: the keys of all requests, one after another."""
    page_size = inputs.k_cache.shape[1]
    keys = []
    for request, length in enumerate(inputs.seq_lens.tolist()):
        tokens = torch.arange(length)
        page = inputs.page_table[request, tokens // page_size].long()
        keys.append(inputs.k_cache[page, tokens % page_size])
    return torch.cat(keys)


def captured_mass(q, cache, candidates, kept, sm_scale: float | None = None) -> torch.Tensor:
    """[batch_size, num_qo_heads] float64: the share of its candidate pages' true mass that every
    query head has among the KV head's kept tokens; 0 where there is no candidate."""
    sm_scale = cache.head_dim**-0.5 if sm_scale is None else sm_scale
    shares = torch.zeros(q.shape[:2], dtype=torch.float64)
    group_size = q.shape[1] // cache.num_kv_heads
    for request, length in enumerate(cache.seq_lens.tolist()):
        for kv_head in range(cache.num_kv_heads):
            listed = candidates[0][request, kv_head, : int(candidates[1][request, kv_head])].long()
            tokens = (listed[:, None] * cache.page_size + torch.arange(cache.page_size)).flatten()
            tokens = tokens[tokens < length]
            page = cache.page_table[request, tokens // cache.page_size].long()
            keys = cache.k_cache[page, tokens % cache.page_size, kv_head].double()
            heads = slice(kv_head * group_size, (kv_head + 1) * group_size)
            weights = torch.softmax(q[request, heads].double() @ keys.T * sm_scale, -1)
            own = kept[0][request, kv_head, : int(kept[1][request, kv_head])]
            if len(tokens) > 0:
                shares[request, heads] = 1 - weights[:, ~torch.isin(tokens, own)].sum(-1)
    return shares
