"""The stock connector, and what it does not pass on.

For ``kv_connector_module_path: flexkv.integration.vllm.connector`` with ``kv_connector: FlexKVConnector``.
"""

from vllm.distributed.kv_transfer.kv_connector.v1.flexkv_connector import FlexKVConnectorV1


class FlexKVConnector(FlexKVConnectorV1):
    """``FlexKVConnectorV1`` whose cached KV is forgotten by ``reset_prefix_cache(reset_connector=True)``."""

    def reset_cache(self) -> bool:
        """Forget all KV that was saved, as after a change of weights."""
        return bool(self._flexkv_connector.reset_cache())
