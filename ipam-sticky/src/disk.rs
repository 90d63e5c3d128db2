//! The file under redb, with a gate in front of its writes.
//!
//! While the gate is shut, what redb writes stays in memory and nothing is synced; reads see it. Opening the
//! gate writes it out, syncs once and lets everything after it through. So
//! - opening a file costs no sync until there is something to commit: a DEL that comes twice writes nothing;
//! - a read-only disk is read through a gate that stays shut, without copying the file to memory;
//! - after the commit the gate is shut for good and the database dropped: what redb would write on closing (four
//!   more syncs) is not needed, because with quick repair the commit itself has recorded everything.
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
pub struct Gate {
    inner: Arc<dyn StorageBackend>,
    held: Arc<Mutex<Held>>,
}

#[derive(Default)]
struct Held {
    open: bool,
    /// The length redb believes in, when it has changed it.
    length: Option<u64>,
    /// The shortest it has been: what lies below from there on is gone.
    shortest: Option<u64>,
    /// Pieces by number.
    pieces: BTreeMap<u64, Vec<u8>>,
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held").field("open", &self.open).field("pieces", &self.pieces.len()).finish()
    }
}

impl Gate {
    /// Shut, in front of a storage.
    #[must_use]
    pub fn new(inner: Box<dyn StorageBackend>) -> Self {
        Self { inner: inner.into(), held: Arc::default() }
    }

    /// Writes out what was held back, and lets through what comes.
    ///
    /// # Errors
    /// The storage's. The gate is open then all the same; redb must not go on with this storage.
    pub fn open(&self) -> Result<()> {
        let mut held = self.held();
        if held.open {
            return Ok(());
        }
        let Held { length, shortest, pieces, .. } = std::mem::take(&mut *held);
        held.open = true;
        drop(held);
        if length.is_none() && pieces.is_empty() {
            return Ok(());
        }
        for length in shortest.into_iter().chain(length) {
            if length != self.inner.len()? {
                self.inner.set_len(length)?;
            }
        }
        let end = self.inner.len()?;
        for (number, piece) in pieces {
            let offset = number * PIECE;
            let inside = usize::try_from(end.saturating_sub(offset)).unwrap_or(usize::MAX).min(piece.len());
            self.inner.write(offset, piece.get(..inside).unwrap_or(&piece))?;
        }
        self.inner.sync_data()
    }

    /// Holds back everything from now on.
    pub fn shut(&self) {
        self.held().open = false;
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        // A panic of redb's must not become a second one here; the data is whole at every unlock.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn length(&self, held: &Held) -> Result<u64> {
        held.length.map_or_else(|| self.inner.len(), Ok)
    }

    /// Reads a piece from below; what lies beyond the end is zero.
    fn read_piece(&self, held: &Held, number: u64) -> Result<Vec<u8>> {
        let mut piece = vec![0; usize::try_from(PIECE).unwrap_or(0)];
        let offset = number * PIECE;
        let end = self.inner.len()?.min(held.shortest.unwrap_or(u64::MAX));
        let there = end.saturating_sub(offset).min(PIECE);
        if let Some(part) =
            piece.get_mut(..usize::try_from(there).unwrap_or(0)).filter(|part| !part.is_empty())
        {
            self.inner.read(offset, part)?;
        }
        Ok(piece)
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
        self.length(&self.held())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let held = self.held();
        if held.open || (held.pieces.is_empty() && held.length.is_none()) {
            return self.inner.read(offset, out);
        }
        if offset
            .checked_add(out.len() as u64)
            .is_none_or(|end| Some(end) > held.length.or(self.inner.len().ok()))
        {
            return Err(too_short());
        }
        for (number, within, done, count) in parts(offset, out.len()) {
            let to = out.get_mut(done..done + count).ok_or_else(too_short)?;
            let from = match held.pieces.get(&number) {
                Some(piece) => piece.get(within..within + count).map(<[u8]>::to_vec),
                None => self.read_piece(&held, number)?.get(within..within + count).map(<[u8]>::to_vec),
            };
            to.copy_from_slice(&from.ok_or_else(too_short)?);
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        let mut held = self.held();
        if held.open {
            return self.inner.set_len(len);
        }
        if len < self.length(&held)? {
            held.pieces.retain(|number, _| number * PIECE < len);
            if let Some(piece) = held.pieces.get_mut(&(len / PIECE)) {
                piece.iter_mut().skip(usize::try_from(len % PIECE).unwrap_or(0)).for_each(|byte| *byte = 0);
            }
        }
        held.shortest = Some(held.shortest.map_or(len, |shortest| shortest.min(len)));
        held.length = Some(len);
        Ok(())
    }

    fn sync_data(&self) -> Result<()> {
        if self.held().open { self.inner.sync_data() } else { Ok(()) }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let mut held = self.held();
        if held.open {
            return self.inner.write(offset, data);
        }
        for (number, within, done, count) in parts(offset, data.len()) {
            if !held.pieces.contains_key(&number) {
                let piece = self.read_piece(&held, number)?;
                held.pieces.insert(number, piece);
            }
            let piece = held.pieces.get_mut(&number).and_then(|piece| piece.get_mut(within..within + count));
            piece.ok_or_else(too_short)?.copy_from_slice(data.get(done..done + count).ok_or_else(too_short)?);
        }
        Ok(())
    }

    fn close(&self) -> Result<()> {
        self.inner.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Locked<bool> {
        self.inner.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Locked<bool> {
        self.inner.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Locked<()> {
        self.inner.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Locked<()> {
        self.inner.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Locked<()> {
        self.inner.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Locked<bool> {
        self.inner.query_lock_range(start, end)
    }
}
