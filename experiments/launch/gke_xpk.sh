#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster through xpk, which starts one pod per host.
#   CLUSTER=c ZONE=us-east5-a PROJECT=p IMAGE=registry/sinkjax STORAGE=runs OUT=/runs/a TPU=v5p-256 \
#     bash experiments/launch/gke_xpk.sh --steps 20000
# Tried on: nothing but `bash -n` and a stand-in for xpk (flags as of xpk 1.16). Not tried on GKE.
# Source: https://github.com/AI-Hypercomputer/xpk
set -euo pipefail
CLUSTER=${CLUSTER:?} ZONE=${ZONE:?} PROJECT=${PROJECT:?}
IMAGE=${IMAGE:?image with sinkjax[tpu]}
STORAGE=${STORAGE:?xpk storage (gcsfuse or Filestore) that holds OUT on every pod}
OUT=${OUT:?run folder on it}
TPU=${TPU:-v5p-256} SLICES=${SLICES:-1}
RESTARTS=${RESTARTS:-10}  # a lost pod ends all, and all go on from the last checkpoint

# A run that a SIGTERM saved ends with status 0; without a record of the finished run the pods start again.
# The second `wait`: a signal ends the first one.
command=$(printf '%q ' python3 -m sinkjax.cli train --out "$OUT" --distributed.mode auto "$@")
command+="& trap 'kill -TERM \$!' TERM; wait \$!; wait \$!; test -e $(printf %q "$OUT/summary.json")"
exec xpk workload create --cluster="$CLUSTER" --zone="$ZONE" --project="$PROJECT" \
  --workload="${NAME:-sinkjax-$USER}" --docker-image="$IMAGE" --storage="$STORAGE" \
  --tpu-type="$TPU" --num-slices="$SLICES" --max-restarts="$RESTARTS" \
  --termination-grace-period-seconds=300 --command="$command"
