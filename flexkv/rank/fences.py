"""The steps of a rank's compute, before which its agent must not touch pages."""

from flexkv._core.device.agent import DeviceAgent
from flexkv.protocol.numbers import fence_of
from flexkv.rank.gds_worker import GdsWorker


class Fences:
    """The latest step of loads and of saves that may start, and the streams of their compute. The caller locks."""

    def __init__(self) -> None:
        self._load = self._save = 0
        self._streams: dict[bool, int] = {}          # stream of the last fence of loads (True), of saves

    def start(self, agent: DeviceAgent, gds: GdsWorker | None) -> None:
        """Give a new agent the steps that have begun, and those that are done."""
        for is_load, stream in self._streams.items():
            agent.fence(stream, is_load, self._load if is_load else self._save)
            if gds is not None:
                gds.advance(self._load, self._save, stream)
        agent.advance(self._load, self._save)
        if gds is not None:
            gds.advance(self._load, self._save, None)

    def advance(
        self, agent: DeviceAgent | None, gds: GdsWorker | None, load: int | None, save: int | None, stream: int | None
    ) -> None:
        """Let loads (saves) start whose fence is at most ``load`` (``save``); see ``RankClient.advance_fence``."""
        load, save = (None if fence is None else fence_of(fence) for fence in (load, save))
        for is_load, fence in ((True, load), (False, save)):
            if fence is not None and stream is not None:
                self._streams[is_load] = stream
                if agent is not None:
                    agent.fence(stream, is_load, fence)
        self._load, self._save = max(self._load, load or 0), max(self._save, save or 0)
        if agent is not None:
            agent.advance(self._load, self._save)
        if gds is not None:
            gds.advance(self._load, self._save, stream)
