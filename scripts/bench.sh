#!/usr/bin/env bash
# Measures our plugins beside the reference ones in one run, and prints figures, ratios and goals.
#   scripts/bench.sh [pods] [ipam]        default: all of these
#   scripts/bench.sh tunnel [throughput] [wan] [latency] [memory] [rounds=N] [seconds=N] [agents=N]
#                                         edge-tunnel beside konnectivity and a plain rustls relay
# As root; everything happens in network namespaces of its own. Run it on a quiet machine.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
if [ "${1:-}" = tunnel ]; then
  shift
  scripts/rig build
  konnectivity=(${EDGEFLANNEL_CACHE:-$HOME/.cache/edgeflannel}/tools/konn-*/)
  ETUN_BENCH_KONNECTIVITY=${konnectivity[0]}
  export ETUN_BENCH_KONNECTIVITY
  exec cargo bench --quiet --locked --profile fast -p tunnel --bench tunnel -- "$@"
fi
EDGEFLANNEL_BIN_DIR=$(scripts/build.sh)
export EDGEFLANNEL_BIN_DIR
cargo run --quiet --release --locked -p integration --bin bench -- "$@"
