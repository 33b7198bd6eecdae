"""Random requests for an engine, and loads that fail at random."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.integration.paged_engine import PagedEngine
from tests.integration.paged_model import VOCABULARY

NO_PAGE = 1 << 24


@dataclass
class Asked:
    """A request of the workload; aborted after ``abort`` steps of the engine, if that is not 0."""

    name: str
    prompt: list[int]
    tokens: int
    salt: str | None
    lora: int
    arrives: int
    abort: int


def make_requests(
    count: int, seed: int, length: int = 300, per_step: float = 0.3, adapters: tuple[int, ...] = (0, 0, 1),
    crossing: float = 0.0,
) -> list[Asked]:
    """Requests of which most share a prefix with an earlier one, in two salts and some adapters.

    ``crossing``: share of those whose prefix comes from a request with another salt or adapter, perhaps.
    """
    rng, made = random.Random(seed), []
    step = 0.0
    for i in range(count):
        shared: list[int] = []
        other = made[rng.randrange(max(0, i - 30), i)] if i and rng.random() < 0.75 else None
        if other is not None:
            shared = other.prompt[: rng.randrange(len(other.prompt)) + 1]
        size = max(0, rng.randrange(20, length) - len(shared))
        own = [rng.randrange(*VOCABULARY) for _ in range(size or 1)]
        if other is None or (crossing and rng.random() < crossing):
            salt, lora = rng.choice([None, None, "a", "b"]), rng.choice(adapters)
        else:
            salt, lora = other.salt, other.lora
        step += rng.expovariate(per_step)
        abort = rng.randrange(1, 12) if rng.random() < 0.1 else 0
        made.append(Asked(f"r{i}", shared + own, rng.randrange(1, 24), salt, lora, int(step), abort))
    return made


class FailingLoads:
    """Loads of an engine fail at random: of a load that is hit, some blocks go to pages that do not exist, so that the
    request's pages keep what was in them. On one rank, a load is reported as failed although it was made."""

    def __init__(self, engine: PagedEngine, share: float, seed: int) -> None:
        self._random, self._share = random.Random(seed), share
        self.num_loads = self.num_failed = 0
        self._manager, self._get_blocks = engine.manager, engine.manager.get_blocks
        engine.manager.get_blocks = self._get
        for worker in engine.workers[1:]:
            client = worker.connector._flexkv_connector.worker._client
            client.poll_results = self._worse(client.poll_results)
        for worker in engine.workers[:1]:
            client = worker.connector._flexkv_connector.worker._client
            client.follow_load = self._leave(client.follow_load)

    def stop(self) -> None:
        """No load fails any more."""
        self._share, self._manager.get_blocks = 0.0, self._get_blocks

    def _hit(self) -> bool:
        return self._random.random() < self._share

    def _get(self, keys: Any, start: int, pages: Any, *args: Any, **more: Any) -> int:
        self.num_loads += 1
        if self._hit():
            self.num_failed += 1
            pages = pages.copy()
            first = self._random.randrange(len(pages))
            pages[first : first + self._random.randrange(1, 4)] = NO_PAGE
        task: int = self._get_blocks(keys, start, pages, *args, **more)
        return task

    def _worse(self, poll: Any) -> Any:
        def worse() -> Any:
            results = poll()
            for result in results:
                if result.kind.name == "H2D" and self._hit():
                    self.num_failed += 1
                    result.ok[self._random.randrange(len(result.ok)) :] = False
            return results

        return worse

    def _leave(self, follow: Any) -> Any:
        def leave(*args: Any) -> bool:
            if self._random.random() < self._share / 4:
                self.num_failed += 1
                return False
            return bool(follow(*args))

        return leave


def serve(engine: PagedEngine, requests: list[Asked], pace: Callable[[], object] = lambda: None) -> None:
    """Let requests arrive, and go away, as they say; time is counted in steps of the engine. ``pace`` is called between
    steps, where it may wait for what runs in the background."""
    now, todo = 0, sorted(requests, key=lambda one: one.arrives)
    leaving: list[tuple[int, str]] = []

    def between() -> None:
        nonlocal now
        now += 1
        pace()
        while todo and (todo[0].arrives <= now or not engine.scheduler.has_requests()):
            one = todo.pop(0)
            engine.add(one.name, one.prompt, one.tokens, one.salt, one.lora)
            if one.abort:
                leaving.append((now + one.abort, one.name))
        for when, name in [pair for pair in leaving if pair[0] <= now]:
            leaving.remove((when, name))
            engine.abort(name)

    engine.between_steps = between
    between()
    engine.run()
    while todo:
        between()
        engine.run()


def wrong_answers(engine: PagedEngine, requests: list[Asked]) -> list[str]:
    """Requests whose answer is not the model's; of those that were aborted, what there is of it."""
    wrong = []
    for one in requests:
        got = engine.answers[one.name]
        want = engine.right_answer(one.prompt, one.tokens, one.lora)
        if got != want[: len(got)] or (not one.abort and len(got) != len(want)):
            wrong.append(one.name)
    return wrong
