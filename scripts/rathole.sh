#!/usr/bin/env bash
# Builds rathole, a peer that scripts/bench.sh measures and that nothing else needs, unless it is there already.
# Prints where its program is. Licence: Apache-2.0.
set -euo pipefail
VERSION=0.5.0
dir=${EDGEFLANNEL_CACHE:-$HOME/.cache/edgeflannel}/tools/rathole-$VERSION

if ! [ -x "$dir/bin/rathole" ]; then
  echo "rathole $VERSION into $dir (built once, a few minutes)" >&2
  missing=()
  # Its TLS is OpenSSL's.
  for package in pkg-config libssl-dev; do
    dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
  done
  if [ ${#missing[@]} -gt 0 ]; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update >&2
    apt-get -qq install -y --no-install-recommends "${missing[@]}" >&2
  fi
  # From another folder, so that the project's flags do not apply. Without --locked: what its lock file names (time 0.3.29)
  # does not compile with a Rust of today. Renamed into place when it is whole.
  (cd / && nice cargo install -q rathole --version "$VERSION" --no-default-features --features server,client,tls \
    --root "$dir.new" --target-dir "$dir.build" >&2)
  rm -rf "$dir" "$dir.build"
  mv "$dir.new" "$dir"
fi
echo "$dir/bin/rathole"
