"""Environment variables: which are settings, and how a wrong one is refused."""

import logging

import pytest

from flexkv.config import load_config
from flexkv.errors import ConfigError

SMALL = {"FLEXKV_CPU_CACHE_GB": "0.5"}

LINKS = {
    "FLEXKV_METRICS_SERVICE_HOST": "10.0.12.34",
    "FLEXKV_METRICS_SERVICE_PORT": "8080",
    "FLEXKV_METRICS_SERVICE_PORT_HTTP": "8080",
    "FLEXKV_METRICS_PORT": "tcp://10.0.12.34:8080",
    "FLEXKV_METRICS_PORT_8080_TCP": "tcp://10.0.12.34:8080",
    "FLEXKV_METRICS_PORT_8080_TCP_PROTO": "tcp",
    "FLEXKV_METRICS_PORT_8080_TCP_PORT": "8080",
    "FLEXKV_METRICS_PORT_8080_TCP_ADDR": "10.0.12.34",
    "FLEXKV_SERVICE_HOST": "fd00::1",                        # a Service that is called just flexkv
    "FLEXKV_SERVICE_PORT_GRPC": "9",
    "FLEXKV_PORT": "sctp://[fd00::1]:9",
    "FLEXKV_PORT_9_SCTP": "sctp://[fd00::1]:9",
    "FLEXKV_PORT_53_UDP_ADDR": "10.0.0.10",
    "FLEXKV_CPU_CACHE_GB_SERVICE_HOST": "10.0.0.9",          # nearly the name of a setting
    "FLEXKV_PY_METRICS_SERVICE_PORT": "8080",
    "FLEXKV_GPU_REGISTER_PORT_80_TCP": "tcp://10.0.0.8:80",
}


def test_variables_of_kubernetes_services_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="flexkv.config"):
        assert load_config(env=SMALL | LINKS) == load_config(env=SMALL)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert all(name in lines[0] for name in LINKS)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FLEXKV_METRICS_PORT", "8080"), ("FLEXKV_METRICS_PORT", "http://10.0.0.1:80"), ("FLEXKV_PORT", "9"),
        ("FLEXKV_METRICS_HOST_", "10.0.0.1"), ("FLEXKV_PORT_TCP", "tcp://10.0.0.1:80"),
        ("FLEXKV_SERVICE_HOSTS", "10.0.0.1"), ("FLEXKV_X_PORT_8O_TCP", "tcp://10.0.0.1:80"),
        ("FLEXKV_METRICS_HOSTNAME", "tcp://10.0.0.1:80"), ("FLEXKV_FOO", ""),
    ],
)
def test_a_typo_is_no_service(variable: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{variable} = .*is not a variable of FlexKV"):
        load_config(env=SMALL | {variable: value})


@pytest.mark.parametrize("variable", ["FLEXKV_PY_METRICS_PORT", "FLEXKV_GPU_REGISTER_PORT"])
@pytest.mark.parametrize("scheme", ["tcp", "udp", "sctp"])
def test_a_service_with_the_name_of_a_setting_is_named(variable: str, scheme: str) -> None:
    with pytest.raises(ConfigError, match=rf"{variable} = '{scheme}://10.0.0.1:80': .*enableServiceLinks: false"):
        load_config(env=SMALL | {variable: f"{scheme}://10.0.0.1:80"})


def test_a_far_guess_is_not_made() -> None:
    with pytest.raises(ConfigError, match=r"is not a variable of FlexKV$"):
        load_config(env={"FLEXKV_FOO": "32"})


@pytest.mark.parametrize("text", ["none", "None", " NULL ", "", "  "])
def test_none_and_empty(text: str) -> None:
    config = load_config(env=SMALL | {"FLEXKV_NUM_CPU_BLOCKS": text, "FLEXKV_NAMESPACES": text})
    assert (config.cache.num_cpu_blocks, config.cache.quotas) == (None, {})


def test_an_empty_variable_is_not_set() -> None:
    names = ("OP_TIMEOUT_S", "AUDIT", "SSD_CACHE_DIR", "METRICS_HOST", "EVICTION_POLICY", "KEY_SECRET", "CONFIG_PATH",
             "ENABLE_P2P_CPU", "ENABLE_MPS")
    config = load_config(env=SMALL | {f"FLEXKV_{name}": "" for name in names})
    assert config == load_config(env=SMALL)
    assert set(config.given) == {"cpu_cache_gb"}


def test_none_is_no_number() -> None:
    with pytest.raises(ConfigError, match="FLEXKV_OP_TIMEOUT_S = 'none': must be a number"):
        load_config(env={"FLEXKV_OP_TIMEOUT_S": "none"})


def test_an_error_names_the_variable_and_keeps_the_secret() -> None:
    with pytest.raises(ConfigError, match=r"FLEXKV_KEY_SECRET = '\*\*\*'") as caught:
        load_config(env=SMALL | {"FLEXKV_KEY_SECRET": "hunter2\udcff"})
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"ssd_cache_gb = 0.25: must be more than .*\(FLEXKV_SSD_CACHE_GB\)"):
        load_config(env=SMALL | {"FLEXKV_SSD_CACHE_GB": "0.25"})
