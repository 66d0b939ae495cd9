#!/bin/bash
# RealGen's recipe on two nodes with 8 GPUs each: sbatch examples/slurm.sh
#
# One process per node. It trains on 7 GPUs and keeps the last one for the rewards. Submit it from
# the root of the repository, on a file system that all nodes see.
#SBATCH --job-name=realgen
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600        # ten minutes before the end: an update takes minutes and can finish
#SBATCH --requeue                # after a preemption or a failed node, this script resumes the run
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.txt
set -euo pipefail

RUN=${RUN:-$SLURM_JOB_NAME}

# --kill-on-bad-exit: when a process dies, srun names it ("task 1: Killed") and stops the others.
srun --kill-on-bad-exit=1 .venv/bin/python scripts/train.py \
  --config configs/flux_grpo.py:flux_dev_16xh200 --distributed \
  --auto_resume --config.run_name="$RUN" --config.preemption_grace=570

# A finished run has runs/NAME/lora. One that SIGTERM stopped has saved and continues in the next job.
[ -d "runs/$RUN/lora" ] || scontrol requeue "$SLURM_JOB_ID"
