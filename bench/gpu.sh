#!/usr/bin/env bash
# What `make gpu` runs on a machine with a CUDA device: the extension's build, correctness, memory checks, benchmarks. No
# network, nothing installed: the python that is there needs torch, triton, transformers, pytest, setuptools and pybind11, and
# nvcc is on the path (without the last three the CUDA kernels are left out). STEPS="build test bench" leaves out a step,
# ONLY=regex measures some cases, PYTHON=... names the interpreter.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" "${VIRTUAL_ENV:-.venv}/bin/python" python3; do
        [[ -n $candidate ]] && "$candidate" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null \
            && { echo "$candidate"; return; }
    done
    echo "error: no python with a torch that sees a CUDA device (tried \$PYTHON, ${VIRTUAL_ENV:-.venv}/bin/python, python3)" >&2
    return 2
}

# The package as an installation would lay it out, made of links: setuptools may be missing or too old here.
link_package() {
    rm -rf build/gpu && mkdir -p build/gpu/condense_core
    local entry
    for entry in condense_core/*; do ln -s "../../../$entry" "build/gpu/$entry"; done
    ln -s ../../../kernels build/gpu/condense_core/kernels
    ln -s ../../../models build/gpu/condense_core/_models
    ln -s ../../bench build/gpu/bench
}

python=$(find_python) || exit 2
steps=${STEPS:-build test sanitize bench}
failed=()
if [[ $steps == *build* ]]; then
    echo "== building the extension for this GPU"
    arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
    if ! command -v nvcc >/dev/null || ! "$python" -c 'import setuptools, pybind11'; then
        echo "nvcc, setuptools or pybind11 is missing: the CUDA kernels are left out"
    else
        CONDENSE_CUDA=1 CONDENSE_CUDA_ARCHS=$arch "$python" setup.py --quiet build_ext --inplace || failed+=(build)
    fi
fi
link_package
# The checkout itself stays off the path: it has no package condense_core.kernels.
export PYTHONPATH=$PWD/build/gpu PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
unset TRITON_INTERPRET CONDENSE_BACKEND
"$python" -c 'import torch, triton; print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)'

if [[ $steps == *test* ]]; then
    echo "== correctness, bf16 included"
    "$python" -m pytest tests/kernels tests/ops tests/csrc tests/compressor/test_varlen.py -m 'not slow' -p no:cacheprovider || failed+=(test)
fi
if [[ $steps == *sanitize* ]]; then
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck; do
            echo "== compute-sanitizer, $tool"
            # One allocation per tensor, so that a read past its end is one past an allocation's.
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
                "$python" -m bench.sanitize || failed+=("sanitize:$tool")
        done
    else
        echo "== compute-sanitizer is not on the PATH: skipped"
    fi
fi
if [[ $steps == *bench* ]]; then
    echo "== benchmarks"
    "$python" -m bench.gpu --only "${ONLY:-}" ${OUT:+--out "$OUT"} || failed+=(bench)
    echo "== the encoder, eager and compiled"
    "$python" -m bench.encode_gpu ${OUT:+--out "$OUT"} || failed+=(encode)
    echo "== what pruning adds to a prefill"
    "$python" -m bench.prefill --device cuda --processes 2 || failed+=(prefill)
fi
if ((${#failed[@]})); then
    echo "FAILED: ${failed[*]}" >&2
    exit 1
fi
echo "passed: $steps"
