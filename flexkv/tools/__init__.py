"""Programs that are not part of the service: benchmarks, replay of traces, the demo."""
