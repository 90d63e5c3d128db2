#!/usr/bin/env bash
# Runs every test, as root: unit tables and properties, the fuzz corpus, the plugins in network namespaces, and the
# real cnitool, containerd and kubelet. Installs and builds what is missing first; the first run takes longer.
#   scripts/test.sh [ARGUMENTS OF cargo test...]
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(id -u)" = 0 ] || { echo "scripts/test.sh: run as root: network namespaces and containers need it" >&2; exit 1; }
scripts/setup.sh
EDGEFLANNEL_BIN_DIR=$(scripts/build.sh)
export EDGEFLANNEL_BIN_DIR
# Before any test waits for a kubelet, have one.
scripts/rig build
# All of them, also after a failure: on a machine that is not ours, one run must tell everything.
cargo test --workspace --locked --no-fail-fast "$@"
