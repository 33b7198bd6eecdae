"""Keys of a trace, and the order of its requests."""

from hypothesis import given, settings

from .traces import requests, trace_of


@settings(deadline=None)
@given(requests())
def test_equal_keys_mean_equal_prefixes(sequences: list[tuple[int, ...]]) -> None:
    trace = trace_of(sequences)
    prefixes = [ids[: i + 1] for ids in sequences for i in range(len(ids))]
    by_prefix = dict(zip(prefixes, map(bytes, trace.keys), strict=True))
    assert [by_prefix[prefix] for prefix in prefixes] == [bytes(key) for key in trace.keys]
    assert len(set(by_prefix.values())) == len(by_prefix) == trace.num_distinct
    for i, use in enumerate(trace.next_use.tolist()):
        later = [j for j in range(i + 1, len(prefixes)) if prefixes[j] == prefixes[i]]
        assert use == (later[0] if later else -1)


def test_ids_need_not_be_chained() -> None:
    trace = trace_of([(1, 2, 2), (3, 2, 2), (1, 2)])              # block 2 after other blocks is another block
    assert trace.num_distinct == 6
    assert (trace.keys[0:2] == trace.keys[6:8]).all()


def test_requests_are_in_order_of_time_and_never_at_the_same() -> None:
    trace = trace_of([(1,), (2,), (3,), (4,)], [30.0, 20.0, 20.0, 20.0])
    alone = trace_of([(2,), (3,), (4,), (1,)])
    assert (trace.keys == alone.keys).all()
    assert trace.seconds[0] == 0
    assert ((trace.seconds[1:] - trace.seconds[:-1]) > 0).all()
    assert abs(trace.duration_s - 10) < 1e-3


def test_a_trace_without_blocks() -> None:
    for sequences in ([], [(), ()]):
        trace = trace_of(sequences)
        assert (trace.num_requests, trace.num_blocks, trace.num_distinct) == (len(sequences), 0, 0)
