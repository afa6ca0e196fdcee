#!/bin/bash
# Two machines of four ranks under Slurm:  sbatch slurm.sh  (what follows the file's name goes to the script)
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00
set -euo pipefail

# srun starts the ranks itself, and fusedfog.init() reads its variables: rank, ranks a machine, and the first host, where they
# meet. With --gpus-per-task each rank would see one GPU only, which works too, but keeps NCCL from copying between them directly.
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export FUSEDFOG_LOG=${FUSEDFOG_LOG:-info}  # one line on rank 0 says what is a node of the graph, and how much is sent

# A rank that fails ends the others by itself within seconds; --kill-on-bad-exit ends those that are in no call of fusedfog.
srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m fusedfog.examples.recipes.machines "$@"
