#!/usr/bin/env bash
# Fuzzes one target for a while and keeps the inputs that reach something new.
#   scripts/fuzz.sh TARGET [SECONDS]      targets: see fuzz/fuzz_targets
# Needs a nightly toolchain and cargo-fuzz; CI replays the corpus with the ordinary toolchain.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:?"name a target: $(ls fuzz/fuzz_targets | sed 's/\.rs//' | tr '\n' ' ')"}
seconds=${2:-60}
command -v cargo-fuzz >/dev/null || cargo install --locked cargo-fuzz
cargo +nightly fuzz run --features libfuzzer "$target" -- -max_total_time="$seconds" -max_len=65536
cargo +nightly fuzz cmin --features libfuzzer "$target"
