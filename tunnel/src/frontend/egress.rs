//! HTTP CONNECT as kube-apiserver's EgressSelectorConfiguration speaks it, over mTLS or a unix socket.
