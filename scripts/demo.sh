#!/usr/bin/env bash
# Shows the main job: pods keep their addresses over a power loss.
#   scripts/demo.sh            two pods on one node, by the real cnitool: seconds, after the first build
#   scripts/demo.sh cluster    a real Kubernetes cluster with two edge nodes: about a minute, after the first build
# As root; everything happens in network namespaces of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "$(id -u)" = 0 ] || { echo "scripts/demo.sh: run as root: network namespaces need it" >&2; exit 1; }
scripts/setup.sh
EDGEFLANNEL_BIN_DIR=$(scripts/build.sh)
export EDGEFLANNEL_BIN_DIR
case ${1:-} in
"") cargo run --quiet --locked -p integration --bin demo ;;
cluster) scripts/rig demo ;;
*) echo "usage: scripts/demo.sh [cluster]" >&2; exit 2 ;;
esac
