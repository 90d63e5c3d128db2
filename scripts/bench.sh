#!/usr/bin/env bash
# Measures our programs beside the reference ones in one run, and prints figures, ratios and goals.
#   scripts/bench.sh [pods] [ipam]        our plugins; default: both
#   scripts/bench.sh overlay [--nodes=100,1000,5000] [--rounds=3] [--updates=1000]
#       edgeflanneld beside flanneld, with a real API server: about 10 minutes. A short one, of about 1: --nodes=100 --rounds=1
#   scripts/bench.sh tunnel [throughput] [wan] [latency] [memory] [rounds=N] [seconds=N] [agents=N]
#       edge-tunnel beside konnectivity, rathole and a plain rustls relay
#   scripts/bench.sh tunnel-ha [agents=N] [rounds=N]
#       several replicas of edge-tunnel
# As root; everything happens in network namespaces of its own. Run it on a quiet machine.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
if [ "${1:-}" = tunnel ] || [ "${1:-}" = tunnel-ha ]; then
  [ "$1" = tunnel ] && parts=() || parts=(ha)
  shift
  scripts/rig build
  konnectivity=(${EDGEFLANNEL_CACHE:-$HOME/.cache/edgeflannel}/tools/konn-*/)
  export ETUN_BENCH_KONNECTIVITY=${konnectivity[0]}
  if [ ${#parts[@]} = 0 ]; then
    if ETUN_BENCH_RATHOLE=$(scripts/rathole.sh); then
      export ETUN_BENCH_RATHOLE
    else
      echo "bench: rathole could not be built, see above; the others are measured without it" >&2
      unset ETUN_BENCH_RATHOLE
    fi
  fi
  exec cargo bench --quiet --locked --profile fast -p tunnel --bench tunnel -- "${parts[@]}" "$@"
fi
EDGEFLANNEL_BIN_DIR=$(scripts/build.sh)
export EDGEFLANNEL_BIN_DIR
cargo run --quiet --release --locked -p integration --bin bench -- "$@"
