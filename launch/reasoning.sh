#!/usr/bin/env bash
# From problems to a student that solves them:  bash launch/reasoning.sh
#   1  problems with known answers, some held out
#   2  a teacher writes solutions; those that are right become training data    recipes/generate_sums.yaml
#   3  a smaller student learns from its logits on them                         recipes/reasoning.yaml
#   4  a control learns from the same solutions without the teacher's logits
#   5  teacher, student before, control and student solve the held-out problems
# An hour on two busy CPU cores. What is finished is not repeated; what was stopped goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
    "") ;;
    -h | --help) sed -n '2,8s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "reasoning: takes no arguments; $1 was given" >&2; exit 2 ;;
esac

problems=runs/problems/sums
written=runs/generate_sums
distilled=runs/reasoning
control=runs/reasoning_control
before=runs/reasoning_before
solved=runs/reasoning_solved

say() { echo "reasoning: $((SECONDS / 60)) min: $*" >&2; }

# run <file that is there in the end> <command>...: only when it is missing, and it must be there then.
run() {
    local result="$1"
    shift
    [ -e "$result" ] && return
    say "$*"
    "$@"
    # The launcher's exit status alone does not prove that the ranks finished.
    [ -e "$result" ] || { say "stopped before the end; the same command goes on"; exit 1; }
}

# solve <name> <model folder>: answers to the held-out problems, always the likeliest token, judged by the last number.
solve() {
    run "$solved/$1/data/curation.json" \
        "${launcher[@]}" launch/generate.py --config recipes/generate_sums.yaml output.dir="$solved/$1" \
        backend.model="$2" source.path="$problems/eval.jsonl" source.max_rows=null sampling.temperature=0 \
        curation.answer_format=last_number 'curation.filters=[]' ${writing[@]+"${writing[@]}"}
}

bash launch/setup.sh
. launch/env.sh
batch=4
. launch/ranks.sh
writing=(${precision:+backend.precision=$precision})
train=("${launcher[@]}" launch/train.py --config recipes/reasoning.yaml ${placement[@]+"${placement[@]}"})

python tools/fetch_assets.py smollm2-135m-instruct qwen2.5-coder-0.5b-instruct
python tools/make_problems.py "$problems" --family chain_sum:min_terms=3,max_terms=3,min_digits=1,max_digits=2
run "$written/data/curation.json" \
    "${launcher[@]}" launch/generate.py --config recipes/generate_sums.yaml ${writing[@]+"${writing[@]}"}
run "$before/config.json" python launch/init_student.py --config recipes/reasoning.yaml --output "$before"
run "$distilled/DONE" "${train[@]}" run.dir="$distilled"
run "$control/DONE" "${train[@]}" run.dir="$control" objective.alpha=0

solve teacher assets/qwen2.5-coder-0.5b-instruct
solve before "$before"
solve control "$control/export"
solve distilled "$distilled/export"
say "solved problems:"
python tools/accuracy.py "$solved/teacher" "$solved/before" "$solved/control" "$solved/distilled" \
    --json "$solved/accuracy.json"
