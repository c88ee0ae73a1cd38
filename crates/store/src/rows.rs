//! Some rows of a stored matrix, read before the matrix itself arrives.
//!
//! Stands beside the queues of the disks and of host memory: so few bytes, wanted at once, are not worth a turn. What it
//! reads of a file is compared with no checksum; whoever uses it must compare it with the matrix when that is there.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use tangram_device::HostBytes;

use crate::buffer::Buffer;
use crate::file::DataFile;
use crate::plan::{Piece, Place};
use crate::ring::{Bell, Ring};

/// Which rows of which matrix.
#[derive(Clone, Debug)]
pub struct RowRead {
    /// Where the matrix is.
    pub from: RowSource,
    /// Bytes of a row.
    pub row_bytes: usize,
    /// Rows, in the order in which they are wanted; some may be equal.
    pub rows: Vec<u32>,
}

/// Where a matrix is that rows are read of.
#[derive(Clone, Debug)]
pub enum RowSource {
    /// In a file, as it is.
    File {
        /// Which.
        path: PathBuf,
        /// Its first byte there.
        offset: u64,
    },
    /// In host memory, verified; nothing else is there.
    Host(Arc<HostBytes>),
}

impl RowRead {
    /// Reads them, one after the other to the beginning of `into`.
    ///
    /// # Errors
    /// When the file cannot be read, what is read ends before a row does, or there is no room for them.
    pub(crate) fn read(&self, into: &mut [u8]) -> io::Result<()> {
        let size = self.rows.len().checked_mul(self.row_bytes).ok_or(io::ErrorKind::InvalidInput)?;
        let bytes = into.get_mut(..size).ok_or(io::ErrorKind::InvalidInput)?;
        if self.row_bytes == 0 {
            return Ok(());
        }
        let place = |row: u32| u64::from(row) * self.row_bytes as u64;
        let rows = self.rows.iter().map(|&row| place(row)).zip(bytes.chunks_exact_mut(self.row_bytes));
        match &self.from {
            RowSource::Host(matrix) => {
                for (at, into) in rows {
                    if at + self.row_bytes as u64 > matrix.len() as u64 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    matrix.read(at as usize, into);
                }
            }
            RowSource::File { path, offset } => {
                let file = DataFile::open(path)?;
                let missing: Vec<(u64, &mut [u8])> = rows
                    .map(|(at, into)| (offset + at, into))
                    .filter_map(|(at, into)| (!file.read_cached(at, into)).then_some((at, into)))
                    .collect();
                read_missing(&file, missing)?;
            }
        }
        Ok(())
    }
}

/// Reads from the disk: all rows at a time where there is io_uring, else one after the other.
fn read_missing(file: &DataFile, mut rows: Vec<(u64, &mut [u8])>) -> io::Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    let ring = Bell::new().and_then(|bell| Ring::new(Arc::new(bell)));
    let (Some((direct, alignment)), Ok(mut ring)) = (file.direct(), ring) else {
        return rows.into_iter().try_for_each(|(at, into)| file.cached().read_exact_at(into, at));
    };
    // A row that occurs several times is read once.
    rows.sort_unstable_by_key(|(at, _)| *at);
    let unit = alignment.offset as u64;
    let slot = |len: usize| (len + 2 * alignment.offset).next_multiple_of(Buffer::ALIGNMENT);
    let (mut pieces, mut copies): (Vec<Piece>, Vec<(usize, &mut [u8])>) = (Vec::new(), Vec::new());
    let (mut room, mut last) = (0, None);
    for (at, into) in rows {
        if last != Some(at) {
            let (start, end) = (at / unit * unit, at + into.len() as u64);
            let (len, needed) = ((end.next_multiple_of(unit) - start) as usize, (end - start) as usize);
            pieces.push(Piece { offset: start, place: Place::Buffer, at: room..room + len, needed });
            room += slot(into.len());
            last = Some(at);
        }
        copies.push((room - slot(into.len()) + (at % unit) as usize, into));
    }
    ring.start(Buffer::new(room), direct.clone(), pieces);
    let (mut buffer, result) = loop {
        if let Some(over) = ring.wait().pop() {
            break over;
        }
    };
    result?;
    for (from, into) in copies {
        let bytes = buffer.bytes().get(from..from + into.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        into.copy_from_slice(bytes);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What is read, to a room larger than it needs.
    fn rows_of(read: &RowRead) -> io::Result<Vec<u8>> {
        let bytes = read.rows.len() * read.row_bytes;
        let mut room = vec![0x5a; bytes + 9];
        read.read(&mut room)?;
        assert!(room.split_off(bytes) == [0x5a; 9], "more is written than was read");
        Ok(room)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn rows_are_what_the_file_has(
            row_bytes in 1usize..9000, offset in 0u64..20_000, cached in any::<bool>(),
            rows in proptest::collection::vec(0u32..40, 0..60),
        ) {
            // Beside the sources: a directory for temporary files may be in memory.
            let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
            let path = dir.path().join("matrix");
            let bytes: Vec<u8> = (0..offset + 40 * row_bytes as u64).map(|i| (i * 31 + i / 253) as u8).collect();
            std::fs::write(&path, &bytes).unwrap();
            if !cached {
                std::fs::File::open(&path).unwrap().sync_all().unwrap();
                DataFile::open(&path).unwrap().drop_from_cache(0, bytes.len());
            }
            let read = RowRead { from: RowSource::File { path, offset }, row_bytes, rows: rows.clone() };
            let expected: Vec<u8> = rows
                .iter()
                .flat_map(|&row| {
                    let start = offset as usize + row as usize * row_bytes;
                    bytes[start..start + row_bytes].to_vec()
                })
                .collect();
            prop_assert!(rows_of(&read).unwrap() == expected);
            let beyond = RowRead { rows: vec![0, 40], ..read };
            prop_assert!(rows_of(&beyond).is_err(), "a row that the file does not have");
        }
    }

    #[test]
    fn rows_are_what_host_memory_has() {
        const ROW: usize = 3000;
        let memory = tangram_device::cuda::stand_in::memory(64 << 10, 4096);
        let host = memory.host_pool().unwrap();
        host.grow(1 << 20).unwrap();
        // Every other unit is taken, so the matrix lies in pieces.
        let units: Vec<_> = (0..16).map(|_| host.take(1).unwrap()).collect();
        let _taken: Vec<_> = units.into_iter().step_by(2).collect();
        let bytes: Vec<u8> = (0..100 * ROW).map(|i| (i * 31 + i / 253) as u8).collect();
        let mut matrix = host.take(bytes.len()).unwrap();
        matrix.write(0, &bytes);
        let from = RowSource::Host(Arc::new(matrix));
        let read = RowRead { from, row_bytes: ROW, rows: vec![99, 0, 21, 43, 21] };
        let row = |&row: &u32| &bytes[row as usize * ROW..][..ROW];
        assert!(rows_of(&read).unwrap() == read.rows.iter().flat_map(row).copied().collect::<Vec<u8>>());
        assert!(read.read(&mut [0; 4 * ROW]).is_err(), "too little room");
        assert!(rows_of(&RowRead { rows: vec![0, 100], ..read }).is_err(), "a row that is not there");
    }

    #[test]
    fn a_file_that_is_not_there_is_an_error() {
        let from = RowSource::File { path: "/nowhere/at/all".into(), offset: 0 };
        let read = RowRead { from, row_bytes: 8, rows: vec![1] };
        assert!(rows_of(&read).is_err());
    }
}
