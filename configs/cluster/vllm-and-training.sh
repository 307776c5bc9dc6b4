#!/bin/bash
# A vLLM server and the run that samples from it, on one node of eight GPUs; on a machine of one's own or under SLURM:
#
#   bash configs/cluster/vllm-and-training.sh [--KEY VALUE ...]
#   sbatch configs/cluster/vllm-and-training.sh [--KEY VALUE ...]
#
# vLLM may want an environment of its own, with other versions of torch and transformers: VLLM names its command. Models
# and prompts are fetched first, as multi-node.sbatch says. Not run on hardware yet.
#SBATCH --job-name=sppo-vllm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
# five minutes before the end, to this script, which passes it on
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

model=allenai/Llama-3.1-Tulu-3-70B-SFT
unset SLURM_NTASKS  # else Lightning expects srun to start a process for each GPU

# Whoever reaches this server may have it read adapters from any folder: it listens to this machine alone. A smaller model
# goes on each GPU whole: --data-parallel-size 4 in the place of --tensor-parallel-size 4, and --api-server-count 1, since
# adapters are known to one front end only.
CUDA_VISIBLE_DEVICES=0,1,2,3 VLLM_ALLOW_RUNTIME_LORA_UPDATING=True \
  "${VLLM:-vllm}" serve "$model" --host 127.0.0.1 --port 8000 --dtype bfloat16 --tensor-parallel-size 4 \
  --max-model-len 3072 --enable-lora --max-lora-rank 64 &
server=$!
trap 'kill "$server" 2>/dev/null; wait "$server" 2>/dev/null' EXIT
until curl --silent --fail --output /dev/null http://127.0.0.1:8000/health; do
  if ! kill -0 "$server" 2>/dev/null; then
    echo "vLLM ended before it was ready: see above" >&2
    exit 1
  fi
  sleep 5
done

CUDA_VISIBLE_DEVICES=4,5,6,7 \
  sppo-lightning fit --config configs/cluster/lora-70b-vllm.yaml "$@" &
training=$!
# a command in the background does not hear Ctrl-C
trap 'passed_on=yes; kill -USR1 "$training" 2>/dev/null' USR1
trap 'passed_on=yes; kill -TERM "$training" 2>/dev/null' TERM INT
while passed_on=no; wait "$training"; status=$?; [ "$passed_on" = yes ]; do
  :  # a signal ends the waiting, but not the run, which writes its checkpoint first
done

# 138 = 128 + USR1: the time is up, and the same command resumes
if [ "$status" -eq 138 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
