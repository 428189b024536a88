#!/usr/bin/env bash
# Everything that needs a GPU, in at most eight minutes: tests, the end of a step, the budget, whole steps, kernels, trainers.
# Usage: gpu_suite.sh OUT [--dry-run | --limits] [PART...]
#
# OUT gets env.json, tests.log, ending.json, budget.json, step.{json,md}, kernels.{json,md,png}, hybrid.json (where TRL is
# installed, it trains), compiled.json, sequence.{json,md}, suite.log, summary.json and predicted.json, each file where it
# stays as soon as there is something to write. Runs from a checkout without installing it. A part that fails or runs out
# of time leaves what it had, and so does a suite that is killed; parts that are named are run alone.
# --dry-run goes through the same parts on the CPU with tiny sizes. --limits prints the parts and their seconds.
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: $0 OUT [--dry-run | --limits] [PART...]" >&2; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
shift
mode=
case ${1:-} in --dry-run | --limits) mode=$1; shift ;; esac
wanted=" $* "
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3}

# Seconds of each part, what is worth most first; together at most 480. What a part leaves, the next ones may use.
parts=(env:25 tests:85 ending:30 budget:110 step:62 kernels:48 hybrid:45 compiled:36 sequence:32 summary:7)
[ "$mode" != --limits ] || { printf '%s\n' "${parts[@]/:/ }"; exit 0; }
declare -A limits
for entry in "${parts[@]}"; do limits[${entry%:*}]=${entry#*:}; done

spare=0 running=
: >"$out/suite.log"

# part NAME COMMAND...: runs it within its time and what is spare, logs it, and goes on whatever happens. An argument
# @limit becomes the seconds after which the command should not begin anything.
part() {
  local name=$1 code seconds start=$SECONDS
  shift
  [ "$wanted" = "  " ] || [[ $wanted = *" $name "* ]] || [ "$name" = summary ] || return 0
  seconds=$((${limits[$name]} + spare))
  [ "$mode" != --dry-run ] || seconds=600
  echo "== $name" >>"$out/suite.log"
  timeout --kill-after=2 $((seconds - 2)) "${@/#@limit/$((seconds - 4))}" >>"$out/suite.log" 2>&1 &
  running=$!
  wait $running
  code=$?
  running=
  spare=$((seconds - SECONDS + start))
  [ $spare -gt 0 ] || spare=0
  echo "part $name exit $code after $((SECONDS - start)) s" | tee -a "$out/suite.log"
}

stopped() { # what there is gets its summary
  trap '' TERM INT
  [ -z "$running" ] || kill "$running" 2>/dev/null
  echo "stopped" >>"$out/suite.log"
  summary
  exit 143
}

summary() {
  part summary sh -c "'$python' -m benchmarks.predictions '$out'; '$python' -m gac.bench.summary '$out'"
}

trap stopped TERM INT

if [ "$mode" = --dry-run ]; then
  run=(--collect-only -q)
  ending=(--device cpu --rounds 1)
  on_device=(--device cpu --seconds 0)
  step=(--device cpu --model 10M --tokens 16 --step-seconds 0.1 --quick)
  kernels=(--device cpu --ops moments,mix_ --sizes 64K --models none --peers eager --seconds 0.02 --dtype fp32)
  sequence=("${step[@]}")
else
  # Workers share the GPU; most of a test's time is the compiler's.
  run=(-v --tb=short)
  ! "$python" -c "import xdist" 2>>"$out/suite.log" || run+=(-n 12 --dist loadgroup)
  ending=(--device cuda --rounds 12)
  on_device=(--device cuda --seconds 7)
  step=(--device cuda --model 1B,0.1B --tokens 8K --step-seconds 4 --max-seconds 40)
  kernels=(--device cuda --dtype bf16 --models 0.1B,1B --sizes 1K,4M,64M --peers eager,foreach --seconds 0.2 --max-seconds 40)
  sequence=(--device cuda --model 1B --tokens 8K --step-seconds 3 --quick)
fi

# By file: other tests need packages that a GPU machine may lack, and one that cannot be collected stops pytest.
mapfile -t tests < <(grep -rlE 'mark\.gpu\b' tests --include='test_*.py' | sort)

part env sh -c "'$python' -m gac.cli env --json > '$out/env.json'"
part tests sh -c "exec '$python' -m pytest ${tests[*]} -m gpu ${run[*]} -p no:cacheprovider > '$out/tests.log' 2>&1"
part ending "$python" -m gac.bench.ending "${ending[@]}" --out "$out/ending.json"
part budget "$python" -m benchmarks.on_device budget "${on_device[@]}" --limit @limit --out "$out/budget.json"
part step "$python" -m gac.cli bench --step "${step[@]}" --out "$out/step"
part kernels "$python" -m gac.cli bench "${kernels[@]}" --out "$out/kernels"
part hybrid "$python" -m benchmarks.on_device hybrid "${on_device[@]}" --limit @limit --out "$out/hybrid.json"
part compiled "$python" -m benchmarks.on_device compiled "${on_device[@]}" --limit @limit --out "$out/compiled.json"
part sequence "$python" -m gac.cli bench --step "${sequence[@]}" --estimator sequence --out "$out/sequence"
summary
