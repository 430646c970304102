"""SnapKV (arXiv 2404.14469): which tokens of a prompt stay in the cache.

Each query head has its own, as in Twilight, whose cache holds keys and values repeated for them.
Tokens keep their own positions, where Twilight's are doubtful: what counts on after a compression
is commented out there.
"""

from typing import NamedTuple

import torch

POOLS = {"avgpool": torch.nn.functional.avg_pool1d, "maxpool": torch.nn.functional.max_pool1d}


class SnapKV(NamedTuple):
    """The compressor of a configuration, with its defaults.

    window_size          last tokens of the prompt, whose queries look back, and which all stay
    max_capacity_prompt  tokens that stay of a prompt of as many or more; a shorter one stays whole
    kernel_size          neighbours, odd, over which what the window sees is pooled
    pooling              "avgpool" (zeros beyond the ends count) or "maxpool"
    """

    window_size: int = 64
    max_capacity_prompt: int = 320
    kernel_size: int = 5
    pooling: str = "avgpool"

    def kept(self, q: torch.Tensor, keys: torch.Tensor, sm_scale: float) -> torch.Tensor | None:
        """The places that each query head keeps, by what its window sees of them; None for all.

        Args:
            q: [num_qo_heads, window_size or more, head_dim], of the prompt's last tokens.
            keys: [num_kv_heads, prompt_length, head_dim].

        Returns:
            [num_qo_heads, max_capacity_prompt] int64: the heaviest first, then the window.
        """
        length, window = keys.shape[1], self.window_size
        if length < self.max_capacity_prompt:
            return None
        grouped = q[:, -window:].float().unflatten(0, (len(keys), -1))
        logits = (grouped @ keys.float()[:, None].mT).flatten(0, 1) * sm_scale
        places = torch.arange(length, device=keys.device)
        later = places > places[-window:, None]
        seen = logits.masked_fill(later, float("-inf")).softmax(-1)[..., :-window].sum(1)
        pool = POOLS[self.pooling]
        pooled = pool(seen, self.kernel_size, stride=1, padding=self.kernel_size // 2)
        best = pooled.topk(self.max_capacity_prompt - window, dim=-1).indices
        return torch.cat((best, places[-window:].expand(len(q), -1)), dim=-1)
