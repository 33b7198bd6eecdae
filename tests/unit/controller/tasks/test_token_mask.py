"""Masks of tokens: the blocks may follow one another, or not."""

import numpy as np
import pytest

from flexkv.controller.tasks.task import token_mask


@pytest.mark.parametrize("num_tokens", [16, 19, 32, 100])
def test_a_token_is_true_where_its_block_is_given(num_tokens: int) -> None:
    """Every set of the first blocks, as an array and, where it is one, as a range; tokens beyond whole blocks are
    False."""
    num_blocks = min(num_tokens // 4, 8)
    for chosen in range(1 << num_blocks):
        blocks = [block for block in range(num_blocks) if chosen >> block & 1]
        expected = [token // 4 in blocks for token in range(num_tokens // 4 * 4)] + [False] * (num_tokens % 4)
        assert token_mask(np.array(blocks, dtype=np.int32), 4, num_tokens).tolist() == expected
        if blocks == list(range(num_blocks - len(blocks), num_blocks)):
            assert token_mask(range(num_blocks - len(blocks), num_blocks), 4, num_tokens).tolist() == expected
