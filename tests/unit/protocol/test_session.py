"""Records of a session."""

import numpy as np
import pytest

from flexkv.errors import RegistrationError
from flexkv.protocol.session import pack_call, split, unpack_call


@pytest.mark.parametrize("size", range(9))
def test_keys_of_a_call_are_aligned(size: int) -> None:
    """Native code reads them as 64-bit numbers."""
    keys = np.arange(6, dtype=np.uint64).reshape(3, 2)
    command = {"name": "x" * size}
    content = b"".join(bytes(part) for part in pack_call(7, command, keys))
    number, found, found_keys = unpack_call(content)
    assert (number, found) == (7, command)
    assert found_keys.flags.aligned
    np.testing.assert_array_equal(found_keys, keys)


@pytest.mark.parametrize("count", [1, 3])
def test_a_record_of_another_length_is_refused(count: int) -> None:
    with pytest.raises(RegistrationError, match="record"):
        split(bytes(20), 4, (count, np.uint64))
