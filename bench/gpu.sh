#!/usr/bin/env bash
# On a machine with a CUDA device and no network: build, check, and time everything that there is.
#   bench/gpu.sh [FOLDER]     lines go to FOLDER/<device>/ (default: bench/results), logs to FOLDER/<device>/logs/
# Every part takes less than ten minutes; one that fails doesn't stop the others. Started again, it goes on with the
# parts that have not succeeded yet (FORCE=1: with all of them). ONLY="attribute memory" runs these parts alone.
# Nothing is fetched: fastfg is built and installed from this checkout, with whatever torch, timm and pytest are there.
# FASTFG_COMMIT names the commit in the lines where the checkout came without its history.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))') || exit 1
out=${1:-bench/results}
logs=$out/$device/logs
mkdir -p "$logs"
failed=0

part() { # NAME COMMAND...
  local name=$1 log=$logs/$1.log; shift
  [ -z "${ONLY:-}" ] || [[ " $ONLY " == *" $name "* ]] || return 0
  if [ -z "${FORCE:-}" ] && [ "$(tail -n 1 "$log" 2>/dev/null)" = "== done" ]; then
    echo "== $name: done before"
    return 0
  fi
  echo "== $name"
  if timeout 590 "$@" >"$log" 2>&1; then
    tail -n 5 "$log"
    echo "== done" >>"$log"
  else
    echo "FAILED: $name (exit code $?; $log)" && tail -n 30 "$log"
    failed=1
  fi
}

part build "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .
part info "$python" -m fastfg.cli info
part parity "$python" -m pytest -q tests/ops tests/kernels
part tests "$python" -m pytest -q -m gpu tests
for file in bench/bench_*.py; do
  suite=${file#bench/bench_}
  part "${suite%.py}" "$python" -m pytest -q "$file" --size full --results "$out"
done
# what a whole evaluation costs beside the model alone, and 3 variants of 512 images, for 10,000 by extrapolation
engine() { "$python" -m bench.engine --device cuda --results "$out" "$@"; }
export -f engine; export python out
part engine-16 bash -c 'engine --images 64 --gates 1 3 10'
part engine-32 bash -c 'engine --model vit_base_patch32_224 --images 512 --gates 1 3'
part engine-loop bash -c 'engine --loop'
if command -v compute-sanitizer >/dev/null; then
  part sanitizer compute-sanitizer --error-exitcode 9 "$python" -m pytest -q tests/kernels/parity.py tests/kernels/parity_gated.py \
    --noconftest -p no:cacheprovider -k "real_length or narrow or strided or configurations or run_to_run"
else
  echo "== sanitizer: skipped, compute-sanitizer is not there"
fi
"$python" -m fastfg.cli bench report --results "$out/$device" | tee "$out/$device/report.md" || failed=1
exit $failed
