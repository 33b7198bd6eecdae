"""LRU, S3-FIFO and ARC over runs of blocks, as plainly as they can be said: every eviction looks at every run."""

import itertools
from dataclasses import dataclass, field

Prefix = tuple[int, ...]


@dataclass(eq=False)
class Run:
    """Blocks with one history."""

    blocks: list[Prefix]
    parent: "Run | None"
    used: float
    came: tuple[float, int]
    queue: int = 0
    lives: int = 0
    children: set["Run"] = field(default_factory=set)


class PlainLRU:
    """A cache of blocks of sequences; the last block of the run that was used longest ago goes first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.runs: set[Run] = set()
        self.at: dict[Prefix, Run] = {}
        self.now = 0.0
        self.moves = itertools.count()

    def request(self, sequence: Prefix) -> int:
        """Use what is there of a sequence, and put the rest; returns how many blocks were there."""
        self.now += 1
        prefixes = [sequence[: i + 1] for i in range(len(sequence))]
        hits = next((i for i, prefix in enumerate(prefixes) if prefix not in self.at), len(prefixes))
        path: list[Run] = []
        for prefix in prefixes[:hits]:
            if not path or self.at[prefix] is not path[-1]:
                path.append(self.at[prefix])
        if path:
            self._cut(path, prefixes[hits - 1])
        for run in path:
            run.used = self.now
            self.hit(run)
        new = prefixes[hits:]
        keep = set(path)
        self.make_room(len(new) - (self.capacity - len(self.at)), keep)
        new = new[: self.capacity - len(self.at)]
        if new:
            run = Run(new, path[-1] if path else None, self.now, (self.now, next(self.moves)))
            if run.parent is not None:
                run.parent.children.add(run)
            self.runs.add(run)
            self.at.update(dict.fromkeys(new, run))
            self.came(run)
        return hits

    def _cut(self, path: list[Run], last: Prefix) -> None:
        """The last run of a path ends with ``last``: what is behind it becomes a run of its own."""
        run = path[-1]
        index = run.blocks.index(last) + 1
        if index == len(run.blocks):
            return
        rest = Run(run.blocks[index:], run, run.used, run.came, run.queue, run.lives, run.children)
        for child in rest.children:
            child.parent = rest
        run.blocks, run.children = run.blocks[:index], {rest}
        self.runs.add(rest)
        self.at.update(dict.fromkeys(rest.blocks, rest))

    def make_room(self, count: int, keep: set[Run]) -> None:
        gone: list[list[Prefix]] = []
        queues: list[int] = []
        last = None
        while count > 0 and (run := self.victim([r for r in self.runs if not r.children and r not in keep])):
            block = run.blocks.pop()
            del self.at[block]
            count -= 1
            if run is last:
                gone[-1].append(block)
            else:
                gone.append([block])
                queues.append(run.queue)
            last = run
            if not run.blocks:
                self.runs.remove(run)
                if run.parent is not None:
                    run.parent.children.remove(run)
        for blocks, queue in zip(gone, queues, strict=True):
            self.went(blocks, queue)
        if gone:
            self.trim()

    def size(self, queue: int) -> int:
        return sum(len(run.blocks) for run in self.runs if run.queue == queue)

    # ---- what a policy says -----------------------------------------------------------------------------------

    def hit(self, run: Run) -> None:
        pass

    def came(self, run: Run) -> None:
        pass

    def went(self, blocks: list[Prefix], queue: int) -> None:
        """Blocks of a run, the deepest first."""

    def trim(self) -> None:
        """After all that one request pushed out."""

    def victim(self, leaves: list[Run]) -> Run | None:
        return min(leaves, key=lambda run: run.used, default=None)


class PlainS3FIFO(PlainLRU):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.small = int(0.1 * capacity)
        self.ghosts: dict[Prefix, int] = {}

    def hit(self, run: Run) -> None:
        run.lives = min(3, run.lives + 1)

    def came(self, run: Run) -> None:
        run.queue = 1 if self.ghosts.pop(run.blocks[0], 0) else 0

    def went(self, blocks: list[Prefix], queue: int) -> None:
        if queue == 0:
            self.ghosts.pop(blocks[-1], None)
            self.ghosts[blocks[-1]] = len(blocks)

    def trim(self) -> None:
        while sum(self.ghosts.values()) > self.capacity - self.small:
            del self.ghosts[next(iter(self.ghosts))]

    def victim(self, leaves: list[Run]) -> Run | None:
        while leaves:
            small = [run for run in leaves if run.queue == 0]
            main = [run for run in leaves if run.queue == 1]
            run = min(small if small and (self.size(0) > self.small or not main) else main, key=lambda run: run.came)
            if run.lives == 0:
                return run
            run.lives = run.lives - 1 if run.queue == 1 else 0
            run.queue, run.came = 1, (self.now, next(self.moves))
        return None


class PlainARC(PlainLRU):
    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.share = 0.0
        self.ghosts: tuple[dict[Prefix, int], dict[Prefix, int]] = ({}, {})

    def hit(self, run: Run) -> None:
        run.queue = 1

    def came(self, run: Run) -> None:
        for queue, ghosts in enumerate(self.ghosts):
            mine, other = sum(ghosts.values()), sum(self.ghosts[1 - queue].values())
            if (blocks := ghosts.pop(run.blocks[0], 0)):
                step = len(run.blocks) * max(1.0, other / (mine - blocks + len(run.blocks)))
                self.share = max(0.0, min(self.capacity, self.share + (step if queue == 0 else -step)))
                run.queue = 1

    def went(self, blocks: list[Prefix], queue: int) -> None:
        ghosts = self.ghosts[queue]
        ghosts.pop(blocks[-1], None)
        ghosts[blocks[-1]] = len(blocks)

    def trim(self) -> None:
        for ghosts, most in zip(self.ghosts, (self.capacity - int(self.share), self.capacity), strict=True):
            while sum(ghosts.values()) > most:
                del ghosts[next(iter(ghosts))]

    def victim(self, leaves: list[Run]) -> Run | None:
        recent = [run for run in leaves if run.queue == 0]
        frequent = [run for run in leaves if run.queue == 1]
        first = recent if recent and (self.size(0) > self.share or not frequent) else frequent
        return min(first, key=lambda run: run.used, default=None)
