"""The decode of a whole model: one token a request through every layer, by each attention.

The model is transformers' own, its cache the project's adapter; weights are random and made on the
device. The hidden states of random weights make no query like a real one. So every projection is
computed, and then attention takes the workload's query in the place of the model's, and the model's
key and value as the newest token of caches that the workload has filled. Each layer has pages of
its own as far as they fit the memory; the weights of all the others come between two uses of the
same pages.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from .. import device
from ..timing import Calls
from ..workloads.models import MODELS
from ..workloads.request_sets import cold_sets, pool_bytes, workload_sets
from ..workloads.traffic import Work
from ..workloads.workload import METHOD, NONE, Workload
from . import baselines, checks
from .stages import Kept, Provider, Slot, Target, optional

MADE = 4  # sets of requests that are made; further layers have copies of them
MEMORY_SHARE = 0.78  # of the free memory that the layers' pages may take
PATHS = {METHOD: "sparse", "quest": "candidates", "dense": "dense"}
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@functools.lru_cache(maxsize=1)  # the workloads of one model follow each other
def random_model(
    name: str, num_positions: int, dtype: torch.dtype, where: str, sharded: bool = False
) -> Any:
    """A model of transformers in a shape of `MODELS`, random weights, attention by the adapter:
    with its projections merged, or sharded over the processes of the run."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from twilight_tilelang.integrations.merged_linear import merge_projections
    from twilight_tilelang.integrations.transformers import NAME

    shape = MODELS[name]
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.mlp_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_qo_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=num_positions,
        attn_implementation=NAME,
    )
    torch.manual_seed(0)
    if sharded:
        made = {"config": config, "state_dict": {}, "dtype": dtype}
        return LlamaForCausalLM.from_pretrained(None, **made, tp_plan="auto").eval()
    with torch.device(where):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    merge_projections(model)
    return model


class LayerSets(NamedTuple):
    """A query and a cache for every layer; layer i has the requests, and the page table, of layer
    i % num_made."""

    queries: list[torch.Tensor]
    caches: list[Any]
    lengths: torch.Tensor  # [num_layers, batch_size] int32, whose rows the caches have
    num_made: int


