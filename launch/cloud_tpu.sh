#!/usr/bin/env bash
# The same command on every worker of a Cloud TPU slice, whose metadata say which process each one is.
#
#   TPU=NAME ZONE=ZONE bash launch/cloud_tpu.sh CONFIG.py --run-dir RUN [--section.field value ...]
#
# On each worker this repository lies in ~/gptjax, and its environment in ~/gptjax/.venv (pip install -e '.[tpu]').
# RUN and the data lie on a file system that all workers mount.
set -eu
command="cd ~/gptjax && exec .venv/bin/python train.py $(printf '%q ' "$@")"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$command"
