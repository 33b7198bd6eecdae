"""Settings of upstream FlexKV that this version accepts without a setting of its own."""

MEANINGLESS: dict[str, str] = {
    **dict.fromkeys(
        ("trt_subprocess_host", "trt_subprocess_ports", "local_zmq_ip", "local_zmq_port", "worker_shutdown_timeout_s",
         "transfer_manager_shutdown_timeout_s", "enable_mps", "vmm_fd_sock_dir"),
        "all processes of a node meet at Unix sockets",
    ),
    **dict.fromkeys(
        ("use_ce_transfer_h2d", "use_ce_transfer_d2h", "transfer_num_cta_h2d", "transfer_num_cta_d2h",
         "ce_segment_threshold", "ce_path_opt", "enable_ce_memcpy2d", "ce_gather_threads", "ce_gather_nt",
         "cudahost_chunk_size_gb", "use_hugepage_tmp_buffer", "mla_d2h_mode"),
        "the device agent chooses how blocks are copied",
    ),
    **dict.fromkeys(
        ("cpu_layout", "ssd_layout", "remote_layout", "gds_layout", "index_accel", "swa_multi_group",
         "enable_swa_transfer", "kv_cache_dtype"),
        "slots have one layout, and dtype and shapes come from the engine's tensors",
    ),
    **dict.fromkeys(
        ("ssd_io_opt", "iouring_entries", "iouring_flags", "max_file_size_gb", "hugetlbfs_dir",
         "mooncake_store_config_path", "mooncake_config_path", "redis_host", "redis_port", "redis_password",
         "local_ip", "node_ttl_seconds", "layerwise_notify_mode", "layerwise_eventfd_socket",
         "layerwise_eventfd_connect_max_retries", "slru_protected_threshold", "cpp_metrics_port"),
        "it belongs to a part that this version does not have",
    ),
    **dict.fromkeys(
        ("enable_flexkv", "sync_get", "maybe_skip_put", "enable_trace", "transfer_trace", "enable_collective_sync",
         "logging_prefix"),
        "this version has no such switch",
    ),
}
"""Settings that are accepted and ignored, with the reason that is logged."""

UNAVAILABLE: dict[str, str] = {
    "enable_nixl": "there is no NIXL transport in this version; leave it off",
    "enable_p2p_cpu": "nodes do not share KV in this version; leave it off",
    "enable_p2p_ssd": "nodes do not share KV in this version; leave it off",
    "enable_3rd_remote": "there is no remote tier in this version; leave it off",
    "use_mooncake_store_backend": "there is no remote tier in this version; leave it off",
}
"""Settings that are accepted only if they are off, with the reason. Turning one on is an error, because a user must not
believe that it works."""
