"""Keys of a request: those that a fresh request with the same tokens, media, LoRA and salt would have."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, StreamingUpdate

from flexkv._core.index.block_keys import SequenceHasher, chain_seed
from flexkv.integration.vllm.tracked_request import (
    NEVER_SAVED,
    TrackedRequest,
    block_extras,
    is_cacheable,
    namespace_of,
)
from tests.support.vllm_stub import request

BLOCK = 4
MANAGER: Any = SimpleNamespace(
    tenant=lambda namespace: 0,
    hasher=lambda namespace: SequenceHasher(chain_seed(b"d", tuple(namespace)), BLOCK),
)


def media(name: str, offset: int, length: int) -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec(
        data=None, modality="image", identifier=name, mm_position=PlaceholderRange(offset=offset, length=length)
    )


def vllm_request(tokens: list[int], features: list[Any] = (), name: str = "r") -> Request:  # type: ignore[assignment]
    return Request(
        request_id=name, prompt_token_ids=list(tokens), sampling_params=SamplingParams(max_tokens=4),
        pooling_params=None, mm_features=list(features), resumable=True,
    )


def keys_of(tokens: list[int], features: list[Any] = ()) -> list[Any]:  # type: ignore[assignment]
    return TrackedRequest(vllm_request(tokens, features), MANAGER, BLOCK).keys().tolist()


def proceed(made: Request, tokens: list[int], features: list[Any]) -> None:
    """The session's next turn, by vLLM's own code."""
    update = StreamingUpdate(
        mm_features=features, prompt_token_ids=tokens, max_tokens=4, arrival_time=0.0,
        sampling_params=SamplingParams(max_tokens=4),
    )
    scheduler = SimpleNamespace(hash_block_size=BLOCK, log_stats=False, num_waiting_for_streaming_input=0)
    Scheduler._update_request_as_session(scheduler, made, update)


def test_media_of_a_later_turn_are_in_the_keys() -> None:
    def session(audio: str) -> tuple[list[Any], list[int]]:
        made = vllm_request(list(range(10, 18)))
        tracked = TrackedRequest(made, MANAGER, BLOCK)
        assert len(tracked.keys()) == 2
        made.num_computed_tokens = 8
        proceed(made, [9] * 8 + [5] * 4, [media(audio, 0, 8)])
        return tracked.keys().tolist(), list(made.all_token_ids)

    first, tokens = session("hello.wav")
    second, _ = session("secret.wav")
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, True, False, False, False]
    assert first == keys_of(tokens, [media("hello.wav", 8, 8)])


def test_sessions_against_fresh_requests() -> None:
    """Turns of any length, with and without media, whose last sampled tokens vLLM discards; keys are asked for at any
    time. The keys are always those of a fresh request."""
    rng = random.Random(4)
    for trial in range(200):
        made = vllm_request([rng.randrange(50) for _ in range(rng.randrange(1, 20))], name=str(trial))
        tracked = TrackedRequest(made, MANAGER, BLOCK)
        for turn in range(4):
            for _ in range(rng.randrange(0, 9)):            # decode, of which the last token may not be computed
                made.append_output_token_ids(rng.randrange(50))
                if rng.random() < 0.4:
                    tracked.keys()
            made.num_computed_tokens = made.num_tokens - rng.randrange(0, min(3, made.num_tokens))
            if rng.random() < 0.5:
                tracked.num_offered = len(tracked.keys())
            length = rng.randrange(1, 12)
            at = rng.randrange(0, length)
            items = [media(f"{trial}.{turn}", at, rng.randrange(1, length - at + 1))] if rng.random() < 0.7 else []
            proceed(made, [rng.randrange(50) for _ in range(length)], items)
            if rng.random() < 0.8:
                fresh = TrackedRequest(vllm_request(list(made.all_token_ids), made.mm_features), MANAGER, BLOCK)
                assert tracked.keys().tolist() == fresh.keys().tolist()
                assert tracked.num_offered <= len(tracked.keys())


def test_tokens_that_were_cut_and_others_in_their_place() -> None:
    tokens = list(range(16))
    made = request("r", tokens)
    tracked = TrackedRequest(made, MANAGER, BLOCK)
    assert len(tracked.keys()) == 4
    tracked.num_offered = 4
    for changed in ([*tokens[:10], 99, 98], [*tokens[:12], 7, 7, 7, 7], tokens[:3], [*tokens, 1, 2, 3, 4]):
        made.all_token_ids, made.num_tokens = changed, len(changed)
        assert tracked.keys().tolist() == keys_of(changed)
    assert tracked.num_offered == 0
    tracked.num_offered = NEVER_SAVED                       # computed with weights that are gone
    made.all_token_ids, made.num_tokens = tokens[:4], 4
    tracked.keys()
    assert tracked.num_offered == NEVER_SAVED


def test_media_that_come_for_tokens_that_were_hashed() -> None:
    made = request("r", [9] * 16)
    tracked = TrackedRequest(made, MANAGER, BLOCK)
    plain = tracked.keys().tolist()
    made.mm_features.append(media("a", 5, 2))
    with_media = tracked.keys().tolist()
    assert [a == b for a, b in zip(plain, with_media, strict=True)] == [True, False, False, False]
    made.mm_features[0] = media("b", 5, 2)
    assert tracked.keys().tolist() not in (plain, with_media)


@pytest.mark.parametrize(
    ("features", "touched"),
    [
        ([(4, 4)], [1]), ([(3, 1)], [0]), ([(3, 2)], [0, 1]), ([(0, 16)], [0, 1, 2, 3]), ([(15, 1)], [3]),
        ([(15, 40)], [3]), ([(1, 1), (2, 1)], [0]), ([(2, 8), (10, 3)], [0, 1, 2, 3]), ([(16, 4)], []), ([(4, 0)], []),
    ],
)
def test_an_item_is_in_every_block_that_it_touches(features: list[tuple[int, int]], touched: list[int]) -> None:
    made = request("r", [9] * 16, mm_features=[media(f"m{i}", *place) for i, place in enumerate(features)])
    assert sorted(block_extras(made, BLOCK, 0, 4)) == touched
    for first in range(4):
        for stop in range(first, 5):
            whole = block_extras(made, BLOCK, 0, 4)
            assert block_extras(made, BLOCK, first, stop) == {b: e for b, e in whole.items() if first <= b < stop}


def test_extras_are_unambiguous_and_do_not_depend_on_the_order() -> None:
    def extras(*features: Any) -> bytes:
        return block_extras(request("r", [9] * 16, mm_features=list(features)), BLOCK, 1, 2).get(1, b"")

    a, b = media("a", 4, 1), media("b", 5, 1)
    assert extras(a, b) == extras(b, a)
    different = [
        extras(a, b), extras(media("b", 4, 1), media("a", 5, 1)), extras(a), extras(b), extras(media("a", 4, 2)),
        extras(media("a", 3, 2)), extras(media("a@0\nb", 4, 1)), extras(media("a@0", 4, 1), b),
        extras(media("ab", 4, 1)), extras(media("\ud800", 4, 1)), extras(a, a), b"",
    ]
    assert len(set(different)) == len(different)


def test_prompts_with_embeddings_are_not_cached() -> None:
    assert is_cacheable(request("r", [1, 2]))
    assert not is_cacheable(request("r", [1, 2], prompt_embeds=np.zeros((2, 4))))                # mixed with tokens
    assert not is_cacheable(request("r", [1, 2], prompt_token_ids=None, prompt_embeds=np.zeros((2, 4))))
    assert not is_cacheable(request("r", [1, 2], prompt_token_ids=None))
    assert not is_cacheable(request("r", [1, 2], mm_features=[SimpleNamespace(identifier=None)]))


class Loras:
    """Versions as a test says."""

    def __init__(self, *versions: str | None) -> None:
        self.now: str | None = versions[0]

    def version(self, lora: Any) -> str | None:
        return self.now


def test_namespaces_of_requests() -> None:
    lora = SimpleNamespace(lora_name="sql", lora_path="/loras/sql", lora_int_id=1)
    loras: Any = Loras("1f")
    made = request("r", [1], lora_request=lora, cache_salt="t", namespace_info=["salt", "t"])
    entries = namespace_of(made, loras)
    assert entries is not None
    assert [(entry.kind, entry.name, entry.version) for entry in entries] == [
        ("lora", "sql", "1f"), ("salt", "t", ""), ("info", "salt", ""), ("info", "t", "")
    ]
    assert namespace_of(request("r", [1], cache_salt="\ud800"), loras)
    loras.now = None
    assert namespace_of(made, loras) is None


def test_a_lora_whose_content_changes() -> None:
    lora = SimpleNamespace(lora_name="sql", lora_path="/loras/sql", lora_int_id=1)
    tokens = list(range(16))
    loras: Any = Loras("1")

    def start(computed: int) -> TrackedRequest:
        return TrackedRequest(
            request("r", tokens, lora_request=lora, num_computed_tokens=computed), MANAGER, BLOCK, loras
        )

    waiting, running = start(0), start(8)
    first = waiting.keys().tolist()
    assert running.keys().tolist() == first
    loras.now = "2"
    second = waiting.keys().tolist()                        # nothing of it was computed yet
    assert len(second) == 4
    assert not set(map(tuple, first)) & set(map(tuple, second))
    for _ in range(3):
        assert len(running.keys()) == 0                     # computed with the one and with the other
    loras.now = "1"
    assert len(running.keys()) == 0
    loras.now = None
    assert len(waiting.keys()) == len(start(0).keys()) == 0
