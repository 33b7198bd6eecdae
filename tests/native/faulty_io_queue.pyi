from flexkv._core.io.io_queue import IoQueue

FAILS: int
SHORT: int
HANGS: int

class FaultyIoQueue(IoQueue):
    def plan(self, kind: int, fault: int, amount: int = -1, count: int = 1, file: int = -1) -> None: ...
    def release(self) -> None: ...
    @property
    def num_planned(self) -> int: ...
