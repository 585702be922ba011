#!/usr/bin/env bash
# Everything that needs a GPU, in one command: builds for this machine's card, runs the GPU suite,
# compute-sanitizer and the GPU benchmark, and leaves logs, results and a report in one folder.
#
#   tests/gpu/check.sh FOLDER [build] [test] [sanitize] [bench]      without steps: all of them
#
# It installs nothing. It needs python3 (PYTHON) with torch, triton, pybind11, cmake, ninja,
# setuptools, pytest and pytest-benchmark, and nvcc; compute-sanitizer and the benchmark's peers are
# used where they are. TEST_FLAGS, SANITIZE_FLAGS and BENCH_FLAGS, quoted as for a shell, are handed to
# pytest: with pytest-xdist, TEST_FLAGS="-n 8" and OMP_NUM_THREADS=2 the tests take a few minutes. A
# failing step does not keep the next from running; the exit status says whether all passed.
# EMP_FAST_GPU_DRY_RUN=1 tries this script itself on a machine without a GPU.
set -uo pipefail
cd "$(dirname "$0")/../.."

folder=${1:?usage: tests/gpu/check.sh FOLDER [build] [test] [sanitize] [bench]}
shift
steps=("${@:-}")
[ -n "${steps[0]}" ] || steps=(build test sanitize bench)
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$folder"
summary=$folder/summary.txt

if [ "${EMP_FAST_GPU_DRY_RUN:-0}" = 1 ]; then
  build_environment=(EMP_FAST_REQUIRE_NATIVE=1)
  bench_flags=(--device cpu --quick)
  # No kernel of the CPU depends on the choice: each run would repeat the first.
  choice_flags=(--collect-only)
else
  export EMP_FAST_REQUIRE_GPU=1
  architecture=$("$python" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "") + "-real")')
  build_environment=(EMP_FAST_REQUIRE_NATIVE=1 EMP_FAST_CUDA=1 "EMP_FAST_CUDA_ARCHS=$architecture")
  bench_flags=(--device cuda)
  choice_flags=()
fi

build() { env "${build_environment[@]}" "$python" setup.py build_ext --inplace; }

test() {
  local flags kernels
  eval "flags=(${TEST_FLAGS:-})"
  "$python" -m pytest tests/gpu -q --junitxml="$folder/test.xml" "${flags[@]}" || return
  # Rows again by the kernels that auto, the default, does not choose (docs/kernels.md).
  for kernels in plain shared cluster ring held; do
    EMP_FAST_CUDA_ROWS=$kernels "$python" -m pytest tests/gpu/test_scores.py tests/gpu/test_device.py \
      -q -k 'not triton' --junitxml="$folder/test-$kernels.xml" "${choice_flags[@]}" "${flags[@]}" || return
  done
  for kernels in plain stepped; do
    EMP_FAST_TRITON_ROWS=$kernels "$python" -m pytest tests/gpu/test_scores.py tests/gpu/test_device.py \
      -q -k 'not cuda' --junitxml="$folder/test-triton-$kernels.xml" "${choice_flags[@]}" "${flags[@]}" || return
  done
}

sanitize() {
  if ! command -v compute-sanitizer; then
    echo "compute-sanitizer is not on the PATH: nothing was checked"
    return 1
  fi
  # Every tensor its own allocation, else a read beyond one lands in its neighbour unseen.
  local tool kernels which flags
  eval "flags=(${SANITIZE_FLAGS:-})"
  for tool in memcheck racecheck; do
    for kernels in auto shared cluster ring held; do
      # Strided logits are copied to memory that ends within a vector: see in_whole_vectors.
      which='cuda and not _as_ and not transposed and not column_strided'
      case $kernels in
        shared) which="$which and (oracle and _10 and not _1025 or current_stream)" ;; # short rows
        cluster | ring) which='cuda and current_stream' ;;                               # long rows
        held) which='cuda and current_stream and (11000 or 34000)' ;;                    # many rows
      esac
      EMP_FAST_CUDA_ROWS=$kernels PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer \
        --tool "$tool" --error-exitcode 9 --kernel-name-exclude kernel_substring=at:: \
        "$python" -m pytest tests/gpu -q -x -m sanitize -k "$which" "${flags[@]}" || return
    done
  done
}

bench() {
  local flags
  eval "flags=(${BENCH_FLAGS:-})"
  "$python" -m pytest benchmarks -q "${bench_flags[@]}" --benchmark-json="$folder/gpu.json" \
    "${flags[@]}" || return
  "$python" -m benchmarks.report "$folder/gpu.json" -o "$folder"
}

"$python" -c '
import json, torch
from emp_fast import machine
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
print(json.dumps(machine.describe(device), indent=1))' >"$summary" || exit
failed=0
for step in "${steps[@]}"; do
  case $step in build | test | sanitize | bench) ;; *)
    echo "no such step: $step" >&2
    exit 2
    ;;
  esac
  began=$SECONDS
  if "$step" >"$folder/$step.log" 2>&1; then outcome=passed; else outcome=FAILED failed=1; fi
  echo "$step $outcome in $((SECONDS - began)) s: $(grep . "$folder/$step.log" | tail -n 1)" | tee -a "$summary"
done
exit "$failed"
