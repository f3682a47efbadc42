#!/usr/bin/env bash
# Trains on every worker of a Cloud TPU slice; the same line goes on with a run that was stopped.
#   NAME=my-tpu ZONE=europe-west4-b OUT=/shared/run bash experiments/launch/tpu_vm.sh --steps 20000
# Tried on: nothing but `bash -n` and a stand-in for gcloud. Not tried on a TPU.
# Sources: https://docs.cloud.google.com/tpu/docs/jax-pods, https://docs.jax.dev/en/latest/multi_process.html
set -euo pipefail
NAME=${NAME:?name of the TPU}
ZONE=${ZONE:?its zone}
OUT=${OUT:?run folder that all workers see, such as an NFS or gcsfuse mount}
PYTHON=${PYTHON:-python3}  # on the workers, with sinkjax[tpu]

# jax asks the metadata server of each worker which one it is (mode auto). Quoted twice: for here
# and for the shell over there. `exec`, so that a signal to the shell is one to the run.
command=$(printf '%q ' exec "$PYTHON" -m sinkjax.cli train --out "$OUT" --distributed.mode auto "$@")
exec gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "$command"
