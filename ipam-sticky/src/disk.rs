//! The file under redb, with a gate in front of its writes.
//!
//! While the gate is shut, what redb writes stays in memory and nothing is synced; reads see it. Opening the
//! gate writes it out, syncs once and lets everything after it through. So
//! - opening a file costs no sync until there is something to commit: a DEL that comes twice writes nothing;
//! - a read-only disk is read through a gate that stays shut, without copying the file to memory;
//! - after the commit the file is taken away, and the database dropped without it: what redb would write on closing
//!   (four more syncs) is not needed, because with quick repair the commit itself has recorded everything.
//!
//! The order of writes and syncs towards the disk is redb's own; they are only late.

use redb::{BackendError, StorageBackend};
use std::{
    collections::BTreeMap,
    fmt,
    io::{Error, ErrorKind, Result},
    ops::Bound,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

type Locked<T> = std::result::Result<T, BackendError>;

/// Writes are kept in pieces of this size.
const PIECE: u64 = 4096;

/// A storage whose writes can be held back.
#[derive(Debug, Clone)]
pub struct Gate(Arc<Mutex<Held>>);

struct Held {
    /// The storage below; `None` when it was taken away.
    inner: Option<Box<dyn StorageBackend>>,
    open: bool,
    /// The length redb believes in.
    length: u64,
    /// The shortest it has been: what lies below from there on is gone.
    shortest: u64,
    /// Pieces by number.
    pieces: BTreeMap<u64, Vec<u8>>,
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held").field("open", &self.open).field("pieces", &self.pieces.len()).finish()
    }
}

impl Held {
    fn inner(&self) -> Result<&dyn StorageBackend> {
        self.inner.as_deref().ok_or_else(|| Error::other("the state file is closed"))
    }

    /// Reads from below; what lies beyond the end is zero.
    fn read_below(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let there =
            usize::try_from(self.shortest.saturating_sub(offset)).unwrap_or(usize::MAX).min(out.len());
        let (part, beyond) = out.split_at_mut(there);
        beyond.fill(0);
        if part.is_empty() { Ok(()) } else { self.inner()?.read(offset, part) }
    }
}

impl Gate {
    /// Shut, in front of a storage.
    ///
    /// # Errors
    /// The storage's.
    pub fn new(inner: Box<dyn StorageBackend>) -> Result<Self> {
        let length = inner.len()?;
        let held =
            Held { inner: Some(inner), open: false, length, shortest: length, pieces: BTreeMap::new() };
        Ok(Self(Arc::new(Mutex::new(held))))
    }

    /// Writes out what was held back, and lets through what comes.
    ///
    /// # Errors
    /// The storage's. redb must not go on with this storage then.
    pub fn open(&self) -> Result<()> {
        let mut held = self.held();
        if held.open {
            return Ok(());
        }
        held.open = true;
        let pieces = std::mem::take(&mut held.pieces);
        let inner = held.inner()?;
        let mut changed = !pieces.is_empty();
        for length in [held.shortest, held.length] {
            if length != inner.len()? {
                inner.set_len(length)?;
                changed = true;
            }
        }
        for (number, piece) in pieces {
            let offset = number * PIECE;
            let inside = usize::try_from(held.length.saturating_sub(offset)).unwrap_or(usize::MAX);
            inner.write(offset, piece.get(..inside).unwrap_or(&piece))?;
        }
        if changed { inner.sync_data() } else { Ok(()) }
    }

