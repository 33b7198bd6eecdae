"""Start of the commands that run until they are stopped: their settings, their log, their signals."""

import argparse
import json
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from flexkv.config import FlexKVConfig, load_config
from flexkv.errors import ConfigError


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``load`` reads."""
    parser.add_argument("--config", type=Path, help="configuration file (default: FLEXKV_CONFIG_PATH)")
    parser.add_argument("--settings-from-stdin", action="store_true", help=argparse.SUPPRESS)    # by an engine


def load(args: argparse.Namespace) -> FlexKVConfig:
    """Load the settings, and write the log to standard error; ConfigError if a setting is wrong."""
    if args.config is not None and not args.config.is_file():
        raise ConfigError("--config", str(args.config), "is no file")
    config = load_config(args.config, **(json.load(sys.stdin) if args.settings_from_stdin else {}))
    logging.basicConfig(
        stream=sys.stderr, level=config.connector.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    return config


def stop_at_signals(stop: Callable[[], None]) -> None:
    """Call ``stop`` at SIGTERM and SIGINT."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, frame: stop())
