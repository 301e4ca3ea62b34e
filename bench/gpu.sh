#!/usr/bin/env bash
# On a machine with a CUDA device and no network: the tests that need one, then time and memory.
#   bench/gpu.sh [FOLDER]     raw lines go to FOLDER (default: bench/results/<device>)
# Nothing is fetched: fastfg is built and installed from this checkout, with whatever torch and timm are there.
set -uo pipefail
cd "$(dirname "$0")/.."
device=$(python3 -c 'import torch; print(torch.cuda.get_device_name(0).replace(" ", "-"))') || exit 1
out=${1:-bench/results/$device}
mkdir -p "$out"
failed=0
part() { # NAME COMMAND...: each part under ten minutes; one that fails does not stop the others
  local name=$1; shift
  echo "== $name"
  timeout 590 "$@" 2>&1 | tee "$out/$name.log" | tail -n 15
  [ "${PIPESTATUS[0]}" -eq 0 ] || { echo "FAILED: $name"; failed=1; }
}
part build python3 -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .
part info python3 -m fastfg.cli info
part tests python3 -m pytest -q -m gpu tests
part parity python3 -m pytest -q tests/ops tests/kernels
part attribute python3 bench/attribute.py --device cuda --batch 64 --json "$out/attribute.jsonl"
part memory python3 bench/memory.py --device cuda --kept-up-to 2000 --json "$out/memory.jsonl"
exit $failed
