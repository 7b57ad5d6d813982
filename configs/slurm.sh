#!/bin/bash
# sbatch configs/slurm.sh    # from the project's folder, which all machines share, as they do --output
#SBATCH --job-name=qlora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / 8))
srun --cpus-per-task "$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    .venv/bin/torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 8 --rdzv_backend c10d \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$first:29500" \
    instruct_train_qlora.py --dataset rows.jsonl --output adapters/mine --shard --resume
