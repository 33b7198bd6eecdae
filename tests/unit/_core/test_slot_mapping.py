"""Slot mappings: whole pages in order become their numbers, everything else is refused."""

import numpy as np
import pytest

from flexkv._core.slot_mapping import pages_from_slot_mapping
from flexkv.errors import SlotMappingError


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_slot_mapping(dtype: type) -> None:
    pages = np.array([7, 0, 3], dtype=np.int32)
    mapping = (pages[:, None] * 16 + np.arange(16)).ravel().astype(dtype)
    assert pages_from_slot_mapping(mapping, 16).tolist() == pages.tolist()
    for wrong in (mapping[:-1], mapping + 1, np.roll(mapping, 1), -mapping, mapping.astype(np.float64),
                  mapping.reshape(3, 16)):
        with pytest.raises(SlotMappingError):
            pages_from_slot_mapping(wrong, 16)
    broken = mapping.copy()
    broken[20] += 1
    with pytest.raises(SlotMappingError, match="tokens 16 to 31"):
        pages_from_slot_mapping(broken, 16)
