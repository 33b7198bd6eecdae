"""Serves metrics over HTTP, as Prometheus reads them."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from flexkv.metrics.catalog import entry_of

logger = logging.getLogger("flexkv.metrics")

PREFIX = "flexkv_"

_SECONDS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class Metrics(Collector):
    """The metrics of one manager.

    Parameters
    ----------
    stats : callable
        ``KVManager.stats``; called for each scrape, on a thread of the server.
    labels : mapping from str to str
        Of every metric: what tells this manager from others.
    host, port : str, int
        Where to serve them; 0: any port that is free.

    Attributes
    ----------
    port : int or None
        Where they are served; None while they are not.
    """

    def __init__(self, stats: Callable[[], Mapping[str, int]], labels: Mapping[str, str], host: str, port: int) -> None:
        self._stats = stats
        self._labels = dict(labels)
        self._registry = CollectorRegistry()
        self._registry.register(self)
        names = [*self._labels, "kind"]
        self._seconds = Histogram(
            "transfer_seconds", "From the order to move blocks until all of them are there, or have failed; with what "
            "it waited for", [*names, "status"], namespace="flexkv", buckets=_SECONDS, registry=self._registry,
        )
        self._blocks = Counter(
            "transferred_blocks", "Blocks that were moved, by kind of transfer", names, namespace="flexkv",
            registry=self._registry,
        )
        self._values: dict[tuple[str, str], tuple[Histogram, Counter]] = {}     # to look them up costs more than to add
        self._address = host, port
        self._serving: tuple[WSGIServer, threading.Thread] | None = None
        self.port: int | None = None

    def transfer_ended(self, kind: str, status: str, num_blocks: int, seconds: float) -> None:
        """A transfer has ended; ``num_blocks`` were moved. Microseconds; raises nothing."""
        if (values := self._values.get((kind, status))) is None:
            labels = {**self._labels, "kind": kind}
            values = self._seconds.labels(**labels, status=status), self._blocks.labels(**labels)
            self._values[kind, status] = values
        values[0].observe(seconds)
        values[1].inc(num_blocks)

    def collect(self) -> Iterator[Family]:
        """``stats`` as metric families."""
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

    # ---- the server -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Serve them until ``close``. If the address cannot be had the log says so, and nothing else is the worse."""
        host, port = self._address
        try:
            self._serving = server, _ = start_http_server(port, host, self._registry)
        except OSError as error:
            logger.error(
                "no metrics: cannot listen at %s:%d (%s); set metrics_host and py_metrics_port to one that is free",
                host, port, error,
            )
            return
        self.port = server.server_port
        logger.info("metrics are at http://%s:%d/metrics", host, self.port)

    def close(self) -> None:
        """Serve them no more. May be repeated."""
        if self._serving is not None:
            server, thread = self._serving
            self._serving = self.port = None
            server.shutdown()
            server.server_close()
            thread.join()
