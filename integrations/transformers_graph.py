"""A model's decode step as one CUDA graph."""

from typing import Any

import torch
from transformers import PreTrainedModel

from twilight_tilelang.kernels.launch import on_device

from .transformers import TwilightCache
from .transformers_compile import StepCache, running_on

MOST_CODES = 64  # compiled for kinds of models and batch sizes in one process


class CapturedDecode:
    """A model's forward pass for one token per request, as one CUDA graph.

        step = CapturedDecode(model, cache)
        tokens = model.generate(**inputs, cache=cache, max_new_tokens=1)[:, -1]
        for _ in range(100):
            tokens = step(tokens).argmax(-1)

    The first call after a prompt runs eagerly and compiles, the second captures, later ones replay:
    tokens, positions, lengths and page tables lie on the device. On a CPU every call runs eagerly.
    A token's position is the number of its request's tokens, without padding, as in `generate`.

    Args:
        model: whose attention is "twilight".
        cache: that the prompts go through.
        compile: whether torch.compile fuses what the model does around its attention: norms,
            rotary embedding, activations and residuals. The first step then takes half a minute;
            other steps of the same model and batch size find its code.
        options: of torch.compile, such as `mode`.

    Raises:
        ValueError: there are options, but nothing is compiled.
        NotImplementedError: a layer has no pages: caches of transformers move as they grow.
    """

    def __init__(
        self, model: PreTrainedModel, cache: TwilightCache, *, compile: bool = False, **options: Any
    ) -> None:
        if len(cache.full_layers) < len(cache.layers):
            others = sorted(set(range(len(cache.layers))) - set(cache.full_layers))
            raise NotImplementedError(
                f"cache: expected full attention in every layer to capture a step, "
                f"got another kind in layers {others}"
            )
        if options and not compile:
            raise ValueError(f"compile: expected True with {', '.join(options)}, got {compile}")
        self.model, self.cache = model, cache
        self.pages: list[Any] = []  # that the graph reads
        self.graph: torch.cuda.CUDAGraph | None = None
        self.compiled = torch.compile(logits_of, fullgraph=True, **options) if compile else None

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends a token to every request.

        Args:
            tokens: [batch_size] int64.

        Returns:
            logits: [batch_size, vocabulary] of the next token; a replay overwrites them.

        Raises:
            ValueError: the cache is empty, or full.
        """
        layers, length = self.cache.layers, self.cache.get_seq_length()
        if length == 0:
            raise ValueError("cache: expected a prompt, got no tokens")
        if length >= self.cache.max_tokens:
            raise ValueError(
                f"max_tokens: expected at least {length + 1}, got {length}: the cache is full"
            )
        pages = [layer.pages for layer in layers]
        if list(map(id, pages)) != list(map(id, self.pages)):  # a new prompt's lie elsewhere
            self.pages, self.graph, self.tokens = pages, None, tokens[:, None].clone()
            return self.forward()
        self.tokens.copy_(tokens[:, None])
        if not tokens.is_cuda:
            return self.forward()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # By itself torch captures a stream of the GPU that was current at the first capture.
            stream = torch.cuda.Stream(tokens.device)
            with on_device(tokens.device), torch.cuda.graph(self.graph, stream=stream):
                self.logits = self.forward()  # captured, not run: the host's lengths move
        else:
            for layer in layers:
                layer.length += 1
        self.graph.replay()
        self.cache.note()
        return self.logits

    def forward(self) -> torch.Tensor:
        """The pass itself."""
        positions = self.pages[0].seq_lens[:, None].long()  # a copy: an append moves the lengths
        if self.compiled is None:
            return logits_of(self.model, self.cache, self.tokens, positions)
        with running_on(self.cache), torch._dynamo.config.patch(recompile_limit=MOST_CODES):
            return self.compiled(self.model, StepCache(), self.tokens, positions)


def logits_of(
    model: PreTrainedModel, cache: Any, tokens: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Of the next token [batch_size, vocabulary], by tokens and positions [batch_size, 1]."""
    passed = model(tokens, position_ids=positions, cache=cache, use_cache=True, logits_to_keep=1)
    return passed.logits[:, -1]
