#!/usr/bin/env bash
# Installs a commit of the repository on a TPU VM: bash bootstrap.sh COMMIT EXTRAS [NFS_SERVER:/EXPORT]
# EXTRAS are those of pyproject.toml, "tpu,gcs".
# The archive of the commit is ~/bipe_jax-COMMIT.tar.gz. It can be repeated, also after a failure.
set -euo pipefail
commit=$1
extras=$2
nfs=${3:-}
root=$HOME/bipe_jax
say() { echo "bipe_jax $(hostname) $*"; }
trap 'say error bootstrap failed at line $LINENO' ERR

if [ -n "$nfs" ]; then
    if ! command -v mount.nfs >/dev/null; then
        sudo apt-get update -qq
        sudo DEBIAN_FRONTEND=noninteractive apt-get install -y -qq nfs-common
    fi
    sudo mkdir -p /mnt/bipe
    # lookupcache=positive shows a file that another host has just made at once.
    line="$nfs /mnt/bipe nfs defaults,_netdev,hard,lookupcache=positive 0 0"
    grep -qxF "$line" /etc/fstab || echo "$line" | sudo tee -a /etc/fstab >/dev/null
    mountpoint -q /mnt/bipe || sudo mount /mnt/bipe
    [ -w /mnt/bipe ] || sudo chmod 1777 /mnt/bipe
fi

if [ "$(cat "$root/commit" "$root/extras" 2>/dev/null)" = "$commit"$'\n'"$extras" ]; then
    say ready "${commit:0:12} was installed already"
    exit 0
fi
if systemctl is-active --quiet bipe_jax; then
    say refused "a run of another commit or other extras exists: stop it first"
    exit 1
fi
rm -f "$root/commit" # until the new one is complete
rm -rf "$root/source"
mkdir -p "$root/source"
tar -xzf "$HOME/bipe_jax-$commit.tar.gz" -C "$root/source"
# The system's Python may be too old: uv brings one.
[ -x "$root/uv/bin/uv" ] || python3 -m pip install --quiet --target="$root/uv" uv
[ -x "$root/venv/bin/python" ] || "$root/uv/bin/uv" venv --quiet --python '>=3.11,<3.14' "$root/venv"
"$root/uv/bin/uv" pip install --quiet --python "$root/venv/bin/python" -e "$root/source[$extras]"
echo "$extras" >"$root/extras"
echo "$commit" >"$root/commit"
rm -f "$HOME"/bipe_jax-*.tar.gz
say ready "${commit:0:12}"
