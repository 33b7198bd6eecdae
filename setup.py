"""The native extensions. Everything else about the package is in pyproject.toml."""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("FLEXKV_BUILD_DEBUG", "") == "1"
SANITIZE = os.environ.get("FLEXKV_BUILD_SANITIZE", "")  # "address,undefined" or "thread"
TESTS = os.environ.get("FLEXKV_BUILD_TESTS", "") == "1"  # modules of tests/native too: never for a wheel

FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-sign-compare"]
FLAGS += ["-O1", "-g", "-DFLEXKV_DEBUG=1"] if DEBUG or SANITIZE else ["-O3", "-g0"]
FLAGS += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer"] if SANITIZE else []
LINK = [f"-fsanitize={SANITIZE}"] if SANITIZE else []

# module -> C sources that it is built with
MODULES: dict[str, list[str]] = {
    "arena": [],
    "device.agent": ["csrc/agent.c", "csrc/cuda_copy.c", "csrc/host_copy.c", "csrc/ring.c"],
    "device.cuda_driver": [],
    "device.cuda_memory": [],
    "device.ring": ["csrc/ring.c"],
    "device.staging": [],
    "index.block_keys": [],
    "index.eviction": [],
    "index.eviction_queues": [],
    "index.ghosts": [],
    "index.nodes": [],
    "index.radix": [],
    "index.reuse_statistics": [],
    "index.slots": [],
    "io.checksum": [],
    "io.io_queue": [f"csrc/io_{part}.c" for part in ("job", "queue", "threads", "uring")],
    "io.slot_records": [],
    "mapping": [],
    "record_rings": ["csrc/ring.c"],
    "ring_pair": ["csrc/ring.c"],
    "slot_mapping": [],
}

# module -> libraries that become part of it, out of sight of others, so that a wheel needs none of them
STATIC: dict[str, list[str]] = {"flexkv._core.io.io_queue": ["-l:liburing.a", "-Wl,--exclude-libs,ALL"]}

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": DEBUG,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": DEBUG,
    "freethreading_compatible": False,
}


def extension(module: str, sources: list[str], folders: list[str]) -> Extension:
    return Extension(
        module,
        [module.replace(".", "/") + ".pyx", *sources],
        include_dirs=folders,
        depends=[str(path) for folder in folders for kind in ("*.h", "*.cu") for path in Path(folder).glob(kind)],
        extra_compile_args=FLAGS,
        extra_link_args=[*LINK, "-pthread", *STATIC.get(module, [])],
    )


extensions = [extension(f"flexkv._core.{module}", sources, ["csrc"]) for module, sources in MODULES.items()]
if TESTS:
    folder = "tests/native"
    extensions += [extension("tests.native.faulty_io_queue", [f"{folder}/io_faulty.c"], ["csrc", folder])]

setup(ext_modules=cythonize(extensions, compiler_directives=DIRECTIVES))
