"""Code of a rank, the process that owns the engine's pages: registration, agent, GPUDirect Storage, layer signals."""
