"""The process that owns the pages of an engine: registration, agent, GPUDirect Storage, signals of layers."""