def layer_sets(workload: Workload, num_layers: int, target: Target) -> LayerSets | None:
    """Requests for every layer; None if not one layer's fit."""
    backend, one = target.backend, pool_bytes(workload.shape)
    fitting = MADE + num_layers
    if backend.device == "cuda":
        fitting = int(MEMORY_SHARE * device.free_bytes() // one)
    if fitting == 0:
        return None
    made = min(MADE, num_layers, fitting)
    num_pools = min(-(-num_layers // made), fitting // made)
    sets = workload_sets(workload, made, backend.device, backend.package.PagedKVCache.wrap)
    first = sets.caches[0]
    pool = {
        field.name: value
        for field in dataclasses.fields(first)
        if isinstance(value := getattr(first, field.name), torch.Tensor) and value.ndim > 2
    }
    copies = [pool]
    while len(copies) < num_pools:
        copies.append({name: value.clone() for name, value in pool.items()})
    lengths = torch.stack([first.seq_lens] * num_layers)
    caches = [
        dataclasses.replace(
            sets.caches[layer % made], seq_lens=own, **copies[layer // made % num_pools]
        )
        for layer, own in enumerate(lengths)
    ]
    queries = [sets.queries[layer % made] for layer in range(num_layers)]
    return LayerSets(queries, caches, lengths, made)


def prepare_model(workload: Workload, target: Target) -> "WholeModel | None":
    """The model, and the caches of its layers; None if they do not fit this GPU."""
    sharded, workload = workload.num_gpus > 1, workload.share()
    seq_len, dtype = workload.shape.max_seq_len, workload.shape.dtype
    positions = max(131_072, seq_len)
    model = random_model(workload.model, positions, dtype, target.backend.device, sharded)
    sets = layer_sets(workload, model.config.num_hidden_layers, target)
    if sets is None:
        needed = pool_bytes(workload.shape) / 2**30
        target.notice(f"left out: {workload.name}: a layer's cache needs {needed:.0f} GiB")
        return None
    own = len({(pages.k_cache.data_ptr(), id(pages.page_table)) for pages in sets.caches})
    if own < len(sets.caches):
        target.notice(f"{workload.name}: {len(sets.caches)} layers take turns over {own} caches")
    return WholeModel(workload, target, model, sets)


class WholeModel:
    """Builds the providers of one workload: each a call that decodes one token of every request.

    The requests have `shape.max_seq_len` tokens with the new one, in every call.
    """

    def __init__(self, workload: Workload, target: Target, model: Any, sets: LayerSets) -> None:
        self.workload, self.target, self.backend = workload, target, target.backend
        self.model, self.sets = model, sets
        config, shape = model.config, workload.shape
        self.num_layers = config.num_hidden_layers
        self.dense_layers = min(workload.dense_layers, self.num_layers)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(config.vocab_size, (shape.batch_size, 1), generator=generator)
        self.tokens = tokens.to(self.backend.device)
        embedding = _local(model.get_input_embeddings().weight).numel()
        self.num_weights = sum(_local(own).numel() for own in model.parameters()) - embedding
        self._decode(self._own("dense"))()  # the new token's keys, as every call will write them

    @property
    def other_parts(self) -> dict[str, float]:
        """Bytes that lie beside the cache, for each token and KV head of a layer."""
        weights, shape = sum(own.nbytes for own in self.model.parameters()), self.workload.shape
        return {"weights": weights / (self.num_layers * shape.num_kv_heads * sum(shape.lengths))}

    def variant(self, workload: Workload) -> "WholeModel":
        """The same model and caches, compiled or not."""
        variant = copy.copy(self)
        variant.workload = workload.share()
        return variant

    def providers(self, stage: str, methods: Sequence[str]) -> list[Provider]:
        """Ours of every method, and dense attention by others."""
        every = [self._provider(method) for method in methods]
        self.sets.lengths.fill_(self.workload.shape.max_seq_len)
        names = self.workload.dense_baselines
        if "flashinfer" in names:
            with optional("flashinfer, dense", self.target.notice):
                every.append(self._baseline("flashinfer", self._flashinfer()))
        if "cudnn" in names:
            with optional("cudnn, dense", self.target.notice):
                every.append(self._baseline("cudnn", self._cudnn()))
        return every

    def _provider(self, method: str) -> Provider:
        if method == NONE:
            nothing = [lambda query, _keys, _values: query.clone()] * self.num_layers
            call = self._decode(self._given(nothing))
            return self._made(method, self.backend.provider, [call], partial(self._run, call, 1.0))
        cache = self._own(method)
        call = self._decode(cache)

        def check() -> float:
            self._run(call)
            layer, (q, pages) = self._sparse_layer(method)
            step = cache.step(pages, q.shape[1], self._scale, layer < self.num_dense(method))
            out = step.run(q, pages)
            if method == METHOD:
                checks.check_attention(out, q, pages, step.kept)
            elif method == "quest":
                checks.check_candidates(out, q, pages, step.candidates)
            else:
                return checks.check_dense(out, q, pages)
            return checks.dense_error(out, q, pages)

        return self._made(method, self.backend.provider, [call], check)

    def _baseline(self, name: str, attention: Sequence[Attention]) -> Provider:
        call = self._decode(self._given(attention))

        def check() -> float:
            self._run(call)
            q, pages = self.sets.queries[0], self.sets.caches[0]
            last = pages.page_table[:, -1].long(), self._slot
            new = pages.k_cache[last], pages.v_cache[last]
            return checks.check_dense(attention[0](q, *new), q, pages)

        return self._made("dense", name, [call], check)

    def _made(self, method: str, name: str, calls: Calls, check: Callable[[], float]) -> Provider:
        counts = self._counts(method)
        sparse = counts[self.num_dense(method) :] or counts
        shape = self.workload.shape
        rows = shape.batch_size * shape.num_kv_heads
        kept = sum(round(float(each.double().mean()) * rows) for each in counts)
        choosing = self.num_layers - self.num_dense(method)
        candidates, _ = self.workload.settings(method)
        work = Work(
            shape,
            rows * candidates * choosing,
            kept,
            choosing,
            self.num_weights,
            shape.dtype.itemsize,
        )
        return Provider("model", method, name, calls, check, Kept.of(sparse), work)

    def parts(self) -> dict[str, Callable[[], object]]:
        """Twilight's token, and what of it is not the model's own: an append, and the step of a
        layer that is dense, and each stage of one that is not."""
        cache = self._own(METHOD)
        layer, (q, pages) = self._sparse_layer(METHOD)
        dense, sparse = (cache.step(pages, q.shape[1], self._scale, own) for own in (True, False))
        new = q.new_zeros(2, len(q), pages.num_kv_heads, pages.head_dim)
        parts = {
            "token": self._decode(cache),
            "append": partial(pages.append, *new),
            "dense layers": partial(dense.run, q, pages),
        }
        sparse.run(q, pages)
        return parts | Slot(q, pages, sparse).launched

    def _counts(self, method: str) -> list[torch.Tensor]:
        """Tokens that attention reads of each row, by layer."""
        shape = self.workload.shape
        if method == METHOD:
            cache = self._own(method, record=True)
            self._decode(cache)()
            return list(cache.kept().counts[0])
        every, (budget, _) = shape.max_seq_len, self.workload.settings(method)
        num_dense = self.num_dense(method)
        tokens = [every] * num_dense + [budget] * (self.num_layers - num_dense)
        return [torch.full((shape.batch_size, shape.num_kv_heads), own) for own in tokens]

    def num_dense(self, method: str) -> int:
        """First layers that attend to every token."""
        if method == NONE:
            return 0
        return self.num_layers if method == "dense" else self.dense_layers

    def _sparse_layer(self, method: str) -> tuple[int, tuple[torch.Tensor, Any]]:
        """A layer that a method treats as its own, with its query and its pages."""
        layer = 0 if method == "dense" else min(self.dense_layers, self.num_layers - 1)
        return layer, (self.sets.queries[layer], self.sets.caches[layer])

    @property
    def _scale(self) -> float:
        return self.model.model.layers[0].self_attn.scaling

    @property
    def _slot(self) -> int:
        """Of the new token in its page."""
        return (self.workload.shape.max_seq_len - 1) % self.workload.shape.page_size

    def _own(self, method: str, record: bool = False) -> Any:
        """The adapter's cache for a method, over the workload's pages and queries."""
        from .model_layers import MadeUpQueries

        workload = self.workload
        options = dict(path=PATHS[method], token_budget=workload.token_budget, **workload.always)
        if method == METHOD:
            options["top_p"] = workload.top_p
        dense = self.num_dense(method)
        return MadeUpQueries.over(self.model, self.sets, options, dense, record)

    def _given(self, attention: Sequence[Attention]) -> Any:
        """The adapter's cache whose layers attend by functions of query, key and value."""
        from .model_layers import GivenAttention

        return GivenAttention.over(self.model, self.sets, attention)

    def _decode(self, cache: Any) -> Callable[[], torch.Tensor]:
        """The call that decodes one token: [batch_size, vocabulary] logits."""
        from .model_layers import decode_call

        before = self.workload.shape.max_seq_len - 1
        sizes = self.sets.lengths, before
        return decode_call(self.model, cache, self.tokens, *sizes, self.workload.compiled)

    def _run(self, call: Callable[[], torch.Tensor], error: float = 0.0) -> float:
        """One token; raises CheckFailed unless its logits are finite."""
        logits = call()
        self.sets.lengths.fill_(self.workload.shape.max_seq_len)  # of those that append nothing
        if not bool(logits.isfinite().all()):
            raise checks.CheckFailed("logits: expected finite numbers")
        return error

    def _flashinfer(self) -> list[Attention]:
        """FlashInfer over our pages; layers with the same page table share a plan."""
        queries, caches, _, made = self.sets
        planned = baselines.flashinfer_dense(queries[:made], caches[:made])

        def of_layer(layer: int) -> Attention:
            run, q, pages = planned[layer % made].func, queries[layer], caches[layer]
            place = pages.page_table[:, -1].long(), self._slot

            def attend(_query: Any, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
                pages.k_cache[place], pages.v_cache[place] = keys, values
                return run(q, (pages.k_cache, pages.v_cache))

            return attend

        return [of_layer(layer) for layer in range(self.num_layers)]

    def _cudnn(self) -> list[Attention]:
        """cuDNN over contiguous copies of as many layers as keep them out of the L2."""
        shape = self.workload.shape
        size = 2 * shape.head_dim * shape.dtype.itemsize * shape.num_kv_heads * sum(shape.lengths)
        wanted = min(cold_sets(size, self.target.l2_bytes), self.num_layers)
        made = baselines.sdpa_dense(
            ["cudnn"], self.sets.queries[:wanted], self.sets.caches[:wanted]
        )["cudnn"]

        def attend(call: Any, _query: Any, *new: torch.Tensor) -> torch.Tensor:
            for pool, own in zip(call.args[2:], new, strict=True):  # K and V
                pool[:, :, -1] = own
            return call()[:, :, 0]

        return [partial(attend, made[layer % wanted]) for layer in range(self.num_layers)]


def _local(weight: torch.Tensor) -> torch.Tensor:
    """What this GPU has of it."""
    return weight.to_local() if isinstance(weight, DTensor) else weight
