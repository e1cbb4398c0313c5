#!/usr/bin/env bash
# The startup script of a TPU VM of `create --max-hours`: it runs as root at each boot, and has the queued
# resource deleted when its time is over, whatever the launching machine does. A reboot moves nothing.
#
# Metadata of the VM: bipe-name, the queued resource; bipe-seconds, from the first boot to the deletion.
# The VM's service account needs the role TPU Admin. `launch.tpu_vm run` refuses a VM that cannot ask for it.
set -euo pipefail
export PATH=$PATH:/snap/bin
state=${STATE_DIRECTORY:-/var/lib/bipe_jax}
ask() { curl -sf -H 'Metadata-Flavor: Google' "http://metadata.google.internal/computeMetadata/v1/$1"; }

mkdir -p "$state"
[ -s "$state/deadline" ] || echo $(($(date +%s) + $(ask instance/attributes/bipe-seconds))) >"$state/deadline"
left=$(($(cat "$state/deadline") - $(date +%s)))
zone=$(ask instance/zone)
resource=("$(ask instance/attributes/bipe-name)" --zone="${zone##*/}" --project="$(ask project/project-id)")

# The run saves first. Each VM asks, and the first that is heard ends all.
systemd-run --unit=bipe_jax_deadline --on-active="$((left > 1 ? left : 1))s" --setenv=PATH="$PATH" \
    bash -c 'systemctl stop bipe_jax
        until gcloud compute tpus queued-resources delete "$@" --force --quiet; do sleep 60; done' \
    bash "${resource[@]}"
