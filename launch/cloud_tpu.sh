#!/usr/bin/env bash
# The same command on every worker of a Cloud TPU slice: JAX finds the others by itself.
#
#   TPU=my-slice ZONE=us-central2-b bash launch/cloud_tpu.sh configs/gpt2_124m.py --run-dir /shared/runs/gpt2 ...
#
# gptjax is installed in ~/gptjax of every worker (pip install -e '.[tpu]'), and /shared is mounted on all of them.
set -euo pipefail
gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "cd gptjax && python train.py $(printf '%q ' "$@")"
