//! flannel's firewall rules, as chains of our own table.
//!
//! The same list as flannel's iptables rules (`flannel/pkg/trafficmngr/iptables/iptables.go`, `masqRules`,
//! `masqIP6Rules`, `forwardRules`), which differ from its nftables ones: there the fourth rule returns for more
//! than it should, which makes the last one unreachable, and kube-proxy's mark is compared as a whole.
//!
//! The pods' chains live in the same table; each owner replaces its own.

use crate::{
    nft::{Chain, Hook, Match, Rule, Verdict},
    record::{Family, NodeRecord},
};
use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use std::net::{Ipv4Addr, Ipv6Addr};

/// Every chain that this module ever makes.
pub const CHAINS: [&str; 2] = [POSTROUTING, FORWARD];

const POSTROUTING: &str = "overlay-postrouting";
const FORWARD: &str = "overlay-forward";

/// kube-proxy's "masquerade this", bit 14. The other bits belong to others.
const KUBE_PROXY_MARK: u32 = 0x4000;

/// The chains that a node wants.
#[must_use]
pub fn chains(node: &NodeRecord) -> Vec<Chain> {
    let (mut postrouting, mut forward) = (Vec::new(), Vec::new());
    for family in Family::ALL {
        let (Some(cluster), Some(pods)) = (node.networks.get(family), node.subnets.get(family)) else {
            continue;
        };
        if node.ip_masq {
            postrouting.extend(masquerade(*cluster, *pods, node.random_fully));
        }
        if node.forward_rules {
            forward.push(rule(&[Match::From(*cluster)], Verdict::Accept));
            forward.push(rule(&[Match::To(*cluster)], Verdict::Accept));
        }
    }
    if !postrouting.is_empty() {
        // As the first rule, and once: it holds for both families.
        postrouting.insert(0, rule(&[Match::Mark(KUBE_PROXY_MARK)], Verdict::Return));
    }
    let chains = [
        Chain { name: POSTROUTING.into(), hook: Hook::SourceNat, rules: postrouting },
        Chain { name: FORWARD.into(), hook: Hook::Forward, rules: forward },
    ];
    chains.into_iter().filter(|chain| !chain.rules.is_empty()).collect()
}

/// What follows kube-proxy's mark.
fn masquerade(cluster: IpNetwork, pods: IpNetwork, fully_random: bool) -> [Rule; 5] {
    use Match::{From, NotFrom, NotTo, To};
    let multicast = multicast(cluster.is_ipv4());
    let masquerade = Verdict::Masquerade { fully_random };
    [
        rule(&[From(pods), To(cluster)], Verdict::Return),
        rule(&[From(cluster), To(pods)], Verdict::Return),
        // Arrived from outside by way of a node that already knows where the pod is.
        rule(&[NotFrom(cluster), To(pods)], Verdict::Return),
        rule(&[From(cluster), NotTo(multicast)], masquerade),
        // From this host to a pod elsewhere: its peers know no way back to the host's own address.
        rule(&[NotFrom(cluster), To(cluster)], masquerade),
    ]
}

fn rule(matches: &[Match], verdict: Verdict) -> Rule {
    Rule { matches: matches.to_vec(), verdict }
}

fn multicast(v4: bool) -> IpNetwork {
    if v4 {
        let all = Ipv4Addr::new(224, 0, 0, 0);
        IpNetwork::V4(Ipv4Network::new(all, 4).unwrap_or_else(|_| Ipv4Network::from(all)))
    } else {
        let all = Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0);
        IpNetwork::V6(Ipv6Network::new(all, 8).unwrap_or_else(|_| Ipv6Network::from(all)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::PerFamily;

    fn node(v6: bool) -> NodeRecord {
        let nets = |v4: &str, six: &str| PerFamily {
            v4: Some(v4.parse().unwrap()),
            v6: v6.then(|| six.parse().unwrap()),
        };
        NodeRecord {
            networks: nets("10.244.0.0/16", "fd00:10:244::/56"),
            subnets: nets("10.244.1.0/24", "fd00:10:244:1::/64"),
            ip_masq: true,
            ..NodeRecord::default()
        }
    }

    fn text(node: &NodeRecord) -> Vec<(String, Vec<String>)> {
        let rules = |chain: Chain| chain.rules.iter().map(ToString::to_string).collect();
        chains(node).into_iter().map(|chain| (chain.name.clone(), rules(chain))).collect()
    }

    #[test]
    fn as_flannels_iptables_rules() {
        let [(_, postrouting), (_, forward)] = &text(&node(false))[..] else { panic!() };
        assert_eq!(
            postrouting[..],
            [
                "meta mark & 0x4000 == 0x4000 return",
                "ip saddr 10.244.1.0/24 ip daddr 10.244.0.0/16 return",
                "ip saddr 10.244.0.0/16 ip daddr 10.244.1.0/24 return",
                "ip saddr != 10.244.0.0/16 ip daddr 10.244.1.0/24 return",
                "ip saddr 10.244.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random",
                "ip saddr != 10.244.0.0/16 ip daddr 10.244.0.0/16 masquerade fully-random",
            ]
        );
        assert_eq!(forward[..], ["ip saddr 10.244.0.0/16 accept", "ip daddr 10.244.0.0/16 accept"]);
    }

    #[test]
    fn both_families() {
        let [(_, postrouting), (_, forward)] = &text(&node(true))[..] else { panic!() };
        assert_eq!(postrouting.len(), 11);
        assert_eq!(
            postrouting[9],
            "ip6 saddr fd00:10:244::/56 ip6 daddr != ff00::/8 masquerade fully-random"
        );
        assert_eq!(forward[3], "ip6 daddr fd00:10:244::/56 accept");
    }

    #[test]
    fn what_is_switched_off_is_not_there() {
        let names = |node: NodeRecord| chains(&node).into_iter().map(|chain| chain.name).collect::<Vec<_>>();
        assert_eq!(names(NodeRecord { ip_masq: false, ..node(true) }), [FORWARD]);
        assert_eq!(names(NodeRecord { forward_rules: false, ..node(true) }), [POSTROUTING]);
        assert!(names(NodeRecord { ip_masq: true, ..NodeRecord::default() }).is_empty());
        let plain = text(&NodeRecord { random_fully: false, ..node(false) });
        assert!(plain[0].1[5].ends_with(" masquerade"));
    }
}
