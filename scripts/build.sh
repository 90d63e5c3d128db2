#!/usr/bin/env bash
# Builds what is installed: small, static binaries for this machine.
#   scripts/build.sh [PACKAGE...]      default: everything that is dropped into a node
#   PROFILE=fast scripts/build.sh tunnel       edge-tunnel, for servers and nodes
# The last line printed is the directory they are in.
set -euo pipefail
cd "$(dirname "$0")/.."
packages=("$@")
[ ${#packages[@]} -gt 0 ] || packages=(ipam-sticky cni-edgeflannel)
profile=${PROFILE:-release}
host=$(rustc -vV | sed -n 's/^host: //p')
# With --target, so that build scripts and proc macros are not linked statically (they cannot be).
RUSTFLAGS="${RUSTFLAGS:-} -C target-feature=+crt-static" \
    cargo build --profile "$profile" --locked --target "$host" "${packages[@]/#/--package=}" >&2
echo "${CARGO_TARGET_DIR:-$PWD/target}/$host/$profile"
