#!/bin/bash
# RealGen's recipe on two nodes of 8 GPUs: sbatch examples/slurm.sh
# One process a node; it trains on 7 GPUs and keeps the last one for the rewards. Start it from the repository's root,
# on a file system that all nodes see.
#SBATCH --job-name=realgen
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600        # ten minutes before the end: an update of this recipe takes minutes and is not cut off
#SBATCH --requeue                # after a preemption or a failed node the same script goes on with the run
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.txt
set -euo pipefail

RUN=${RUN:-$SLURM_JOB_NAME}

# --kill-on-bad-exit: when one process dies, srun names it ("task 1: Killed") and ends the others at once
srun --kill-on-bad-exit=1 .venv/bin/python scripts/train.py \
  --config configs/flux_grpo.py:flux_dev_16xh200 --distributed \
  --auto_resume --config.run_name="$RUN" --config.preemption_grace=570

# a run that is through has left runs/NAME/lora; one that SIGTERM stopped has saved, and goes on in the next job
[ -d "runs/$RUN/lora" ] || scontrol requeue "$SLURM_JOB_ID"
