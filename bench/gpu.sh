#!/usr/bin/env bash
# Build, test and measure everything on a machine with a CUDA device. It needs no network.
#   bench/gpu.sh [FOLDER]     results go to FOLDER/<device>/ (default: bench/results), logs to FOLDER/<device>/logs/
# The work comes in parts of less than ten minutes each: first correctness, then the shapes that have a target, then the
# rest. If a part fails, the others still run. A second call continues with the unfinished parts and lists the failed ones.
#   FORCE=1                   run all parts again
#   ONLY="attribute memory"   run these parts only
#   LIMIT=570                 stop after this number of seconds, also within a part
#   FASTFG_COMMIT=...         the commit to write into the results, if the checkout has no git history
# fastfg is built and installed from this checkout, with the installed torch, timm and pytest.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))') || exit 1
out=${1:-bench/results}
logs=$out/$device/logs
mkdir -p "$logs"
failed=0

part() { # NAME COMMAND...
  local name=$1 log=$logs/$1.log left=$((${LIMIT:-86400} - SECONDS)) start=$SECONDS seconds code; shift
  [ -z "${ONLY:-}" ] || [[ " $ONLY " == *" $name "* ]] || return 0
  if [ -z "${FORCE:-}" ]; then
    case $(tail -n 1 "$log" 2>/dev/null) in
      "== done") echo "== $name: done before"; return 0 ;;
      "== failed") echo "== $name: FAILED before ($log; FORCE=1 runs it again)"; failed=1; return 1 ;;
    esac
  fi
  if ((left < 20)); then
    echo "== $name: not started, no time left"; failed=1; return 1
  fi
  echo "== $name"
  seconds=$((left < 590 ? left : 590))
  timeout --kill-after 5 $seconds "$@" >"$log" 2>&1; code=$?
  if [ $code = 0 ]; then
    tail -n 5 "$log"; echo "   in $((SECONDS - start)) s"
    printf '\n== done\n' >>"$log"
    return 0
  fi
  failed=1
  echo "FAILED: $name (exit code $code after $((SECONDS - start)) s; $log)"; tail -n 30 "$log"
  # a part that was stopped by LIMIT counts as unfinished
  [ $seconds -lt 590 ] && [[ $code = 124 || $code = 137 ]] || printf '\n== failed\n' >>"$log"
  return 1
}

install() { # MODE of the native ops
  env FASTFG_BUILD="$1" "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .
}
export -f install; export python out
# without a compiler, everything but the native ops can still run; their own tests then fail
part build bash -c 'install require' || part build-without-native bash -c 'install skip'
part info "$python" -m fastfg info

# The tests name the required backends (tests/ops/cases.py): here the reference, the native ops and Triton.
# Most of the time goes into compiling each kernel for each kind of shape, on the CPU.
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(--numprocesses 8)
part parity "$python" -m pytest -q "${workers[@]}" tests/ops tests/kernels --ignore tests/kernels/test_ahead_of_time.py
part tests "$python" -m pytest -q -m gpu tests

suites() { "$python" -m pytest -q --size full --results "$out" "$@"; }
engine() { "$python" -m bench.engine --device cuda --results "$out" "$@"; }
export -f suites engine
targets="B64-P196 or B64-H12-N197 or B64-H12-N1370 or C1-B256-patch16 or C1-B1-patch16-grid14 or B16-N4097 or metricall"
part targets bash -c "suites bench -k 'bfloat16 and ($targets)'"
# the cost of an evaluation relative to the model alone; 3 variants of 512 images, to extrapolate to 10,000 images
part engine-32 bash -c 'engine --model vit_base_patch32_224 --images 512 --gates 1 3'
part engine-16 bash -c 'engine --images 64 --gates 1 3 10'
# a removed curve needs many images: only masks of one length share a batch
part removed bash -c 'engine --images 256 --removed 2'
part train-sae "$python" -m bench.train_sae --device cuda --d 768 --F 49152 --k_aux 512 --rounds 20 --precision bfloat16 \
  --losses 200 --results "$out"
part engine-loop bash -c 'engine --loop'
if command -v compute-sanitizer >/dev/null; then
  # without torch's caching allocator, reading past the end of a tensor is detected
  part sanitizer env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 "$python" -m pytest -q \
    tests/ops/test_parity.py tests/ops/test_modes.py --noconftest -p no:cacheprovider \
    -k "triton and (layout or views or lacks or repeat or c_max_1)"
else
  echo "== sanitizer: skipped, compute-sanitizer was not found"
fi
for suite in encode_topk attribute relevancy gated_relevancy project encode_project evaluate memory gate; do
  # torch.compile takes seconds per shape, so it runs at 64 images only
  part "$suite" bash -c "suites bench/bench_$suite.py -k 'not compile or B64'"
done

"$python" -m bench.report --results "$out/$device" --out "$out/$device/report.md" || failed=1
"$python" -m bench.report --results "$out/$device" --short || failed=1
exit $failed
