"""``paged_model`` on ranks that share out the tokens of a sequence, as vLLM's decode context parallelism does.

Every group of ranks has all tokens of one KV head. With more groups than heads, several groups have the same head. A
token attends to what it reads from the pages of all groups: a wrong byte on any rank changes the answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from tests.integration import paged_model
from tests.integration.paged_engine import NAMES, PagedEngine, PagedWorker
from tests.integration.paged_model import BLOCK, CHANNELS, LAYERS, U32


@dataclass(frozen=True)
class Layout:
    """Tensor-parallel ranks, the shares of each group, the interleave, and KV heads of the model."""

    ranks: int
    shares: int
    interleave: int = 1
    heads: int = 1

    @property
    def groups(self) -> int:
        return self.ranks // self.shares

    @property
    def page_tokens(self) -> int:
        return BLOCK * self.shares

    def head_of(self, group: int) -> int:
        """With fewer heads than ranks, vLLM gives neighbouring ranks the same head."""
        return group * self.shares // (self.ranks // self.heads)

    def place(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Index of the page, share, and place in the share's page, of tokens: vLLM's slot mapping."""
        inside = positions % self.page_tokens
        share = inside // self.interleave % self.shares
        rounds = inside // (self.shares * self.interleave)
        return positions // self.page_tokens, share, rounds * self.interleave + inside % self.interleave

    def compute(self, tokens: list[int], lora: int = 0) -> tuple[list[list[torch.Tensor]], np.ndarray]:
        """Pages of a sequence by rank and layer, and its hidden states. Reads no page."""
        kv_of_head, hidden = self._run(tokens, lora)
        page, share, place = (values.tolist() for values in self.place(np.arange(len(tokens))))
        caches = [paged_model.blank(-(-len(tokens) // self.page_tokens)) for _ in range(self.ranks)]
        for group in range(self.groups):
            for layer in range(LAYERS):
                rows = torch.from_numpy(kv_of_head[layer, self.head_of(group)].view(np.int32))
                for i, row in enumerate(rows):                  # one by one: nothing here is shared with the engine
                    caches[group * self.shares + share[i]][layer][page[i], 0, place[i]] = row
        return caches, hidden

    def answer(self, prompt: list[int], count: int, lora: int = 0) -> list[int]:
        """Greedy answer of ``count`` tokens."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(paged_model.sample(self._run(tokens, lora)[1][-1]))
        return tokens[len(prompt) :]

    def _run(self, tokens: list[int], lora: int) -> tuple[dict[tuple[int, int], np.ndarray], np.ndarray]:
        """KV of a sequence by layer and head, and its hidden states."""
        positions, kv = np.arange(len(tokens)).astype(U32), {}
        hidden = paged_model.embed(np.array(tokens), lora)
        for layer in range(LAYERS):
            context = np.zeros(len(tokens), dtype=U32)
            for group in range(self.groups):
                head = self.head_of(group)
                kv[layer, head] = paged_model.kv_of(hidden, positions, layer + LAYERS * head)
                context += np.cumsum(paged_model.weight(kv[layer, head], positions), dtype=U32)
            hidden = paged_model.mix(hidden, context)
        return kv, hidden


class SharedChunk:
    """Tokens of one request in one step of all ranks."""

    def __init__(self, layout: Layout, pages: np.ndarray, start: int, tokens: np.ndarray, lora: int) -> None:
        self._layout, self._pages, self.start = layout, pages, start
        self.positions = np.arange(start, start + len(tokens)).astype(U32)
        self.hidden = paged_model.embed(tokens, lora)

    def layer(self, caches: Sequence[torch.Tensor], layer: int) -> None:
        """``caches``: the layer's tensor of each rank."""
        layout, past = self._layout, np.arange(self.start)
        new = self.positions.astype(np.int64)
        context = np.zeros(len(new), dtype=U32)
        for group in range(layout.groups):
            views = [cache.numpy().view(U32)[:, 0] for cache in caches[group * layout.shares :][: layout.shares]]
            kv = paged_model.kv_of(self.hidden, self.positions, layer + LAYERS * layout.head_of(group))
            before = np.zeros((self.start, CHANNELS), dtype=U32)
            for share, view in enumerate(views):
                page, owner, place = layout.place(new)
                mine = owner == share
                view[self._pages[page[mine]], place[mine]] = kv[mine]
                page, owner, place = layout.place(past)
                mine = owner == share
                before[mine] = view[self._pages[page[mine]], place[mine]]
            context += paged_model.weight(before, past.astype(U32)).sum(dtype=U32)
            context += np.cumsum(paged_model.weight(kv, self.positions), dtype=U32)
        self.hidden = paged_model.mix(self.hidden, context)


class ContextParallelEngine(PagedEngine):
    """A ``PagedEngine`` whose ranks run each layer together."""

    def __init__(self, layout: Layout, *args: Any, **more: Any) -> None:
        self.layout = layout
        super().__init__(*args, ranks=layout.ranks, **more)

    def adapt_config(self) -> None:
        parallel = self.config.parallel_config
        parallel.decode_context_parallel_size = self.layout.shares
        parallel.cp_kv_cache_interleave_size = self.layout.interleave
        self.config.model_config.model_arch_config.total_num_kv_heads = self.layout.heads

    def _make_worker(self, rank: int, cache: Any, num_pages: int, transfer: Any) -> PagedWorker:
        group = SimpleNamespace(rank_in_group=rank % self.layout.shares, world_size=self.layout.shares)
        with patch("vllm.distributed.parallel_state.get_dcp_group", lambda: group):
            return super()._make_worker(rank, cache, num_pages, transfer)

    def make_worker(self, connector: Any, num_pages: int) -> PagedWorker:
        return PagedWorker(connector, num_pages, lambda *args: SharedChunk(self.layout, *args))

    def pages_of(self, tokens: list[int], lora: int) -> list[list[torch.Tensor]]:
        return self.layout.compute(tokens, lora)[0]

    def right_answer(self, prompt: list[int], count: int, lora: int) -> list[int]:
        return self.layout.answer(prompt, count, lora)

    def run_workers(self, output: Any) -> list[Any]:
        for worker in self.workers:
            worker.begin(output)
        each = [worker.make_chunks(output, self.loras) for worker in self.workers]
        chunks = each[0]
        for layer, name in enumerate(NAMES if chunks else ()):
            for worker in self.workers:
                worker.wait_for_layer(name)
            for chunk in chunks.values():
                chunk.layer([worker.caches[layer] for worker in self.workers], layer)
        return [worker.end(output, worker.sample(chunks)) for worker in self.workers]
