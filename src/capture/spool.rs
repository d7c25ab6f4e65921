//! A temporary file for the changes of a large transaction: blocks of whole items, cut back with savepoints.
use crate::error::Error;
use pgrx::prelude::*;

/// Postgres splits temporary files at this size; a place in one is (segment, offset).
const SEGMENT: u64 = 1 << 30;

/// Blocks in the order they were written. Closed by Postgres at the end of the transaction.
pub struct Spool {
    file: *mut pg_sys::BufFile,
    blocks: Vec<u64>,
}

impl Spool {
    /// Creates the file; it belongs to the top transaction, so that a savepoint rollback leaves it.
    pub fn create() -> Spool {
        // SAFETY: owner and context are those of the top transaction while the file is made.
        unsafe {
            let owner = pg_sys::CurrentResourceOwner;
            let context = pg_sys::MemoryContextSwitchTo(pg_sys::TopTransactionContext);
            pg_sys::CurrentResourceOwner = pg_sys::TopTransactionResourceOwner;
            let file = pg_sys::BufFileCreateTemp(false);
            pg_sys::CurrentResourceOwner = owner;
            pg_sys::MemoryContextSwitchTo(context);
            Spool { file, blocks: Vec::new() }
        }
    }

    /// Bytes in the file.
    pub fn len(&self) -> u64 {
        self.blocks.iter().sum()
    }

    /// Appends a block of whole items.
    pub fn append(&mut self, block: &[u8]) {
        self.seek(self.len());
        // SAFETY: writes `len` bytes; raises if the disk is full.
        unsafe { pg_sys::BufFileWrite(self.file, block.as_ptr().cast_mut().cast(), block.len()) };
        self.blocks.push(block.len() as u64);
    }

    /// Cuts back to `length` bytes, which is the end of an item.
    pub fn truncate(&mut self, length: u64) {
        let mut end = self.len();
        while let Some(last) = self.blocks.pop() {
            let start = end - last;
            if start < length {
                self.blocks.push(length.min(end) - start);
                return;
            }
            end = start;
        }
    }

    /// Hands each block to `f`, from the first on.
    pub fn for_each(&mut self, mut f: impl FnMut(&[u8])) {
        let mut start = 0;
        for length in self.blocks.clone() {
            self.seek(start);
            let mut block = vec![0u8; length as usize];
            self.read(&mut block);
            f(&block);
            start += length;
        }
    }

    /// Closes and removes the file. An abort does that by itself.
    pub fn close(self) {
        // SAFETY: open since create(), and not used afterwards.
        unsafe { pg_sys::BufFileClose(self.file) };
    }

    fn seek(&mut self, place: u64) {
        let (segment, offset) = ((place / SEGMENT) as i32, (place % SEGMENT) as i64);
        const SEEK_SET: i32 = 0;
        // SAFETY: the file is open until the transaction ends.
        if unsafe { pg_sys::BufFileSeek(self.file, segment, offset as _, SEEK_SET) } != 0 {
            Error::bug("could not seek in the temporary file of a transaction's changes").raise();
        }
    }

    fn read(&mut self, block: &mut [u8]) {
        // SAFETY: reads at most `len` bytes into the block.
        #[cfg(feature = "pg15")]
        let read = unsafe { pg_sys::BufFileRead(self.file, block.as_mut_ptr().cast(), block.len()) };
        // SAFETY: as above.
        #[cfg(not(feature = "pg15"))]
        let read = unsafe { pg_sys::BufFileReadMaybeEOF(self.file, block.as_mut_ptr().cast(), block.len(), true) };
        if read != block.len() {
            Error::bug("the temporary file of a transaction's changes is short").raise();
        }
    }
}
