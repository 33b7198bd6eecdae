"""KVResponse is read by people, in logs and at a prompt; masks of tokens are those of blocks."""

import numpy as np
import pytest

from flexkv import KVResponse, KVResponseStatus
from flexkv.controller.response import mask_of_blocks


def test_it_prints_in_one_short_line() -> None:
    mask = np.arange(5000) < 4992
    assert repr(KVResponse(KVResponseStatus.SUCCESS, 7, mask)) == "KVResponse(SUCCESS, task_id=7, 4992 of 5000 tokens)"
    failed = KVResponse(KVResponseStatus.FAILED, 8, np.zeros(3, dtype=np.bool_), "a rank has left")
    assert repr(failed) == "KVResponse(FAILED, task_id=8, 0 of 3 tokens, reason='a rank has left')"
    assert repr(KVResponse(KVResponseStatus.NOTFOUND, 9)) == "KVResponse(NOTFOUND, task_id=9)"


@pytest.mark.parametrize("num_tokens", [16, 19, 32, 100])
def test_a_token_is_true_where_its_block_is_given(num_tokens: int) -> None:
    """Every set of the first blocks, as an array and, where it is one, as a range; tokens beyond whole blocks are
    False."""
    num_blocks = min(num_tokens // 4, 8)
    for chosen in range(1 << num_blocks):
        blocks = [block for block in range(num_blocks) if chosen >> block & 1]
        expected = [token // 4 in blocks for token in range(num_tokens // 4 * 4)] + [False] * (num_tokens % 4)
        assert mask_of_blocks(np.array(blocks, dtype=np.int32), 4, num_tokens).tolist() == expected
        if blocks == list(range(num_blocks - len(blocks), num_blocks)):
            assert mask_of_blocks(range(num_blocks - len(blocks), num_blocks), 4, num_tokens).tolist() == expected
