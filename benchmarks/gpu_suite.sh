#!/usr/bin/env bash
# Everything that needs a GPU, in about eight minutes: tests, kernels, whole steps, the budget, a trainer.
# Usage: gpu_suite.sh OUT [--dry-run] [PART...]
#
# OUT gets env.json, tests.log, ending.json, kernels.{json,md,png}, step.json, sequence.json, budget.json, compiled.json,
# hybrid.json (where TRL is installed, it trains), suite.log and summary.json. Runs from a checkout without installing
# it. A part that fails or runs out of time leaves what it had; parts that are named are run alone.
# --dry-run goes through the same parts on the CPU with tiny sizes.
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: $0 OUT [--dry-run] [PART...]" >&2; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
shift
dry=
[ "${1:-}" = --dry-run ] && { dry=1; shift; }
wanted=" $* "
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
  [ "$wanted" = "  " ] || [[ $wanted = *" $name "* ]] || return 0
  echo "== $name" >>"$out/suite.log"
  timeout --kill-after=10 "$seconds" "$@" >>"$out/suite.log" 2>&1
  code=$?
  echo "part $name exit $code after $((SECONDS - start)) s" | tee -a "$out/suite.log"
}

if [ -n "$dry" ]; then
  run=(--collect-only)
  kernels=(--device cpu --sizes 4K --models none --peers eager --seconds 0.02 --dtype fp32)
  steps=(--device cpu --model 10M --tokens 16 --step-seconds 0.1 --quick)
  sequence=("${steps[@]}" --estimator sequence)
  ending=(--device cpu --rounds 2)
  training=(--device cpu --seconds 0 --fewest 16)
else
  # Workers share the GPU; most of a test's time is the compiler's.
  "$python" -c "import xdist" 2>>"$out/suite.log" && run=(-n 8 --dist loadgroup) || run=()
  kernels=(--device cuda --models 1B,0.1B,8B --sizes 1K,16K,256K,4M,64M --seconds 0.2 --max-seconds 90)
  steps=(--device cuda --step-seconds 5 --max-seconds 65)
  sequence=(--device cuda --model 1B --tokens 8K --estimator sequence --step-seconds 6)
  ending=(--device cuda)
  training=(--device cuda --seconds 4)
fi

# By file: other tests need packages that a GPU machine may lack, and one that cannot be collected stops pytest.
mapfile -t tests < <(grep -rlE 'mark\.gpu\b' tests --include='test_*.py' | sort)

part env 60 sh -c "'$python' -m gac.cli env --json > '$out/env.json'"
part tests 150 sh -c "'$python' -m pytest ${tests[*]} -m gpu ${run[*]} -q -p no:cacheprovider > '$out/tests.log' 2>&1"
part ending 40 "$python" -m gac.bench.ending "${ending[@]}" --out "$out/ending.json"
part kernels 110 "$python" -m gac.cli bench "${kernels[@]}" --out "$out/kernels"
part sequence 40 "$python" -m gac.cli bench --step "${sequence[@]}" --out "$scratch/sequence"
part step 80 "$python" -m gac.cli bench --step "${steps[@]}" --out "$scratch/step"
for name in sequence step; do cp "$scratch/$name.json" "$out/$name.json" 2>>"$out/suite.log"; done
for name in budget compiled hybrid; do
  part $name 75 "$python" -m benchmarks.on_device $name "${training[@]}" --out "$out/$name.json"
done
"$python" -m gac.bench.summary "$out" 2>&1 | tee -a "$out/suite.log"
