//! One binding, and how it is written down.
//!
//! A record carries a check sum over its key and body: redb does not verify the pages of a file that was not
//! closed cleanly, and a garbage page must be noticed rather than believed.

use crate::{address::Address, identity::Key};

/// The addresses of one identity and who holds them now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Binding {
    /// When it last changed hands, by the state's own counter. There is no clock.
    pub sequence: u64,
    /// What it was given, one per range set.
    pub addresses: Vec<Address>,
    /// What it was promised by `pin`; kept even when it is not in use.
    pub pins: Vec<Address>,
    /// The container that has it; without one it is idle.
    pub owner: Option<Owner>,
    /// Containers that had it before and may be running still, the latest last.
    pub former: Vec<Owner>,
}

/// A container that owns, or owned, a binding. The interface is the identity's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Owner {
    /// `CNI_CONTAINERID`
    pub container: String,
    /// `CNI_NETNS`; empty when unknown.
    pub netns: String,
    /// The boot it was made in; empty when unknown.
    pub boot: String,
    /// `K8S_POD_UID`; empty when unknown.
    pub uid: String,
}

impl Owner {
    /// An owner. What is longer than the real thing can be is not remembered.
    #[must_use]
    pub fn new(container: &str, netns: &str, boot: &str, uid: &str) -> Self {
        let short = |text: &str, longest| if text.len() > longest { String::new() } else { text.to_owned() };
        Self {
            container: container.into(),
            netns: short(netns, 4096),
            boot: short(boot, 64),
            uid: short(uid, 253),
        }
    }
}

impl Binding {
    /// Every address that is nobody else's because of this binding.
    #[must_use]
    pub fn held(&self) -> Vec<Address> {
        let mut held = self.addresses.clone();
        held.extend(self.pins.iter().filter(|pin| !self.addresses.contains(pin)));
        held
    }

    /// The addresses that it may lose when it is not in use: those that are not pinned.
    pub fn spare(&self) -> impl Iterator<Item = Address> {
        self.addresses.iter().filter(|address| !self.pins.contains(address)).copied()
    }

    /// Whether somebody else may get an address of it.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.owner.is_none() && self.spare().next().is_some()
    }

    /// Every container that a DEL may come for.
    pub fn containers(&self) -> impl Iterator<Item = &str> {
        self.owner.iter().chain(&self.former).map(|owner| owner.container.as_str())
    }

    /// The bytes of the record under its key.
    #[must_use]
    pub fn encode(&self, key: &Key) -> Vec<u8> {
        let mut body = Vec::with_capacity(192);
        body.extend(self.sequence.to_le_bytes());
        for addresses in [&self.addresses, &self.pins] {
            put_count(&mut body, addresses.len());
            addresses.iter().for_each(|address| body.extend(address.0.to_le_bytes()));
        }
        put_count(&mut body, usize::from(self.owner.is_some()) + self.former.len());
        body.push(u8::from(self.owner.is_some()));
        for owner in self.owner.iter().chain(&self.former) {
            for text in [&owner.container, &owner.netns, &owner.boot, &owner.uid] {
                put_count(&mut body, text.len());
                body.extend(text.as_bytes());
            }
        }
        body.extend(check_sum(key, &body).to_le_bytes());
        body
    }

    /// Reads a record. `None` when it is not one that [`Self::encode`] wrote for this key.
    #[must_use]
    pub fn decode(key: &Key, bytes: &[u8]) -> Option<Self> {
        let (body, sum) = bytes.split_last_chunk::<8>()?;
        if check_sum(key, body) != u64::from_le_bytes(*sum) {
            return None;
        }
        let mut rest = body;
        let sequence = u64::from_le_bytes(take(&mut rest)?);
        let mut lists = [Vec::new(), Vec::new()];
        for list in &mut lists {
            for _ in 0..take_count(&mut rest)? {
                list.push(Address(u128::from_le_bytes(take(&mut rest)?)));
            }
        }
        let [addresses, pins] = lists;
        let count = take_count(&mut rest)?;
        let owned = take::<1>(&mut rest)? == [1];
        let mut owners = Vec::new();
        for _ in 0..count {
            let mut texts = [const { String::new() }; 4];
            for text in &mut texts {
                *text = take_text(&mut rest)?;
            }
            let [container, netns, boot, uid] = texts;
            owners.push(Owner { container, netns, boot, uid });
        }
        let owner = (owned && !owners.is_empty()).then(|| owners.remove(0));
        rest.is_empty().then_some(Self { sequence, addresses, pins, owner, former: owners })
    }
}

/// Lengths take two bytes; nothing here is longer (paths are cut off where they come in).
fn put_count(body: &mut Vec<u8>, count: usize) {
    body.extend(u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes());
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (chunk, after) = rest.split_first_chunk::<N>()?;
    *rest = after;
    Some(*chunk)
}

fn take_count(rest: &mut &[u8]) -> Option<usize> {
    take(rest).map(u16::from_le_bytes).map(usize::from)
}

fn take_text(rest: &mut &[u8]) -> Option<String> {
    let length = take_count(rest)?;
    let (text, after) = rest.split_at_checked(length)?;
    *rest = after;
    std::str::from_utf8(text).ok().map(String::from)
}

/// FNV-1a: a few bytes of code, and garbage does not pass it by accident.
fn check_sum(key: &Key, body: &[u8]) -> u64 {
    let bytes = key.as_str().as_bytes().iter().chain(body);
    bytes.fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn owners() -> impl Strategy<Value = Owner> {
        ("[a-z0-9]{1,64}", "[a-z/]{0,40}", "[0-9a-f-]{0,36}", "\\PC{0,9}")
            .prop_map(|(container, netns, boot, uid)| Owner { container, netns, boot, uid })
    }

    fn bindings() -> impl Strategy<Value = Binding> {
        let addresses = || prop::collection::vec(any::<u128>().prop_map(Address), 0..4);
        let former = prop::collection::vec(owners(), 0..4);
        (any::<u64>(), addresses(), addresses(), prop::option::of(owners()), former).prop_map(
            |(sequence, addresses, pins, owner, former)| Binding { sequence, addresses, pins, owner, former },
        )
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(binding in bindings()) {
            let key = Key::parse("ns/pod/eth0").unwrap();
            prop_assert_eq!(Binding::decode(&key, &binding.encode(&key)), Some(binding));
        }

        #[test]
        fn what_was_not_written_is_not_read(
            binding in bindings(), at in any::<prop::sample::Index>(), flip in 1..=255_u8
        ) {
            let key = Key::parse("ns/pod/eth0").unwrap();
            let mut bytes = binding.encode(&key);
            prop_assert_eq!(Binding::decode(&Key::parse("ns/other/eth0").unwrap(), &bytes), None);
            prop_assert_eq!(Binding::decode(&key, &bytes[..at.index(bytes.len())]), None);
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert_eq!(Binding::decode(&key, &bytes), None);
        }

        #[test]
        fn garbage_is_not_read(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert_eq!(Binding::decode(&Key::parse("ns/pod/eth0").unwrap(), &bytes), None);
        }
    }
}
