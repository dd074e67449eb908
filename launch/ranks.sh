# Sourced by the scripts here, after env.sh: how `batch` rows of a step are trained on this machine.
# Sets `launcher` (GPUs, or two CPU ranks), `placement` (overrides of launch/train.py) and `precision` (fp32, or empty).
port="$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
# The launcher tells at length what it starts; the run itself reports what matters.
launcher=(deepspeed --master_port "$port" --log_level error)
placement=()
precision=
if [ "${DS_ACCELERATOR:-}" = cpu ]; then
    launcher+=(--num_accelerators 2)
    # More threads than cores per rank slow both ranks down.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(($(nproc) > 3 ? $(nproc) / 2 : 1))}"
    # Without instructions of its own for bf16 a CPU computes it more slowly than fp32.
    if ! grep -qwE 'avx512_bf16|amx_bf16|bf16' /proc/cpuinfo 2>/dev/null; then
        precision=fp32
        placement=(train.precision=fp32)
    fi
else
    # The batch must come out whole: the largest power of two of GPUs that divides it.
    ranks="$(python -c "import torch; n = min($batch, torch.accelerator.device_count()); print(1 << (n.bit_length() - 1))")"
    launcher+=(--num_accelerators "$ranks")
    placement=(student.deepspeed=ds_configs/zero3_gpu.json "train.micro_batch_size=$((batch / ranks))")
fi
