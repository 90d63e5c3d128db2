//! `resolvConf`: a resolv.conf as the `dns` of a result, read as host-local reads it.

use cni::Dns;

/// The settings of a resolv.conf. Of several `domain` lines the last counts; lists add up.
#[must_use]
pub fn parse(text: &str) -> Dns {
    let mut dns = Dns::default();
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';'])) {
        let mut words = line.split_whitespace().map(String::from);
        match words.next().as_deref() {
            Some("nameserver") => dns.nameservers.extend(words.next()),
            Some("domain") => dns.domain = words.next().or(dns.domain),
            Some("search") => dns.search.extend(words),
            Some("options") => dns.options.extend(words),
            _ => {}
        }
    }
    dns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resolv_conf() {
        let dns = parse(
            "# by hand\n; nameserver 9.9.9.9\nnameserver 10.0.0.2\nnameserver fd00::2\ndomain edge.lan\n\
             search a.lan b.lan\noptions ndots:2 rotate\nnameserver\nsortlist 1.2.3.4\n\n",
        );
        assert_eq!(dns.nameservers, ["10.0.0.2", "fd00::2"]);
        assert_eq!(dns.domain.as_deref(), Some("edge.lan"));
        assert_eq!(dns.search, ["a.lan", "b.lan"]);
        assert_eq!(dns.options, ["ndots:2", "rotate"]);
        assert_eq!(parse(""), Dns::default());
    }
}
