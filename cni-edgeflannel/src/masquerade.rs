//! Which of the pods' packets leave under the node's address: the wanted rules, decided here and compared
//! with what is there.
//!
//! One base chain per network in our table, no rule per pod. A chain of its own for each network, rather than
//! one that jumps to them, leaves nothing that two ADDs at once could put in twice.

use crate::{
    config::{Config, Ranges},
    nft::{Chain, Hook, Match, Rule, Verdict},
    subnet_env::{SubnetEnv, without_host},
};
use cni::NetworkName;
use ipnetwork::IpNetwork;

/// kube-proxy marks what it wants masqueraded and does it itself; flannel leaves such packets alone as well.
const KUBE_PROXY_MARK: u32 = 0x4000;

/// A chain's name may be longer; so much of a network's name keeps it readable and unique in practice.
const NAME_MAX: usize = 100;

/// The name of a network's chain.
#[must_use]
pub fn chain_name(network: &NetworkName) -> String {
    let name = network.as_str();
    if name.len() <= NAME_MAX {
        return format!("masquerade-{name}");
    }
    let [a, b, c, d]: [u8; 4] = crate::mac::first_bytes(name.as_bytes());
    format!("masquerade-{}-{a:02x}{b:02x}{c:02x}{d:02x}", &name[..NAME_MAX])
}

/// The rules of a network, if its configuration wants any; `addresses` are one pod's. They are for all subnets
/// that pods of this network may be in, so that pods of different ranges want the same rules.
#[must_use]
pub fn of_network(
    network: &NetworkName,
    config: &Config,
    subnet: Option<&SubnetEnv>,
    addresses: &[IpNetwork],
) -> Option<Chain> {
    if !config.masquerade(subnet.map(|subnet| subnet.ip_masq)) {
        return None;
    }
    let mut subnets = match (&config.ipam.ranges, subnet) {
        (_, Some(subnet)) => subnet.subnets.clone(),
        (Ranges::Inline(subnets), None) => subnets.clone(),
        (Ranges::SubnetFile(_), None) => Vec::new(),
    };
    for own in addresses.iter().copied().map(without_host) {
        if !subnets.iter().any(|net| net.contains(own.ip()) && net.prefix() <= own.prefix()) {
            subnets.push(own);
        }
    }
    Some(wanted(network, &subnets, subnet.map_or(&[], |subnet| &subnet.networks)))
}

/// The rules for pods of `subnets`, which see each other and the cluster's `networks` under their own address,
/// and everything else under the node's.
#[must_use]
pub fn wanted(network: &NetworkName, subnets: &[IpNetwork], networks: &[IpNetwork]) -> Chain {
    let mut rules = vec![rule(&[Match::Mark(KUBE_PROXY_MARK)], Verdict::Return)];
    for pods in subnets {
        let mut inside: Vec<IpNetwork> = Vec::new();
        for net in subnets.iter().chain(networks).copied().chain([multicast(pods.is_ipv4())]) {
            if net.is_ipv4() == pods.is_ipv4() && !inside.contains(&net) {
                inside.push(net);
            }
        }
        for net in inside {
            rules.push(rule(&[Match::From(*pods), Match::To(net)], Verdict::Return));
        }
        rules.push(rule(&[Match::From(*pods)], Verdict::Masquerade { fully_random: true }));
    }
    Chain { name: chain_name(network), hook: Hook::SourceNat, rules }
}

/// Whether a chain with these comments is the wanted one.
#[must_use]
pub fn holds(wanted: &Chain, comments: &[String]) -> bool {
    wanted.rules.len() == comments.len()
        && wanted.rules.iter().zip(comments).all(|(rule, comment)| rule.to_string() == *comment)
}

fn rule(matches: &[Match], verdict: Verdict) -> Rule {
    Rule { matches: matches.to_vec(), verdict }
}

fn multicast(v4: bool) -> IpNetwork {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
    let (ip, prefix): (IpAddr, u8) = if v4 {
        (Ipv4Addr::new(224, 0, 0, 0).into(), 4)
    } else {
        (Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0).into(), 8)
    };
    IpNetwork::new(ip, prefix).unwrap_or_else(|_| IpNetwork::from(ip))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(list: &[&str]) -> Vec<IpNetwork> {
        list.iter().map(|cidr| cidr.parse().unwrap()).collect()
    }

    fn texts(subnets: &[&str], networks: &[&str]) -> Vec<String> {
        let name = NetworkName::parse("cbr0").unwrap();
        wanted(&name, &nets(subnets), &nets(networks)).rules.iter().map(Rule::to_string).collect()
    }

    #[test]
    fn one_family() {
        assert_eq!(
            texts(&["10.244.1.0/24"], &["10.244.0.0/16"]),
            [
                "meta mark & 0x4000 == 0x4000 return",
                "ip saddr 10.244.1.0/24 ip daddr 10.244.1.0/24 return",
                "ip saddr 10.244.1.0/24 ip daddr 10.244.0.0/16 return",
                "ip saddr 10.244.1.0/24 ip daddr 224.0.0.0/4 return",
                "ip saddr 10.244.1.0/24 masquerade fully-random",
            ]
        );
    }

    #[test]
    fn families_do_not_mix() {
        let rules = texts(&["10.1.0.0/24", "fd00::/64"], &[]);
        assert_eq!(
            rules[4..],
            [
                "ip6 saddr fd00::/64 ip6 daddr fd00::/64 return",
                "ip6 saddr fd00::/64 ip6 daddr ff00::/8 return",
                "ip6 saddr fd00::/64 masquerade fully-random",
            ]
        );
    }

    #[test]
    fn a_comment_fits_into_nfts_limit() {
        let long = "fd00:1111:2222:3333:4444:5555:6666:7777/128";
        for text in texts(&[long], &["fd00:1111:2222:3333:4444:5555:6666:7778/128"]) {
            assert!(text.len() < 128, "{} {text}", text.len());
        }
    }

    #[test]
    fn comparing() {
        let chain = wanted(&NetworkName::parse("cbr0").unwrap(), &nets(&["10.1.0.0/24"]), &[]);
        let mut comments: Vec<String> = chain.rules.iter().map(Rule::to_string).collect();
        assert!(holds(&chain, &comments));
        comments.swap(0, 1);
        assert!(!holds(&chain, &comments));
        comments.pop();
        assert!(!holds(&chain, &comments));
        assert!(!holds(&chain, &[]));
    }

    #[test]
    fn chain_names() {
        assert_eq!(chain_name(&NetworkName::parse("cbr0").unwrap()), "masquerade-cbr0");
        let long = |end: &str| chain_name(&NetworkName::parse(&format!("{}{end}", "n".repeat(120))).unwrap());
        assert!(long("a").len() < 128);
        assert_ne!(long("a"), long("b"));
    }
}
