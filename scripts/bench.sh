#!/usr/bin/env bash
# Measures our programs beside the reference ones in one run, and prints figures, ratios and goals.
#   scripts/bench.sh [pods] [ipam]        our plugins; default: both
#   scripts/bench.sh overlay [--nodes=100,1000,5000] [--rounds=3] [--updates=1000]
#       edgeflanneld beside flanneld, with a real API server: about 10 minutes. A short one, of about 1: --nodes=100 --rounds=1
# As root; everything happens in network namespaces of its own. Run it on a quiet machine.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
EDGEFLANNEL_BIN_DIR=$(scripts/build.sh)
export EDGEFLANNEL_BIN_DIR
cargo run --quiet --release --locked -p integration --bin bench -- "$@"
