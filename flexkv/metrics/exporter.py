"""Serves metrics over HTTP in the format of Prometheus."""

import logging
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from flexkv.metrics.catalog import entry_of
from flexkv.metrics.server import MetricsServer

logger = logging.getLogger("flexkv.metrics")

PREFIX = "flexkv_"

_SECONDS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Upper bounds, in seconds, of the buckets of the histogram of transfers."""


class _Transfers:
    """Counts of transfers of one kind and status.

    The counts are plain numbers: if PROMETHEUS_MULTIPROC_DIR is set, prometheus_client's counters keep their values in
    files, and an error of such a file would fail a transfer.
    """

    def __init__(self) -> None:
        self.num_blocks = 0
        self.seconds = 0.0
        self._counts = [0] * (len(_SECONDS) + 1)

    def add(self, num_blocks: int, seconds: float) -> None:
        self.num_blocks += num_blocks
        self.seconds += seconds
        self._counts[bisect_left(_SECONDS, seconds)] += 1

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bound of each bucket, and number of transfers that took at most this time."""
        bounds = [*(str(bound) for bound in _SECONDS), "+Inf"]
        return list(zip(bounds, accumulate(self._counts), strict=True))


class Metrics(Collector):
    """The metrics of one manager.

    Parameters
    ----------
    stats : callable
        ``Blocks.stats``; called for each scrape, on a thread of the server.
    labels : mapping from str to str
        Labels of every metric, which distinguish this manager from others.
    host, port : str, int
        Address at which metrics are served; port 0: any free port.

    Attributes
    ----------
    port : int or None
        Port at which metrics are served; None: they are not served.
    """

    def __init__(self, stats: Callable[[], Mapping[str, int]], labels: Mapping[str, str], host: str, port: int) -> None:
        self._stats = stats
        self._labels = dict(labels)
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._lock = threading.Lock()
        self._transfers: dict[tuple[str, str], _Transfers] = {}     # by kind and status
        self._address = host, port
        self._serving: MetricsServer | None = None
        self._changing = threading.Lock()           # guards _serving, _is_closed and port
        self._is_closed = False
        self.port: int | None = None

    def transfer_ended(self, kind: str, status: str, num_blocks: int, seconds: float) -> None:
        """Count a transfer that has ended and moved ``num_blocks`` blocks. Takes microseconds; raises nothing."""
        with self._lock:
            if (transfers := self._transfers.get((kind, status))) is None:
                transfers = self._transfers[kind, status] = _Transfers()
            transfers.add(num_blocks, seconds)

    def collect(self) -> Iterator[Family]:
        """``stats`` and the transfers as metric families."""
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for stat, value in self._stats().items():
            if (entry := entry_of(stat)) is None:
                continue
            metric, labels = entry[0], {**self._labels, **entry[1]}
            if metric.name not in families:
                make = CounterMetricFamily if metric.is_counter else GaugeMetricFamily
                families[metric.name] = make(PREFIX + metric.name, metric.text, labels=list(labels))
            families[metric.name].add_metric(list(labels.values()), value)
        yield from families.values()
        yield from self._collect_transfers()

    def _collect_transfers(self) -> Iterator[Family]:
        names, values = [*self._labels, "kind"], list(self._labels.values())
        seconds = HistogramMetricFamily(
            PREFIX + "transfer_seconds", "From the submission of a transfer until all of its blocks have arrived or "
            "failed, including the time that it waited", labels=[*names, "status"],
        )
        blocks = CounterMetricFamily(
            PREFIX + "transferred_blocks", "Blocks that were moved, by kind of transfer", labels=names
        )
        moved: dict[str, int] = {}
        with self._lock:
            for (kind, status), transfers in self._transfers.items():
                seconds.add_metric([*values, kind, status], transfers.buckets(), transfers.seconds)
                moved[kind] = moved.get(kind, 0) + transfers.num_blocks
        for kind, count in moved.items():
            blocks.add_metric([*values, kind], count)
        yield seconds
        yield blocks

    # ---- the server -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Serve metrics until ``close``; does nothing after ``close``. If the address cannot be used, a warning is
        logged, and FlexKV works without metrics."""
        with self._changing:
            if not self._is_closed:
                self._start()

    def _start(self) -> None:
        host, port = self._address
        try:
            self._serving = server = MetricsServer(host, port, self._registry)
        except (OSError, ValueError, OverflowError, RuntimeError) as error:     # invalid names raise several types
            logger.warning(
                "no metrics: cannot listen at %s:%d (%s); set metrics_host to an address of this machine and "
                "py_metrics_port to a port that is free", host, port, error,
            )
            return
        self.port = server.server_port
        logger.info("metrics are at http://%s:%d/metrics", host, self.port)

    def close(self) -> None:
        """Stop serving metrics. May be called again."""
        with self._changing:
            self._is_closed = True
            serving, self._serving, self.port = self._serving, None, None
        if serving is not None:
            serving.close()