    /// Takes the storage away, locks and all. Whoever asks for it afterwards gets an error.
    pub fn take_away(&self) {
        let mut held = self.held();
        held.open = true;
        if let Some(inner) = held.inner.take() {
            // Nothing is written by this; the kernel closes the file in any case.
            let _ = inner.close();
        }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        // A panic of redb's must not become a second one here; the data is whole at every unlock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The parts of `offset..offset + length`, piece by piece: number, where in the piece, where in the buffer, how many.
fn parts(offset: u64, length: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let mut done = 0_usize;
    std::iter::from_fn(move || {
        let at = offset + done as u64;
        let within = usize::try_from(at % PIECE).ok()?;
        let count = (length - done).min(usize::try_from(PIECE).ok()? - within);
        let part = (count > 0).then_some((at / PIECE, within, done, count));
        done += count;
        part
    })
}

fn too_short() -> Error {
    Error::new(ErrorKind::UnexpectedEof, "read beyond the end of the state file")
}

impl StorageBackend for Gate {
    fn len(&self) -> Result<u64> {
        let held = self.held();
        if held.open { held.inner()?.len() } else { Ok(held.length) }
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let held = self.held();
        if held.open {
            return held.inner()?.read(offset, out);
        }
        let end =
            offset.checked_add(out.len() as u64).filter(|end| *end <= held.length).ok_or_else(too_short)?;
        if held.pieces.range(offset / PIECE..end.div_ceil(PIECE)).next().is_none() {
            return held.read_below(offset, out);
        }
        for (number, within, done, count) in parts(offset, out.len()) {
            let to = out.get_mut(done..done + count).ok_or_else(too_short)?;
            match held.pieces.get(&number) {
                Some(piece) => to.copy_from_slice(piece.get(within..within + count).ok_or_else(too_short)?),
                None => held.read_below(offset + done as u64, to)?,
            }
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        let mut held = self.held();
        if held.open {
            return held.inner()?.set_len(len);
        }
        if len < held.length {
            held.pieces.retain(|number, _| number * PIECE < len);
            if let Some(piece) = held.pieces.get_mut(&(len / PIECE)) {
                piece.iter_mut().skip(usize::try_from(len % PIECE).unwrap_or(0)).for_each(|byte| *byte = 0);
            }
        }
        held.shortest = held.shortest.min(len);
        held.length = len;
        Ok(())
    }

    fn sync_data(&self) -> Result<()> {
        let held = self.held();
        if held.open { held.inner()?.sync_data() } else { Ok(()) }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let mut held = self.held();
        if held.open {
            return held.inner()?.write(offset, data);
        }
        for (number, within, done, count) in parts(offset, data.len()) {
            if !held.pieces.contains_key(&number) {
                let mut piece = vec![0; usize::try_from(PIECE).unwrap_or(0)];
                held.read_below(number * PIECE, &mut piece)?;
                held.pieces.insert(number, piece);
            }
            let piece = held.pieces.get_mut(&number).and_then(|piece| piece.get_mut(within..within + count));
            piece.ok_or_else(too_short)?.copy_from_slice(data.get(done..done + count).ok_or_else(too_short)?);
        }
        Ok(())
    }

    fn close(&self) -> Result<()> {
        self.take_away();
        Ok(())
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Locked<bool> {
        self.held().inner()?.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Locked<bool> {
        self.held().inner()?.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Locked<()> {
        self.held().inner()?.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Locked<()> {
        self.held().inner()?.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Locked<()> {
        self.held().inner()?.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Locked<bool> {
        self.held().inner()?.query_lock_range(start, end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use redb::backends::InMemoryBackend;

    #[derive(Debug, Clone)]
    enum Step {
        Write(u64, Vec<u8>),
        Length(u64),
        Read(u64, usize),
        Open,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0..30_000_u64, prop::collection::vec(any::<u8>(), 0..9_000)).prop_map(|(at, data)| Step::Write(at, data)),
            1 => (0..40_000_u64).prop_map(Step::Length),
            3 => (0..40_000_u64, 0..9_000_usize).prop_map(|(at, count)| Step::Read(at, count)),
            1 => Just(Step::Open),
        ];
        prop::collection::vec(step, 1..30)
    }

    fn image(backend: &dyn StorageBackend) -> Vec<u8> {
        let mut image = vec![0; usize::try_from(backend.len().unwrap()).unwrap()];
        backend.read(0, &mut image).unwrap();
        image
    }

    proptest! {
        /// Open or shut, redb reads what it has written; and once open, so does everybody.
        #[test]
        fn a_gate_is_not_noticed(first in prop::collection::vec(any::<u8>(), 0..20_000), steps in steps()) {
            let below: Arc<InMemoryBackend> = Arc::default();
            below.set_len(first.len() as u64).unwrap();
            below.write(0, &first).unwrap();
            let gate = Gate::new(Box::new(Shared(Arc::clone(&below)))).unwrap();
            let mut plain = first.clone();
            let mut open = false;
            for step in steps {
                match step {
                    Step::Write(at, data) => {
                        let Some(to) = plain.get_mut(at as usize..at as usize + data.len()) else { continue };
                        to.copy_from_slice(&data);
                        gate.write(at, &data).unwrap();
                    }
                    Step::Length(length) => {
                        plain.resize(length as usize, 0);
                        gate.set_len(length).unwrap();
                    }
                    Step::Read(at, count) => {
                        let mut out = vec![0; count];
                        let read = gate.read(at, &mut out);
                        match plain.get(at as usize..at as usize + count) {
                            Some(expected) => prop_assert_eq!(out, expected),
                            None => prop_assert!(read.is_err()),
                        }
                    }
                    Step::Open => {
                        gate.open().unwrap();
                        open = true;
                    }
                }
                prop_assert_eq!(image(&gate), &plain[..]);
                prop_assert_eq!(image(&*below), if open { &plain[..] } else { &first[..] });
            }
            gate.take_away();
            prop_assert!(gate.len().is_err() && gate.read(0, &mut []).is_err() && gate.sync_data().is_err());
        }
    }

    #[derive(Debug)]
    struct Shared(Arc<InMemoryBackend>);

    impl StorageBackend for Shared {
        fn len(&self) -> Result<u64> {
            self.0.len()
        }
        fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
            self.0.read(offset, out)
        }
        fn set_len(&self, len: u64) -> Result<()> {
            self.0.set_len(len)
        }
        fn sync_data(&self) -> Result<()> {
            Ok(())
        }
        fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
            self.0.write(offset, data)
        }
    }
}
