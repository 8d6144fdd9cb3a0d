#!/usr/bin/env bash
# All that only a GPU can show, in parts that each fit a short sitting; measured rows are appended to $OUT/h200.jsonl.
#
#     OUT=benchmarks/results bash benchmarks/gpu.sh            # everything
#     OUT=/tmp/out bash benchmarks/gpu.sh tests llama-720      # these parts
#
# Parts: tests, plan, load, answers, table-8b and table-others (luthier beside its best peers, gpu_step.py, what matters
# most first, a second round where there is time), proofs and proofs-full (gpu_proofs.py), and the jobs of full_size.py:
# falcon phi llama llama-block llama-720 chatglm. PEERS=FOLDER: where peers/pack.sh's archive was unpacked. COMMIT: of
# luthier, where there is no git to tell; what a sitting found of another one, or of none, the next does again.
# Each part has its own time limit, and one that fails does not keep the next from running.
set -uo pipefail
cd "$(dirname "$0")/.."
: "${OUT:?a folder for the results}" "${PYTHON:=python3}" "${TMPDIR:=/dev/shm}"  # checkpoints of 16 GB are written
export PYTHONPATH="$PWD/src:$PWD/tests" TMPDIR
rows="$OUT/h200.jsonl" failed=0
# Of each workload the peers that were fastest when all were measured, and of other families what may be.
eight=W1/free/luthier,W1/free/unsloth-off,W3/free/luthier,W3/free/trl-liger-off,W2/free/luthier,W2/free/unsloth-off
eight+=,W1/8GiB/luthier,W1/8GiB/unsloth,W1/24GiB/luthier,W1/24GiB/unsloth-off,W3/free/unsloth$
eight+=,start/free/luthier,start/free/trl$,start/free/unsloth$
others=S1/free/luthier,S1/free/unsloth-off,S1-8/free/luthier,S1-8/free/unsloth,S1-8/free/trl-liger-off
for family in phi-3 glm-4 falcon-7b; do
  others+=,W3-$family/free/luthier,W3-$family/free/unsloth-off
done
others+=,W3-phi-3/free/trl-liger-off,W3-glm-4/free/trl-liger-off
others+=,W3-falcon-7b/free/trl-off  # its attention keeps no packed rows apart, as with Liger

part() { # name, seconds, command …
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  echo "== $name"
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1 || { echo "   failed, exit code $?" && failed=1; }
  tail -n 12 "$OUT/$name.log" | cut -c1-400
  echo "   $((SECONDS - start)) s"
}

table() { # name, cells
  PYTHONPATH="${PEERS:+$PEERS:}$PYTHONPATH" part "$1" 590 "$PYTHON" benchmarks/gpu_step.py --together --rounds 2 \
    --only "$2" --deadline "${DEADLINE:-490}" --limit 95 --models "$TMPDIR/gpu_step" --logs "$OUT/gpu_step" --out "$rows" \
    --commit "${COMMIT:-}"
}

proofs() { # name, options …
  part "$1" 590 "$PYTHON" benchmarks/gpu_proofs.py "${@:2}" --models "$TMPDIR/gpu_step" --out "$rows" \
    --commit "${COMMIT:-}"
}

[ $# -gt 0 ] || set -- tests plan load answers table-8b table-others proofs proofs-full falcon phi llama llama-block llama-720 chatglm
for name; do
  case $name in
    tests) part tests 540 "$PYTHON" -m pytest -q -p no:cacheprovider tests/gpu ;;
    plan) part plan 560 "$PYTHON" benchmarks/plan_vs_peak.py --jobs 3 --out "$rows" ;;
    table-8b) table table-8b "$eight" ;;
    table-others) table table-others "$others" ;;
    proofs) proofs proofs ;;
    proofs-full) proofs proofs-full --full ;;
    answers) part answers 590 "$PYTHON" benchmarks/gpu_answers.py --out "$rows" ;;
    load) part load 300 "$PYTHON" benchmarks/load_memory.py --device cuda --json ;;
    *) part "$name" 300 "$PYTHON" benchmarks/full_size.py --only "$name" --out "$rows" ;;
  esac
done
exit $failed
