#!/usr/bin/env bash
# From a fresh checkout to a distilled student:  bash launch/quickstart.sh [--smoke] [key=value ...]
# Sets up, fetches teacher and data, trains on all GPUs or on two CPU ranks, and says how to use the student.
# --smoke: a tiny random teacher and two steps, nothing downloaded but the packages.
# A finished run is not repeated: run.fresh=true, or another run.dir=FOLDER, trains again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

smoke=no
overrides=()
run_dir=
for argument in "$@"; do
    case "$argument" in
        --smoke) smoke=yes ;;
        -h | --help) sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;;
        run.dir=*) run_dir="${argument#run.dir=}"; overrides+=("$argument") ;;
        *=*) overrides+=("$argument") ;;
        *) echo "quickstart: $argument is neither --smoke nor key=value" >&2; exit 2 ;;
    esac
done

bash launch/setup.sh
. launch/env.sh

if [ "$smoke" = yes ]; then
    recipe=recipes/smoke.yaml
    run_dir="${run_dir:-runs/smoke}"
    if [ ! -f runs/smoke-assets/teacher/config.json ] || [ ! -f runs/smoke-assets/eval.jsonl ]; then
        python tools/make_tiny_model.py runs/smoke-assets/teacher --text runs/smoke-assets
    fi
else
    recipe=recipes/quickstart.yaml
    run_dir="${run_dir:-runs/quickstart}"
    python tools/fetch_assets.py smollm2-135m-instruct math
fi

batch=8
. launch/ranks.sh
overrides=(${placement[@]+"${placement[@]}"} ${overrides[@]+"${overrides[@]}"})

# One process is enough to tell what a finished run has found.
if [ -e "$run_dir/DONE" ] && [[ " ${overrides[*]-} " != *" run.fresh="* && " ${overrides[*]-} " != *" train.max_"* ]]; then
    launcher=(python)
fi

echo "quickstart: ${launcher[*]} launch/train.py --config $recipe ${overrides[*]-}" >&2
"${launcher[@]}" launch/train.py --config "$recipe" ${overrides[@]+"${overrides[@]}"}

# The launcher's exit status alone does not prove that the ranks finished.
if [ ! -e "$run_dir/DONE" ]; then
    echo "quickstart: stopped before the end; the same command goes on from the last checkpoint in $run_dir" >&2
    exit 1
fi
echo "In a new shell, before any of these commands: . launch/env.sh"
