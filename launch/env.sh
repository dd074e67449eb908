# Source this to work in the environment that launch/setup.sh made:  . launch/env.sh
# Activates .venv unless another environment is active, and tells torch where the prebuilt DeepSpeed ops lie.
if [ -z "${VIRTUAL_ENV:-}" ]; then
    _largekd_root="$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")/.." && pwd)"
    # shellcheck disable=SC1091
    . "$_largekd_root/.venv/bin/activate"
    unset _largekd_root
fi
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$VIRTUAL_ENV/torch_extensions}"
# Without a choice DeepSpeed looks for GPUs and warns when there is none.
if [ -z "${DS_ACCELERATOR:-}" ] && [ -f "$VIRTUAL_ENV/.largekd-on-cpu" ]; then
    export DS_ACCELERATOR=cpu
fi
