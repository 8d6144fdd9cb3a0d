#!/usr/bin/env bash
# All that only a GPU can show, in parts that each fit a short sitting; measured rows are appended to $OUT/h200.jsonl.
#
#     OUT=benchmarks/results bash benchmarks/gpu.sh            # everything
#     OUT=/tmp/out bash benchmarks/gpu.sh tests llama-720      # these parts
#
# Parts: tests, plan, load, answers, step (luthier beside its peers: gpu_step.py; again for what is left), proofs and
# proofs-full (gpu_proofs.py), and the jobs of full_size.py: falcon phi llama llama-block llama-720 chatglm.
# Each part has its own time limit, and one that fails does not keep the next from running.
set -uo pipefail
cd "$(dirname "$0")/.."
: "${OUT:?a folder for the results}" "${PYTHON:=python3}" "${TMPDIR:=/dev/shm}"  # checkpoints of 16 GB are written
export PYTHONPATH="$PWD/src:$PWD/tests" TMPDIR
rows="$OUT/h200.jsonl" failed=0

part() { # name, seconds, command …
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  echo "== $name"
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1 || { echo "   failed, exit code $?" && failed=1; }
  tail -n 12 "$OUT/$name.log" | cut -c1-400
  echo "   $((SECONDS - start)) s"
}

[ $# -gt 0 ] || set -- tests plan load answers step proofs proofs-full falcon phi llama llama-block llama-720 chatglm
for name; do
  case $name in
    tests) part tests 540 "$PYTHON" -m pytest -q -p no:cacheprovider tests/gpu ;;
    plan) part plan 560 "$PYTHON" benchmarks/plan_vs_peak.py --jobs 3 --out "$rows" ;;
    step)
      part step 590 "$PYTHON" benchmarks/gpu_step.py --models "$TMPDIR/gpu_step" --rounds 2 --deadline 480 --limit 110 \
        --logs "$OUT/gpu_step" --out "$rows"
      ;;
    proofs) part proofs 590 "$PYTHON" benchmarks/gpu_proofs.py --models "$TMPDIR/gpu_step" --out "$rows" ;;
    proofs-full) part proofs-full 590 "$PYTHON" benchmarks/gpu_proofs.py --full --models "$TMPDIR/gpu_step" --out "$rows" ;;
    answers) part answers 590 "$PYTHON" benchmarks/gpu_answers.py --out "$rows" ;;
    load) part load 300 "$PYTHON" benchmarks/load_memory.py --device cuda --json ;;
    *) part "$name" 300 "$PYTHON" benchmarks/full_size.py --only "$name" --out "$rows" ;;
  esac
done
exit $failed
