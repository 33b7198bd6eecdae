"""KVResponse is read by people, in logs and at a prompt."""

import numpy as np

from flexkv import KVResponse, KVResponseStatus


def test_it_prints_in_one_short_line() -> None:
    mask = np.arange(5000) < 4992
    assert repr(KVResponse(KVResponseStatus.SUCCESS, 7, mask)) == "KVResponse(SUCCESS, task_id=7, 4992 of 5000 tokens)"
    failed = KVResponse(KVResponseStatus.FAILED, 8, np.zeros(3, dtype=np.bool_), "a rank has left")
    assert repr(failed) == "KVResponse(FAILED, task_id=8, 0 of 3 tokens, reason='a rank has left')"
    assert repr(KVResponse(KVResponseStatus.NOTFOUND, 9)) == "KVResponse(NOTFOUND, task_id=9)"
