#!/usr/bin/env bash
# Measures our plugins beside the reference ones in one run, and prints figures, ratios and goals.
#   scripts/bench.sh [pods] [ipam]        default: all
#   scripts/bench.sh tunnel-ha [agents=N] [rounds=N]    several replicas of edge-tunnel
# As root; everything happens in network namespaces of its own. Run it on a quiet machine.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
if [ "${1:-}" = tunnel-ha ]; then
  shift
  exec cargo bench --quiet --locked -p tunnel -- ha "$@"
fi
EDGEFLANNEL_BIN_DIR=$(scripts/build.sh)
export EDGEFLANNEL_BIN_DIR
cargo run --quiet --release --locked -p integration --bin bench -- "$@"
