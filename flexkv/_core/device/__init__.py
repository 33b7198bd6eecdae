"""Copies between pages and slots in the process of a rank: agent, staging memory, CUDA driver, rings."""
