//! A wide-area link with delay, loss and a rate, between two tun devices. The kernel here has no netem, so `rig wan` forwards the packets.
//!
//! [`Shaper`] decides when a packet arrives at the far end, if at all; the rest carries that out.

use crate::tun;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{Read, Write};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::{Duration, Instant};

/// What a link is like, in each direction.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Wan {
    /// One way.
    pub delay: Duration,
    /// The part of the packets that is lost: 0.01 is one in a hundred.
    pub loss: f64,
    /// Bits per second; 0 is as fast as it goes.
    pub rate: u64,
}

impl Wan {
    /// Nothing to emulate: a plain cable will do.
    pub fn is_plain(&self) -> bool {
        *self == Self::default()
    }
}

/// "delay=50ms,loss=1%,rate=20mbit", each part optional.
impl FromStr for Wan {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut wan = Self::default();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let number = |text: &str, unit: &str| -> Result<f64> {
                let digits =
                    text.strip_suffix(unit).with_context(|| format!("{part:?}: the unit is {unit}"))?;
                let value: f64 =
                    digits.parse().with_context(|| format!("{part:?}: {digits:?} is no number"))?;
                if value.is_finite() && value >= 0.0 { Ok(value) } else { bail!("{part:?} is out of range") }
            };
            match part.split_once('=') {
                Some(("delay", value)) => {
                    wan.delay = Duration::try_from_secs_f64(number(value, "ms")? / 1e3)?
                }
                Some(("loss", value)) => wan.loss = number(value, "%")? / 100.0,
                Some(("rate", value)) => wan.rate = (number(value, "mbit")? * 1e6) as u64,
                _ => bail!("{part:?}: write delay=50ms, loss=1%, rate=20mbit, joined by commas"),
            }
        }
        if wan.loss > 1.0 {
            bail!("more than all packets cannot be lost");
        }
        Ok(wan)
    }
}

/// Decides for one direction, packet by packet.
#[derive(Debug)]
pub struct Shaper {
    wan: Wan,
    /// When the line has sent all that it was given.
    line_free: Instant,
    random: u64,
}

/// A router's buffer: what waits longer than this for the line is dropped.
const BUFFER: Duration = Duration::from_millis(100);

impl Shaper {
    /// A shaper with an idle line. The same seed loses the same packets.
    pub fn new(wan: Wan, now: Instant, seed: u64) -> Self {
        Self { wan, line_free: now, random: seed | 1 }
    }

    /// When a packet of `bytes` that came now is at the far end; none if it is lost.
    pub fn arrival(&mut self, now: Instant, bytes: usize) -> Option<Instant> {
        let start = self.line_free.max(now);
        if start - now > BUFFER {
            return None;
        }
        if self.wan.rate > 0 {
            self.line_free = start + Duration::from_secs_f64(bytes as f64 * 8.0 / self.wan.rate as f64);
        } else {
            self.line_free = start;
        }
        // Lost on the way: it used the line all the same.
        if self.uniform() < self.wan.loss {
            return None;
        }
        Some(self.line_free + self.wan.delay)
    }

    /// xorshift64*, good enough to lose packets by, as a number in 0..1.
    fn uniform(&mut self) -> f64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        (self.random.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// `rig wan NEAR FAR WAN`: makes both tun devices here, says "ready", and forwards between them for ever.
/// The caller may move either into another network namespace: it stays tied to us.
pub fn forward(near: &str, far: &str, wan: Wan) -> Result<()> {
    let (near, far) = (Arc::new(tun::open(near)?), Arc::new(tun::open(far)?));
    println!("ready");
    std::io::stdout().flush()?;
    let back = (Arc::clone(&far), Arc::clone(&near));
    let other = thread::spawn(move || one_way(&back.0, back.1, Shaper::new(wan, Instant::now(), 2)));
    one_way(&near, far, Shaper::new(wan, Instant::now(), 1))?;
    match other.join() {
        Ok(result) => result,
        Err(_) => bail!("the other direction panicked"),
    }
}

fn one_way(from: &File, to: Arc<File>, mut shaper: Shaper) -> Result<()> {
    let (sender, receiver) = sync_channel::<(Instant, Vec<u8>)>(65536);
    thread::spawn(move || {
        for (arrival, packet) in receiver {
            thread::sleep(arrival.saturating_duration_since(Instant::now()));
            // A device that is down or gone takes no packet; a cable does not mind.
            let _ = (&*to).write(&packet);
        }
    });
    let mut buffer = vec![0; 65536];
    loop {
        let length = match (&*from).read(&mut buffer) {
            Ok(length) => length,
            // "File descriptor in bad state": the device is not up yet, or is on its way to another namespace.
            Err(_) => {
                thread::sleep(Duration::from_millis(10));
                continue;
            }
        };
        if let Some(arrival) = shaper.arrival(Instant::now(), length) {
            sender.send((arrival, buffer[..length].to_vec())).context("the sending half ended")?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_person_writes() {
        let wan: Wan = "delay=50ms,loss=1%,rate=20mbit".parse().unwrap();
        assert_eq!(wan, Wan { delay: Duration::from_millis(50), loss: 0.01, rate: 20_000_000 });
        assert!("".parse::<Wan>().unwrap().is_plain());
        for wrong in ["delay=50", "loss=200%", "rate=-1mbit", "speed=3", "delay=NaNms"] {
            assert!(wrong.parse::<Wan>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn delay_alone_keeps_order_and_spacing() {
        let start = Instant::now();
        let mut shaper = Shaper::new("delay=50ms".parse().unwrap(), start, 1);
        for ms in [0, 1, 1, 7] {
            let now = start + Duration::from_millis(ms);
            assert_eq!(shaper.arrival(now, 1500), Some(now + Duration::from_millis(50)));
        }
    }

    #[test]
    fn a_rate_spaces_packets_and_a_full_buffer_drops() {
        let start = Instant::now();
        // 1500 bytes take 12 ms.
        let mut shaper = Shaper::new("rate=1mbit".parse().unwrap(), start, 1);
        let arrivals: Vec<_> = (0..20).map(|_| shaper.arrival(start, 1500)).collect();
        for (i, arrival) in (1..).zip(&arrivals[..9]) {
            assert_eq!(arrival.unwrap() - start, Duration::from_millis(12) * i);
        }
        assert_eq!(arrivals[9..], [None; 11], "100 ms of buffer hold 8 packets behind the one being sent");
        let later = start + Duration::from_secs(1);
        assert_eq!(
            shaper.arrival(later, 1500),
            Some(later + Duration::from_millis(12)),
            "the line is idle again"
        );
    }

    #[test]
    fn loss_loses_its_share() {
        let start = Instant::now();
        let mut shaper = Shaper::new("loss=10%".parse().unwrap(), start, 1);
        let lost = (0..100_000).filter(|_| shaper.arrival(start, 100).is_none()).count();
        assert!((9_500..10_500).contains(&lost), "{lost}");
    }
}
