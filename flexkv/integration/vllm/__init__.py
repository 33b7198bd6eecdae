"""vLLM: the stock ``FlexKVConnectorV1`` imports ``vllm_v1_adapter`` from here."""
