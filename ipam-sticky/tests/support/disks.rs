//! Storages under redb that fail at a chosen moment, or forget at a power cut what was not synced.

use ipam_sticky::{fault::Fault, store::MakeBackend};
use redb::{BackendError, StorageBackend, backends::FileBackend};
use std::{
    fs::File,
    io::{Error, Result},
    ops::Bound,
    os::unix::fs::FileExt,
    sync::{Arc, Mutex},
};

/// A disk that works for so many writes, syncs and changes of length, and never again.
#[derive(Debug)]
pub struct Failing {
    inner: FileBackend,
    left: Arc<Mutex<Option<u32>>>,
}

impl Failing {
    /// `left` is shared with the test; `None` works for ever. Every operation that may fail is counted off.
    pub fn make(left: &Arc<Mutex<Option<u32>>>) -> MakeBackend {
        let left = Arc::clone(left);
        Box::new(move |file: File| -> std::result::Result<Box<dyn StorageBackend>, Fault> {
            Ok(Box::new(Self { inner: FileBackend::new(file)?, left: Arc::clone(&left) }))
        })
    }

    fn count(&self) -> Result<()> {
        match self.left.lock().unwrap().as_mut() {
            Some(0) => Err(Error::from_raw_os_error(28)),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

/// Locks are the file's business in both.
macro_rules! locks {
    () => {
        fn try_lock_range(
            &self,
            start: Bound<u64>,
            end: Bound<u64>,
        ) -> std::result::Result<bool, BackendError> {
            self.inner.try_lock_range(start, end)
        }
        fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> std::result::Result<(), BackendError> {
            self.inner.unlock_range(start, end)
        }
        fn query_lock_range(
            &self,
            start: Bound<u64>,
            end: Bound<u64>,
        ) -> std::result::Result<bool, BackendError> {
            self.inner.query_lock_range(start, end)
        }
    };
}

impl StorageBackend for Failing {
    fn len(&self) -> Result<u64> {
        self.inner.len()
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.inner.read(offset, out)
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.count()?;
        self.inner.set_len(len)
    }
    fn sync_data(&self) -> Result<()> {
        self.count()?;
        self.inner.sync_data()
    }
    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.count()?;
        self.inner.write(offset, data)
    }
    fn close(&self) -> Result<()> {
        self.inner.close()
    }
    locks!();
}

/// A disk with a cache: what is written is in the cache, and a sync moves it to the file. At the power cut, some of
/// what is in the cache has reached the file, in pieces of 512 bytes, and the rest is gone.
#[derive(Debug, Default)]
pub struct Cache {
    image: Vec<u8>,
    unsynced: Vec<(u64, Vec<u8>)>,
    /// Operations until the power goes; `None` when it stays.
    left: Option<u32>,
    length: u64,
}

#[derive(Debug)]
pub struct Volatile {
    inner: FileBackend,
    file: File,
    cache: Arc<Mutex<Cache>>,
    seed: u64,
}

impl Volatile {
    pub fn make(left: u32, seed: u64) -> MakeBackend {
        Box::new(move |file: File| -> std::result::Result<Box<dyn StorageBackend>, Fault> {
            let length = file.metadata()?.len();
            let mut image = vec![0; usize::try_from(length).unwrap()];
            file.read_exact_at(&mut image, 0)?;
            let cache = Cache { image, length, left: Some(left), ..Cache::default() };
            let copy = file.try_clone()?;
            Ok(Box::new(Self {
                inner: FileBackend::new(file)?,
                file: copy,
                cache: Arc::new(Mutex::new(cache)),
                seed,
            }))
        })
    }

    /// Counts an operation; the last one is where the power goes.
    fn power(&self, cache: &mut Cache) -> Result<()> {
        match cache.left.as_mut() {
            Some(0) => {
                self.cut(cache);
                Err(Error::from_raw_os_error(5))
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn cut(&self, cache: &mut Cache) {
        let mut random = self.seed;
        let mut toss = || {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            random >> 62 == 0
        };
        // The length is the journal's, and is as new as the file system likes.
        if toss() {
            self.file.set_len(cache.length).unwrap();
        }
        let end = self.file.metadata().unwrap().len();
        for (offset, data) in cache.unsynced.drain(..) {
            for (number, sector) in data.chunks(512).enumerate() {
                let at = offset + number as u64 * 512;
                if toss() && at + sector.len() as u64 <= end {
                    self.file.write_all_at(sector, at).unwrap();
                }
            }
        }
    }
}

impl StorageBackend for Volatile {
    fn len(&self) -> Result<u64> {
        Ok(self.cache.lock().unwrap().length)
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let cache = self.cache.lock().unwrap();
        let offset = usize::try_from(offset).unwrap();
        let from = cache.image.get(offset..offset + out.len());
        out.copy_from_slice(from.ok_or_else(|| Error::from(std::io::ErrorKind::UnexpectedEof))?);
        Ok(())
    }
    fn set_len(&self, len: u64) -> Result<()> {
        let mut cache = self.cache.lock().unwrap();
        self.power(&mut cache)?;
        cache.length = len;
        cache.image.resize(usize::try_from(len).unwrap(), 0);
        Ok(())
    }
    fn sync_data(&self) -> Result<()> {
        let mut cache = self.cache.lock().unwrap();
        self.power(&mut cache)?;
        self.file.set_len(cache.length)?;
        for (offset, data) in cache.unsynced.drain(..) {
            self.file.write_all_at(&data, offset)?;
        }
        Ok(())
    }
    fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let mut cache = self.cache.lock().unwrap();
        self.power(&mut cache)?;
        let start = usize::try_from(offset).unwrap();
        cache.image[start..start + data.len()].copy_from_slice(data);
        cache.unsynced.push((offset, data.to_vec()));
        Ok(())
    }
    fn close(&self) -> Result<()> {
        // The process ends; with the power still on, the cache reaches the disk in its own time.
        let mut cache = self.cache.lock().unwrap();
        if cache.left != Some(0) {
            cache.left = None;
        }
        self.inner.close()
    }
    locks!();
}
