#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes: tests, kernels, whole steps. Usage: gpu_suite.sh OUT [--dry-run]
#
# OUT gets at most nine files: env.json, tests.log, suite.log, kernels.{json,md,png}, step.json, sequence.json,
# summary.json.
# Runs from a checkout without installing it. A part that fails or runs out of time leaves what it had.
# --dry-run goes through the same parts on the CPU with tiny sizes.
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: $0 OUT [--dry-run]" >&2; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
: >"$out/suite.log"

part() { # part NAME SECONDS COMMAND...: runs it within its time, logs it, and goes on whatever happens
  local name=$1 seconds=$2 code start=$SECONDS
  shift 2
  echo "== $name" >>"$out/suite.log"
  timeout --kill-after=10 "$seconds" "$@" >>"$out/suite.log" 2>&1
  code=$?
  echo "part $name exit $code after $((SECONDS - start)) s" | tee -a "$out/suite.log"
}

if [ "${2:-}" = --dry-run ]; then
  run=(--collect-only)
  kernels=(--device cpu --sizes 4K --models none --peers eager --seconds 0.02 --dtype fp32)
  steps=(--device cpu --model 10M --tokens 16 --step-seconds 0.1 --quick)
  sequence=("${steps[@]}" --estimator sequence)
else
  # Workers share the GPU; most of a test's time is the compiler's.
  "$python" -c "import xdist" 2>>"$out/suite.log" && run=(-n 8 --dist loadgroup) || run=()
  kernels=(--device cuda --models 1B,0.1B,8B --sizes 1K,16K,256K,4M,64M --seconds 0.25 --max-seconds 140)
  steps=(--device cuda --step-seconds 6 --max-seconds 90)
  sequence=(--device cuda --model 1B --tokens 8K --estimator sequence --step-seconds 10)
fi

# By file: other tests need packages that a GPU machine may lack, and one that cannot be collected stops pytest.
mapfile -t tests < <(grep -rlE 'mark\.gpu\b' tests --include='test_*.py' | sort)

part env 60 sh -c "'$python' -m gac.cli env --json > '$out/env.json'"
part tests 190 sh -c "'$python' -m pytest ${tests[*]} -m gpu ${run[*]} -q -p no:cacheprovider > '$out/tests.log' 2>&1"
part kernels 170 "$python" -m gac.cli bench "${kernels[@]}" --out "$out/kernels"
part sequence 50 "$python" -m gac.cli bench --step "${sequence[@]}" --out "$scratch/sequence"
part step 120 "$python" -m gac.cli bench --step "${steps[@]}" --out "$scratch/step"
for name in sequence step; do cp "$scratch/$name.json" "$out/$name.json" 2>>"$out/suite.log"; done
"$python" -m gac.bench.summary "$out" 2>&1 | tee -a "$out/suite.log"
