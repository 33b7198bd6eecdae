"""Programs beside the product: benchmarks, replay of traces, the demo."""
